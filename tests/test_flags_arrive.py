"""A flag reaches what it is for: two runs that differ in it alone are not the same.

How each thing works is tested beside its own part; here is shown that a script hands the flag on.
"""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import logged
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_causal_models import make_tokenizer, save_llama

import reproduce
import stages
import train_causal_lm
import train_empathy_classifier
import train_glove_t5
from DPR import learning, train_dpr
from session import Session

GENERATOR = "--size tiny --dropout 0 --add-exemplars none --no-predict --batch-size 8 --max-steps 2 --lr 0.01"
CRITIC = "--model glove-t5 --size tiny --dim emo --batch-size 8 --max-steps 2 --lr 0.01"
CAUSAL = "--lora-rank 2 --add-exemplars prepend --batch-size 4 --batch-tokens 0 --max-steps 2 --no-predict"
RETRIEVER = "--max-steps 2 --batch-size 4 --lr 1e-3"


@pytest.fixture
def learn(trained_copy):
    """(script, its flags) -> the folder of a run of its own."""
    numbers = itertools.count()

    def run(script, words: str) -> Path:
        name = f"run-{next(numbers)}"
        common = ["--workdir", str(trained_copy), "--device", "cpu", "--log-every", "1", "--name", name]
        script.main([*common, *words.split()])
        (folder,) = (trained_copy / "saved").rglob(name)
        return folder

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {k}": v for file in files for k, v in load_file(file).items()}


def without_effect(learn, script, base: str, flags: list[str]) -> list[str]:
    """Those with which the run learns what it learns without them; without any it must."""
    plain, found = weights(learn(script, base)), []
    for flag in ["", *flags]:
        changed = weights(learn(script, f"{base} {flag}"))
        # another size of the model is another model
        same = changed.keys() == plain.keys() and all(
            plain[k].shape == w.shape and torch.equal(plain[k], w) for k, w in changed.items()
        )
        found += [flag] * same
    assert plain and found[0] == ""
    return found[1:]


def test_what_a_generator_learns_from(learn):
    flags = ["--balance 1e-3", "--critic-targets soft", "--critic-ramp 9", "--empathy-losses exp"]
    flags += ["--main-loss-w 3", "--empathy-loss-w 3", "--sentiment-loss-w 3", "--strategy 2"]
    flags += ["--schedule linear", "--weight-decay 0.9", "--clip 1e-3", "--dropout 0.5"]
    flags += ["--src-len 5", "--tgt-len 3", "--seed 7"]
    assert without_effect(learn, train_glove_t5, GENERATOR, flags) == []


def test_what_a_generator_learns_from_replies_that_it_samples(learn):
    base = f"{GENERATOR} --empathy-loss-w 0 --sentiment-loss-w 0 --max-steps 1 --sampled-loss-w 9 --samples 3"
    flags = ["--sampled-examples 1", "--sampled-reward distance", "--samples 4", "--sampled-top-k 3"]
    flags += ["--sampled-temperature 0.3"]
    assert without_effect(learn, train_glove_t5, base, flags) == []


def test_what_a_critic_learns_from(learn):
    flags = ["--mixture-share 1", "--class-weights", "--word-dropout 0.5", "--head-dropout 0.9"]
    flags += ["--dropout 0.5", "--schedule linear", "--weight-decay 0.9", "--clip 1e-3", "--reply-len 2"]
    flags += ["--pooling first", "--context-len 9"]
    assert without_effect(learn, train_empathy_classifier, CRITIC, flags) == []


def test_what_a_language_model_learns_from(learn, tmp_path):
    base = f"{CAUSAL} --model {save_llama(tmp_path / 'llama', make_tokenizer())}"
    flags = ["--lora-dropout 0.5", "--lora-alpha 99", "--top-exemplars 1", "--exemplar-len 4", "--src-len 5"]
    flags += ["--schedule constant", "--clip 1e-3", "--add-exemplars none", "--tgt-len 3"]
    assert without_effect(learn, train_causal_lm, base, flags) == []
    losses = [
        logged(learn(train_causal_lm, f"{base} --valid-conversations {count}"), "valid")[-1]["nll"]
        for count in (1, 0)
    ]
    assert losses[0] != losses[1]
    plain = f"{base} --add-exemplars none"
    assert without_effect(learn, train_causal_lm, plain, ["--no-pack"]) == []


def test_what_a_retriever_learns_from(learn, trained_copy, capsys, monkeypatch):
    measured, count = learning.rank_report, itertools.count()  # kept is the last, whatever it has learnt
    later_is_better = lambda *given: measured(*given) | {"average_rank": -float(next(count))}  # noqa: E731
    monkeypatch.setattr(learning, "rank_report", later_is_better)
    base = f"{RETRIEVER} --encoder {trained_copy / 'data' / 'bert-tiny'}"
    flags = ["--hard-negatives 0", "--other-negatives 0", "--schedule constant", "--weight-decay 0.9"]
    flags += ["--clip 1e-3", "--max-length 8", "--max-passage-length 8", "--pooling mean"]
    assert without_effect(learn, train_dpr, base, flags) == []
    learn(train_dpr, f"{base} --valid-queries 3")
    assert "held out: 3 questions" in capsys.readouterr().out


def test_logged_gradients_are_of_the_weighted_terms(learn):
    base = f"{GENERATOR} --max-steps 1 --lr 1e-12 --log-gradients"
    once, twice = (logged(learn(train_glove_t5, f"{base} --empathy-loss-w {w}"), "valid")[0] for w in (1, 2))
    assert twice["grad_emo"] == pytest.approx(2 * once["grad_emo"], rel=1e-4) and once["grad_emo"] > 0
    assert twice["grad_nll"] == pytest.approx(once["grad_nll"], rel=1e-4)
    larger = logged(learn(train_glove_t5, f"{base} --main-loss-w 3"), "valid")[0]
    assert larger["grad_nll"] == pytest.approx(3 * once["grad_nll"], rel=1e-4)


def test_tensorboard_shows_what_is_logged(learn):
    folder = learn(train_glove_t5, GENERATOR)
    board = EventAccumulator(str(folder)).Reload()
    for kind in ("train", "valid"):
        for row in logged(folder, kind):
            for name in ("nll", "emo"):
                shown = {event.step: event.value for event in board.Scalars(f"{kind}/{name}")}
                assert shown[row["step"]] == pytest.approx(row[name], rel=1e-5)


def test_deterministic_is_asked_of_torch():
    try:
        Session("cpu", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_box_of_a_recipe_has_the_time_and_the_room_that_were_asked_for(trained_copy, monkeypatch):
    boxes = []
    monkeypatch.setattr(stages, "run", lambda todo, record, logs, box: boxes.append(box) or stages.Outcome())
    words = ["--recipe", "glove", "--source", "prepared", "--workdir", str(trained_copy)]
    reproduce.main([*words, "--minutes", "9", "--parallel", "4"])
    reproduce.main(words)
    lent, plain = boxes
    assert (lent.parallel, lent.seconds, plain.parallel, plain.seconds) == (4, 540, 1, 0)
    assert plain.gather is None and lent.gather is not None
    assert Path(trained_copy / "results" / "glove" / "gathered").is_dir()
