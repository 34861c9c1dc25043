"""The same training at less cost: other kernels for attention, norms and, on a CPU, for dropout, frozen
weights in autocast's type, and compiled layers where that is asked for.

Knows neither empathy nor the time of a run.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from options import UserError
from vocabulary import product_kind

BACKEND = "inductor"
FEW_PASSES = "few-passes"


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout that draws 16 random bits for a number, where torch's on a CPU takes longer than the products
    beside it, and keeps a byte of each for the backward pass, where torch keeps four.

    The share that falls out is `p` rounded to a multiple of 2**-16, and the rest is scaled by exactly what
    is left.
    """
    out = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # four numbers' in a draw
    return torch.where(bits < out - 2**15, 0.0, x) * (2**16 / (2**16 - out))


class Dropout(nn.Dropout):
    """`drop`, where torch is told of a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return drop(x, self.p)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """transformers' own for T5, from (B, heads, T, width) to (B, T, heads, width) and the weights, with fewer
    passes over the scores: a scale of 1 is none, and `drop`."""
    scores = query @ key.transpose(2, 3)  # (B, heads, T, S)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = scores if scaling == 1 else scores * scaling
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores.add_(bias) if bias.dtype == scores.dtype else scores + bias
    weights = scores.softmax(-1)
    if dropout and module.training:
        plainly = weights.device.type != "cpu" or torch.compiler.is_compiling()
        weights = nn.functional.dropout(weights, dropout) if plainly else drop(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def unseen_mask(*args, **kwargs) -> Tensor | None:
    """transformers' own for `attention`, made whether or not anything is padded: to know that, a GPU would
    have to be waited for, before each encoder and each critic."""
    return eager_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})


AttentionInterface.register(FEW_PASSES, attention)
AttentionMaskInterface.register(FEW_PASSES, unseen_mask)


class _Norm(torch.autograd.Function):
    """In a third of the passes over memory that autograd makes of the formula; it keeps one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype):
        rows = x.flatten(0, -2).float()  # (N, D)
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        rate = length.square_().div_(rows.shape[1]).add_(epsilon).rsqrt_()  # (N, 1)
        ctx.save_for_backward(x, weight, rate)
        return (rows * rate).mul_(weight).view_as(x).to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, rate = ctx.saved_tensors
        rows, given = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        pull, of_weight = given * weight, None
        with torch.autocast("cpu", enabled=False):  # sums in the form of products
            along = torch.bmm(pull[:, None], rows[:, :, None])[:, :, 0]  # (N, 1)
            if ctx.needs_input_grad[1]:
                of_weight = (rate.T @ (given * rows))[0]
        pull.mul_(rate).addcmul_(rows, along.mul_(rate**3), value=-1 / rows.shape[1])
        return pull.view_as(x).to(x.dtype), of_weight, None, None


class Norm(nn.Module):
    """Root mean square norm, in fp32. What it says is in the type that products are taken in, to which each
    of the layers that read it would cast it by itself."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        kind = product_kind(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Norm.apply(x, self.weight, self.epsilon, kind)
        return rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(kind)


class FeedForward(nn.Module):
    """T5's, without the cast of its inner activation to the type of the weights: autocast undoes it."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        gated = hasattr(self, "wi_0")
        inner = parts.act(parts.wi_0(x)) * parts.wi_1(x) if gated else parts.act(parts.wi(x))
        return parts.wo(parts.dropout(inner))


#: the kinds of models that add T5's positions to the scores of attention
T5_KINDS = {"t5", "mt5", "umt5"}
#: transformers' modules that compute what `FeedForward` does
FEED_FORWARDS = {"T5DenseActDense", "T5DenseGatedActDense"}
#: and what `Norm` does
NORMS = {"T5LayerNorm", "LlamaRMSNorm"}


def quicken(model: nn.Module, device: torch.device, compiling: bool = False) -> None:
    """Change `model` in place for its training on `device`; names and shapes of its weights stay.

    `compiling`: it will be compiled, which makes torch's own dropout and norms cheap.
    """
    on_cpu = device.type == "cpu"
    module: Any
    for module in model.modules():
        # T5's positions are a mask with gradient. On a CPU SDPA has no kernel for it: it makes the same
        # products, and more around them. On an H100 (torch 2.11, bf16, no dropout) its gradients were no
        # numbers after some hundred updates, in two runs of two.
        if isinstance(module, PreTrainedModel) and module.config.model_type in T5_KINDS:
            module.set_attn_implementation(FEW_PASSES)
        for name, child in module.named_children():
            if type(child) is nn.Dropout and on_cpu and not compiling:
                setattr(module, name, Dropout(child.p).train(child.training))  # a frozen model's stays off
            if type(child).__name__ in FEED_FORWARDS and not compiling:
                setattr(module, name, FeedForward(child).train(child.training))
            if type(child).__name__ in NORMS and not compiling:
                setattr(module, name, Norm(child.weight, child.variance_epsilon).train(child.training))


def cast_frozen(model: nn.Module) -> None:
    """Give the frozen linear layers of `model` their weights in bf16, in place: autocast would cast them anew
    at each use, with the same result. A weight that is also a table of words stays as it is.

    From then on `model` works under autocast alone.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    module: Any
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # peft's, which would cast to fp32 and autocast back
            module.cast_input_dtype_enabled = False
        if not isinstance(module, nn.Linear) or id(module.weight) in tables:
            continue
        for weight in module.parameters(recurse=False):
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)


def compile_stacks(models: Iterable[nn.Module], cache: Path) -> None:
    """Compile the layers of each of transformers' models in `models`, in place, for any length; heads and
    what stands around them stay as written. They run so within `compiled`. `cache`: where a later run finds
    them."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    # one program serves models of one shape; some shapes, and what was first seen with a length of 1
    torch._dynamo.config.recompile_limit = 64
    for model in models:
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and not has_inner_model(part):
                part.compile(dynamic=True, backend=BACKEND)
    torch.compiler.set_stance("force_eager")


def has_inner_model(model: nn.Module) -> bool:
    return any(isinstance(part, PreTrainedModel) for part in model.modules() if part is not model)


@contextlib.contextmanager
def compiled(asked: bool) -> Iterator[None]:
    """What was compiled runs so within, if that is `asked` for. Elsewhere it runs as written: decoding calls
    a model with one more token each time, and evaluations stay comparable to the bit.

    Raises `UserError` where this machine cannot compile."""
    if not asked:
        yield
        return
    with torch.compiler.set_stance("default"):
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            why = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            raise UserError(
                f"--compile: this model cannot be compiled here ({why}); it needs a C++ compiler (g++), and "
                "for a GPU triton; or leave the flag out"
            ) from error
