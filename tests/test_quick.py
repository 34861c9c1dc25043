"""What makes a training cheaper on a CPU changes what it computes by rounding alone, and its random draws."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import logged
from safetensors.torch import load_file
from test_causal_models import make_tokenizer, save_llama
from test_vocabulary import training_options, updates_of_six
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerFF

import glove_models
import quick
import train_glove_t5
from causal_models import CausalGenerator
from dataloaders import Data
from options import UserError
from pretrained import T5_ENCODERS
from session import Session
from updates import Objective, Update

CPU = torch.device("cpu")


def test_the_attention_of_a_training_gives_the_losses_and_gradients_of_the_plain_one():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=40, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    plain = T5ForConditionalGeneration(config).train()
    cheap = copy.deepcopy(plain)
    quick.quicken(cheap, CPU)
    assert cheap.config._attn_implementation == cheap.encoder.config._attn_implementation == quick.FEW_PASSES
    ids = torch.randint(1, 40, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    losses = []
    for model in (plain, cheap):
        losses.append(model(input_ids=ids, attention_mask=mask, labels=ids[:, :7].contiguous()).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for (name, a), (_, b) in zip(plain.named_parameters(), cheap.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", sorted(T5_ENCODERS))
def test_every_kind_of_t5_is_trained_by_the_attention_whose_gradients_stay_numbers(kind):
    """Its positions are a mask with gradient, with which torch's own attention failed on a GPU."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    torch.manual_seed(0)
    plain = T5_ENCODERS[kind](CONFIG_MAPPING[kind](vocab_size=40, **sizes)).train()
    cheap = copy.deepcopy(plain)
    quick.quicken(cheap, torch.device("cuda"))
    assert cheap.config._attn_implementation == quick.FEW_PASSES
    ids = torch.randint(1, 40, (3, 11))
    torch.testing.assert_close(plain(ids)[0], cheap(ids)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_norm_in_few_passes_is_the_plain_one(precision):
    found, given = [], torch.randn(3, 5, 16)
    norm = LlamaRMSNorm(16)
    nn.init.uniform_(norm.weight, 0.5, 2)
    holder = nn.Sequential(norm, nn.Linear(16, 8, bias=False))
    for _ in range(2):
        x = given.clone().requires_grad_()
        holder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = holder(x)
        out.float().square().sum().backward()
        found.append([out.detach(), x.grad, holder[0].weight.grad.clone(), holder[1].weight.grad.clone()])
        quick.quicken(holder, CPU)
    assert isinstance(holder[0], quick.Norm) and [*holder.state_dict()] == ["0.weight", "1.weight"]
    for plain, quickened in zip(*found, strict=True):
        same = float((plain - quickened).norm() / plain.norm())
        assert same < (1e-6 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_a_feed_forward_with_fewer_casts_is_the_plain_one_to_the_bit(kind, precision):
    config = T5Config(d_model=16, d_ff=24, feed_forward_proj=kind, dropout_rate=0.0)
    plain = T5LayerFF(config).DenseReluDense
    holder, found, widest = nn.Sequential(plain), [], []
    x = torch.randn(3, 5, 16)
    for _ in range(2):
        holder.zero_grad()
        holder[0].wo.register_forward_pre_hook(lambda _, given: widest.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = holder(x)
        out.float().square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in holder.parameters())])
        names = [name for name, _ in holder.named_parameters()]
        quick.quicken(holder, CPU)
    assert isinstance(holder[0], quick.FeedForward) and names == [n for n, _ in holder.named_parameters()]
    assert all(map(torch.equal, *found)) and len(found[0]) == len(names) + 1 > 2
    assert widest[0] == torch.float32 and widest[-1] == {"fp32": torch.float32}.get(precision, torch.bfloat16)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_cheap_dropout_drops_its_share_scales_the_rest_and_sends_no_gradient_where_it_dropped(p):
    model = nn.Sequential(nn.Dropout(p))
    quick.quicken(model, CPU)
    torch.manual_seed(1)
    x = torch.full((301, 333), 2.0, requires_grad=True)  # not a multiple of what one draw serves
    out = model.train()(x)
    out.sum().backward()
    kept = out != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2 / (1 - p)), rtol=1e-4, atol=0)
    assert torch.equal(x.grad != 0, kept)
    torch.testing.assert_close(x.grad[kept], torch.full_like(x.grad[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    # neighbours, which share a draw, and rows are dropped independently
    apart = kept.float() - kept.float().mean()
    for shift, dim in ((1, 1), (2, 1), (1, 0)):
        assert abs(float((apart * apart.roll(shift, dim)).mean())) < 5 * p * (1 - p) / x.numel() ** 0.5


def test_a_cheap_dropout_repeats_its_draws_and_is_nothing_in_use():
    drop, x = quick.Dropout(0.3), torch.randn(7, 9)
    torch.manual_seed(5)
    first = drop(x)
    assert not torch.equal(first, drop(x))
    torch.manual_seed(5)
    assert torch.equal(first, drop(x))
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(quick.Dropout(0.0)(x), x)


def test_attention_drops_its_weights_in_training_alone():
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    for training in (True, False):
        holder = nn.Module().train(training)
        out, weights = quick.attention(holder, q, k, v, None, scaling=1.0, dropout=0.5)
        dropped = float((weights == 0).float().mean())
        assert dropped == (pytest.approx(0.5, abs=0.05) if training else 0)
        torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


def test_a_frozen_model_drops_nothing_after_it_was_quickened():
    model, x = nn.Sequential(nn.Dropout(0.5)).eval(), torch.randn(7, 9)
    quick.quicken(model, CPU)
    assert torch.equal(model(x), x)


def test_a_frozen_base_that_is_cast_once_is_the_one_that_is_cast_at_each_use(tmp_path):
    base = save_llama(tmp_path / "llama", make_tokenizer())
    model = CausalGenerator.start(base, rank=2, cache=tmp_path)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)  # zeros let nothing through
    ids = torch.randint(5, 40, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "target_mask": ids > 10}
    found, read = [], []
    (adapter,) = [m for n, m in model.named_modules() if n.endswith("0.mlp.down_proj.lora_A.default")]
    adapter.register_forward_pre_hook(lambda _, given: read.append(given[0].dtype))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        model.zero_grad()
        logits.float().square().sum().backward()
        found.append([logits, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        quick.cast_frozen(model)
    assert all(map(torch.equal, *found)) and len(found[0]) > 2
    assert read == [torch.float32, torch.bfloat16]  # by the adapter: no cast to and fro
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all(kind == torch.float32 for name, kind in kinds.items() if "lora" in name or "embed" in name)
    assert [k for n, k in kinds.items() if n.endswith("q_proj.base_layer.weight")][0] == torch.bfloat16


def test_the_fused_optimizer_makes_the_updates_of_the_plain_one(monkeypatch):
    optimizer, fused, found = torch.optim.AdamW, [], []
    for changes in ({}, {"fused": False}):

        def made(*args, changes=changes, **named):
            fused.append((named | changes)["fused"])
            return optimizer(*args, **named | changes)

        monkeypatch.setattr(torch.optim, "AdamW", made)
        update = updates_of_six(Session("cpu", "fp32", 3))
        losses = [update(list(range(6)))["loss"] for _ in range(4)]
        found.append([torch.tensor(losses), *(p.detach() for p in update.model.parameters())])
    assert fused == [True, False] and found[0][0][0] > found[0][0][3]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_compiling_is_refused_to_several_processes(monkeypatch):
    session = Session("cpu", "fp32", 3)
    session.world = 2
    asked = dataclasses.replace(training_options(), compile=True)
    with pytest.raises(UserError, match="--compile: tried with one process alone.*torchrun"):
        Update(nn.Linear(2, 2), Objective(), None, asked, session, 10)


@pytest.mark.slow  # for what torch imports
def test_where_nothing_can_be_compiled_the_flag_is_named(monkeypatch, tmp_path):
    def no_compiler(*_):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(quick, "BACKEND", no_compiler)
    model = T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    quick.compile_stacks([model], tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    refusal = pytest.raises(UserError, match="--compile: .*no g[+][+] here.*leave the flag out")
    with refusal, quick.compiled(True):
        model(ids)
    model(ids)  # elsewhere it runs as written
    torch.compiler.set_stance("default")


@pytest.mark.slow
def test_a_compiled_run_in_bf16_is_found_as_it_was_trained(workdir, monkeypatch):
    """Where a factor of T5 is no power of two, norms of another kind round another way."""
    monkeypatch.setattr(quick, "BACKEND", "eager")
    monkeypatch.setitem(glove_models.SIZES, "tiny", glove_models.SIZES["tiny"] | {"d_model": 300})
    words = ["--workdir", str(workdir), "--device", "cpu", "--precision", "bf16", "--size", "tiny"]
    words += "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --max-steps 1 --compile".split()
    train_glove_t5.main([*words, "--no-predict", "--batch-size", "4"])  # which loads what it wrote
    assert (workdir / "saved" / "glove-t5" / "plain" / "result.json").exists()


@pytest.mark.slow
def test_what_is_read_again_for_its_gradient_is_compiled_there_too(tmp_path, monkeypatch):
    monkeypatch.setattr(quick, "BACKEND", "aot_eager")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    class Twice(Objective):
        weights = {"sum": 1.0}

        def units(self, batch):
            return {"sum": 1.0}

        def terms(self, model, batch):
            ids = batch["ids"]
            return {"sum": checkpoint(lambda: model(ids).logits, use_reentrant=False).square().mean()}

    base = save_llama(tmp_path / "llama", make_tokenizer())
    data = Data([5, 5], lambda numbers: {"ids": torch.tensor([[1, 2, 3, 4, 5]] * len(numbers))})
    losses = []
    for asked in (False, True):
        options = dataclasses.replace(training_options(), compile=asked)
        model = AutoModelForCausalLM.from_pretrained(base)
        update = Update(model, Twice(), data, options, Session("cpu", "fp32", 3), 10, tmp_path)
        losses.append([update([0, 1])["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_train_the_same_weights_under_the_same_names(workdir, monkeypatch):
    monkeypatch.setattr(quick, "BACKEND", "eager")  # what is traced, without what makes it fast
    words = ["--workdir", str(workdir), "--device", "cpu", "--size", "tiny", "--add-exemplars", "none"]
    words += "--empathy-loss-w 0 --sentiment-loss-w 0 --max-steps 2 --batch-size 4 --log-every 1".split()
    words += ["--no-predict", "--save-every", "1", "--dropout", "0"]
    for name in ("plain", "fast"):
        train_glove_t5.main([*words, "--name", name, *(["--compile"] if name == "fast" else [])])
    saved = workdir / "saved" / "glove-t5"
    for plain, fast in zip(*(logged(saved / name) for name in ("plain", "fast")), strict=True):
        assert fast.pop("kind") == plain.pop("kind") and fast == pytest.approx(plain, rel=1e-4)
    weights = [load_file(saved / name / "model.safetensors") for name in ("plain", "fast")]
    assert weights[0].keys() == weights[1].keys()
    assert json.loads((saved / "fast" / "args.json").read_text())["args"]["compile"]
