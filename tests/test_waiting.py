"""Where a GPU would be waited for: an update asks for no value before its own figures."""

import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import recursively_apply
from test_causal_models import LONG, TALKS, make_tokenizer, save_llama
from test_vocabulary import training_options, updates_of_six

from causal_generators import CausalObjective
from causal_models import CausalGenerator
from chats import causal_data
from families import validate
from session import Session
from updates import Update

#: what gives its caller a value, or a shape that depends on one
ASKS = {
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "item",
    "tolist",
    "numpy",
    "cpu",
    "equal",
    "allclose",
}
ASKS |= {"nonzero", "argwhere", "masked_select", "unique", "bincount"}


class Away(torch.Tensor):
    """Stands for a tensor on a GPU, and so does whatever is made of it."""

    asked: Counter = Counter()
    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        indices = args[1] if func is torch.Tensor.__getitem__ else ()
        for index in indices if isinstance(indices, tuple) else (indices,):
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                cls.asked["boolean index"] += 1
        if func.__name__ in ASKS:
            cls.asked[func.__name__] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def causal_updates(session: Session, folder) -> Update:
    base = save_llama(folder / "llama", make_tokenizer())
    model = CausalGenerator.start(base, rank=2, cache=folder)
    data = causal_data(TALKS, model.tokenizer, packed=True, **LONG)
    return Update(model, CausalObjective(), data, training_options(), session, 10)


@pytest.mark.parametrize("family", ["t5 with critics", "causal"])
def test_no_value_is_asked_of_a_device_before_an_update_is_over(family, tmp_path, monkeypatch):
    session = Session("cpu", "fp32", 3)
    update = causal_updates(session, tmp_path) if family == "causal" else updates_of_six(session)
    numbers = list(range(len(update.data)))
    expected = update(numbers)  # warming up: at a rate of 0
    monkeypatch.setattr(
        session, "move", lambda batch: recursively_apply(lambda t: t.as_subclass(Away), batch)
    )
    Away.asked.clear()
    Away.calls = 0
    found = update(numbers)
    assert found == pytest.approx(expected)
    assert not Away.asked and Away.calls > 100


def test_an_evaluation_asks_for_its_figures_once_a_batch(monkeypatch):
    session = Session("cpu", "fp32", 3)
    update = updates_of_six(session)
    held = SimpleNamespace(data=update.data, examples=[SimpleNamespace(response="so sorry")])
    batches = [[0, 1, 2], [3, 4, 5]]
    measure = functools.partial(validate, update.model.eval(), update.objective, held, batches, session)
    with torch.no_grad():
        expected = measure()
        monkeypatch.setattr(
            session, "move", lambda batch: recursively_apply(lambda t: t.as_subclass(Away), batch)
        )
        Away.asked.clear()
        assert measure() == pytest.approx(expected)
    assert Away.asked == {"tolist": len(batches)}


def test_the_next_updates_batch_is_made_before_this_ones_figures_are_waited_for(monkeypatch):
    session, made, known = Session("cpu", "fp32", 3), [], []
    update = updates_of_six(session)
    collate, add_up = update.data.collate, session.sum
    monkeypatch.setattr(update.data, "collate", lambda numbers: made.append(numbers) or collate(numbers))
    monkeypatch.setattr(session, "sum", lambda values: known.append([*made]) or add_up(values))
    update.following = [3, 4, 5]
    update([0, 1, 2])
    update.following = []
    update([3, 4, 5])
    of_units, of_figures = known[::2], known[1::2]
    assert of_units[0] == [[0, 1, 2]]
    assert of_figures == 2 * [[[0, 1, 2], [3, 4, 5]]]
