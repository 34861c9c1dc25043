"""One set of logits serves likelihood and critics: what comes out is the plain way's, but for rounding."""

import ast
import dataclasses

import pytest
import torch
import toy
from conftest import by_two_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config

import vocabulary
from critic_set import CriticSet
from dataloaders import Data
from models import Critic, CriticSettings, Generator, GeneratorSettings, soft_response, token_nll
from objectives import GeneratorObjective
from session import Session
from settings import GeneratorOptions, TrainingOptions
from updates import Update

CPU = torch.device("cpu")
WORDS, END = 41, 1


def config(width: int) -> T5Config:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5Config(vocab_size=WORDS, dropout_rate=0.0, decoder_start_token_id=0, **sizes)


def critics() -> CriticSet:
    """Of different widths, poolings and lengths."""
    made = {}
    for kind, width, pooling, reply_len in (("emo", 16, "first", 64), ("sentiment", 24, "reply", 4)):
        settings = CriticSettings(
            kind=kind,
            outputs=1 if kind == "sentiment" else 3,
            pooling=pooling,
            context_len=5,
            reply_len=reply_len,
            head_dropout=0.0,
            word_dropout=0.0,
            backbone=config(width).to_dict(),
            tokenizer="",
        )
        made[kind] = Critic(settings)
    return CriticSet(made, CPU)


def batch_of(lengths: list[int]) -> dict:
    draw = torch.Generator().manual_seed(2)
    labels = torch.full((len(lengths), max(lengths)), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(2, WORDS, (length,), generator=draw)
        labels[row, length - 1] = END
    source = torch.randint(2, WORDS, (len(lengths), 7), generator=draw)
    context = source[:, :5].clone()
    context[:, -1] = END
    return {
        "source_ids": source,
        "source_mask": torch.ones_like(source),
        "speaker_ids": torch.ones_like(source),
        "labels": labels,
        "reply_mask": (labels != -100).long(),
        "context_ids": context,
        "context_mask": torch.ones_like(context),
        "critic_targets": {"emo": torch.tensor([0, 2, 1]), "sentiment": torch.tensor([0.5, -0.5, 0.1])},
    }


def options(**changes) -> GeneratorOptions:
    given = dict.fromkeys(GeneratorOptions.__dataclass_fields__, 1) | {"balance": 0.0, "critic_ramp": 0}
    return GeneratorOptions(**given | {"strategy": 0, "critic_targets": "labels"} | changes)


def plain(model: Generator, judges: CriticSet, batch: dict, views=None) -> dict:
    """Logits, softmax and a product for each critic, all of them whole and with autograd's own gradients."""
    logits = model(batch)
    soft = soft_response(logits, 0)
    found = {kind: judges.loss(kind, soft, batch, views) for kind in judges.critics}
    return {"nll": token_nll(logits, batch["labels"]).sum(), **found}


@pytest.mark.parametrize("with_critics", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, precision, with_critics):
    monkeypatch.setitem(vocabulary.PIECE, "cpu", 3 * WORDS)  # three rows a piece
    config_ = config(16)
    model = Generator(GeneratorSettings(backbone=config_.to_dict(), exemplars="none", own_head=with_critics))
    judges = critics() if with_critics else CriticSet({}, CPU)
    objective, batch = GeneratorObjective(judges, options()), batch_of([3, 8, 5])
    found = []
    for way in (lambda: plain(model, judges, batch), lambda: objective.losses(model, batch, 0)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            terms = way()
        model.zero_grad()
        sum(weight * t.float() for weight, t in zip((1.0, 7.0, 3.0), terms.values(), strict=False)).backward()
        found.append(
            ({k: t.detach() for k, t in terms.items()}, [p.grad.clone() for p in model.parameters()])
        )
    (losses, theirs), (ours, own) = found
    close = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 2e-2, "atol": 1e-2}
    assert losses.keys() == ours.keys()
    for name in losses:
        torch.testing.assert_close(ours[name].float(), losses[name].float(), **close, msg=name)
    for a, b in zip(own, theirs, strict=True):
        apart = (a - b).norm() / b.norm().clamp(min=1e-6)
        assert float(apart) < (1e-5 if precision == "fp32" else 0.05)


class Made(TorchDispatchMode):
    """Counts the tensors of at least `size` numbers that are made within it; views of others are none."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.numel() >= self.size:
            given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            self.count += all(a.data_ptr() != found.data_ptr() for a in given)
        return found


@pytest.mark.parametrize("with_critics", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_else_is_ever_made_that_is_as_large_as_the_logits(monkeypatch, precision, with_critics):
    monkeypatch.setattr(f"{__name__}.WORDS", 2000)  # so that nothing else of the model is as large
    monkeypatch.setitem(vocabulary.PIECE, "cpu", 8 * WORDS)
    model = Generator(GeneratorSettings(backbone=config(16).to_dict(), exemplars="none"))
    judges, batch = critics() if with_critics else CriticSet({}, CPU), batch_of([40, 38, 30])
    objective, count = GeneratorObjective(judges, options()), []
    for way in (lambda: plain(model, judges, batch), lambda: objective.losses(model, batch, 0)):
        with Made(100 * WORDS) as made, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            sum(way().values()).backward()
        count.append(made.count)
    assert count[0] > 4 and count[1] == 1


def test_each_terms_gradient_can_be_asked_of_one_forward_pass():
    model = Generator(GeneratorSettings(backbone=config(16).to_dict(), exemplars="none"))
    judges, batch = critics(), batch_of([3, 8, 5])
    weights = [model.t5.shared.weight, model.t5.decoder.block[0].layer[2].DenseReluDense.wo.weight]
    terms, expected = (
        GeneratorObjective(judges, options()).losses(model, batch, 0),
        plain(model, judges, batch),
    )
    for name in ("emo", "nll", "sentiment", "emo"):
        found, other = (torch.autograd.grad(t[name], weights, retain_graph=True) for t in (terms, expected))
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_batch_says_in_advance_what_critics_would_have_to_look_up():
    judges, batch = critics(), batch_of([3, 8, 5])
    objective = GeneratorObjective(judges, options())
    prepared = objective.prepare(nn.Identity(), batch)
    assert prepared["cut"] == {"emo": False, "sentiment": True}
    # four words and the end that the model gave them are read as they are, a fifth word is not
    for lengths, cut in (([3, 5], False), ([3, 6], True)):
        assert objective.prepare(nn.Identity(), batch_of(lengths))["cut"]["sentiment"] == cut
    model = Generator(GeneratorSettings(backbone=config(16).to_dict(), exemplars="none"))
    plainly, known = (objective.losses(model, b, 0) for b in (batch, prepared))
    assert all(torch.equal(plainly[k], known[k]) for k in plainly)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_likelihood_of_logits_needs_no_copy_of_them(monkeypatch, kind):
    monkeypatch.setitem(vocabulary.PIECE, "cpu", 2 * WORDS)
    logits, labels = torch.randn(5, WORDS).to(kind), torch.randint(WORDS, (5,))
    weights, found = torch.rand(5), []
    for nll in (nn.CrossEntropyLoss(reduction="none"), vocabulary.logits_nll):
        given = logits.clone().requires_grad_()
        value = nll(given.float() if nll is not vocabulary.logits_nll else given, labels)
        (value * weights).sum().backward()
        found.append((value.detach(), given.grad))
    torch.testing.assert_close(*[v for v, _ in found])
    torch.testing.assert_close(
        *[g for _, g in found], rtol=1e-5 if kind == torch.float32 else 1e-2, atol=1e-6
    )


def training_options() -> TrainingOptions:
    flags = toy.DEFAULTS | {"weight_decay": 0.0, "lr": 1e-3}
    return TrainingOptions(**{f.name: flags[f.name] for f in dataclasses.fields(TrainingOptions)})


def updates_of_six(session: Session) -> Update:
    """Updates of a generator with critics from six examples."""
    torch.manual_seed(0)
    model = Generator(GeneratorSettings(backbone=config(16).to_dict(), exemplars="none"))
    objective, whole = GeneratorObjective(critics(), options()), batch_of([3, 8, 5, 2, 6, 4])
    targets = {"emo": torch.tensor([0, 2, 1, 1, 0, 2]), "sentiment": torch.linspace(-1, 1, 6)}

    def collate(numbers: list[int]) -> dict:
        found = {k: v[numbers] for k, v in whole.items() if isinstance(v, torch.Tensor)}
        found["critic_targets"] = {kind: values[numbers] for kind, values in targets.items()}
        found["reply_places"] = found["reply_mask"].flatten().nonzero()[:, 0]
        return found

    return Update(model, objective, Data([10] * 6, collate), training_options(), session, 10)


def two_updates() -> list[dict[str, float]]:
    """The figures of two updates, by all processes together."""
    update = updates_of_six(Session("cpu", "fp32", 3))
    return [update(list(range(6))) for _ in range(2)]


@pytest.mark.slow
def test_two_processes_make_the_update_of_one():
    together = ast.literal_eval(by_two_processes(two_updates))
    for found, expected in zip(together, two_updates(), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
