"""The loss over the vocabulary, and what frozen tables make of the same distribution: one set of logits is
held (of `logits_nll` their gradient, too), and everything else that is as large as they are only in pieces.

Knows tensors alone. Letters in shapes: B examples, T reply tokens, N real tokens among them, D model width, V
words, E width of all tables together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: numbers in a piece: what stays in a processor's cache, and what is worth a launch on a GPU
PIECE = {"cpu": 2**22, "cuda": 2**26}


def product_kind(tensor: Tensor) -> torch.dtype:
    """What a product of `tensor` is taken in: autocast's type where that is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def pieces(logits: Tensor) -> Iterator[slice]:
    """Rows of (N, V), some at a time."""
    size = max(1, PIECE.get(logits.device.type, PIECE["cpu"]) // logits.shape[1])
    yield from (slice(start, start + size) for start in range(0, len(logits), size))


def minus_label(values: Tensor, labels: Tensor, by: Tensor) -> None:
    """Take `by` (N,) from each row's label, (N, V) in place."""
    rows = torch.arange(len(labels), device=labels.device)
    values[rows, labels] = values[rows, labels] - by


class _Read(torch.autograd.Function):
    """The logits stand between the two passes, and become their own gradient in place."""

    @staticmethod
    def forward(ctx, rows: Tensor, head: Tensor, labels: Tensor, table: Tensor | None):
        logits = rows @ head.T  # (N, D) @ (D, V) -> (N, V)
        nll, norm = (torch.empty(len(rows), device=rows.device) for _ in range(2))
        mixed = None if table is None else rows.new_empty(len(rows), table.shape[1], dtype=table.dtype)
        for part in pieces(logits):
            given = logits[part]
            likely = given.float().log_softmax(-1)
            said = labels[part, None]
            nll[part] = -likely.gather(1, said)[:, 0]
            norm[part] = given.gather(1, said)[:, 0].float() + nll[part]
            if mixed is not None and table is not None:
                torch.mm(likely.exp_().to(table.dtype), table, out=mixed[part])  # (n, V) @ (V, E) -> (n, E)
        ctx.save_for_backward(rows, head, labels, norm, table)
        ctx.logits = logits  # by no saved tensor: those may not be written to
        return nll, mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_nll: Tensor, of_mixed: Tensor | None):
        rows, head, labels, norm, table = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:  # a second pass over the same graph
            logits = rows @ head.T
        for part in pieces(logits):
            likely = logits[part].float().sub_(norm[part, None]).exp_()  # fp32: in place
            push = of_nll[part, None]
            if table is not None and of_mixed is not None:
                each = (of_mixed[part] @ table.T).float()  # (n, E) @ (E, V) -> (n, V)
                push = each.add_(push - (likely * each).sum(-1, keepdim=True))
            likely.mul_(push)
            minus_label(likely, labels[part], of_nll[part])
            if likely.dtype != logits.dtype:
                logits[part] = likely
        of_rows = logits @ head if ctx.needs_input_grad[0] else None  # (N, V) @ (V, D) -> (N, D)
        of_head = logits.T @ rows if ctx.needs_input_grad[1] else None  # (V, N) @ (N, D) -> (V, D)
        return of_rows, of_head, None, None


def read_replies(
    hidden: Tensor, head: Tensor, labels: Tensor, table: Tensor | None = None, places: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the output layer `head` (V, D) makes of `hidden` (B, T, D), at the real tokens alone: the negative
    log-likelihood of their `labels` (B, T), (N,) in order, and the words of the soft reply, (B, T, E), 0
    elsewhere.

    Those are the softmax times a frozen `table` (V, E) of the type that products are taken in; None without
    one. `places` (N,): where labels are not -100, in the flattened batch, if that is known.
    """
    if places is None:
        places = (labels.flatten() != -100).nonzero()[:, 0]
    kind = product_kind(hidden)
    rows = hidden.flatten(0, 1).index_select(0, places).to(kind)  # (B, T, D) -> (N, D)
    nll, mixed = _Read.apply(rows, head.to(kind), labels.flatten()[places], table)
    if mixed is None:
        return nll, None
    spread = mixed.new_zeros(labels.numel(), mixed.shape[1]).index_copy(0, places, mixed)
    return nll, spread.view(*labels.shape, -1)  # (B * T, E) -> (B, T, E)


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor):
        nll, norm = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        for part in pieces(logits):
            said = labels[part, None]
            nll[part] = -logits[part].float().log_softmax(-1).gather(1, said)[:, 0]
            norm[part] = logits[part].gather(1, said)[:, 0].float() + nll[part]
        ctx.save_for_backward(logits, labels, norm)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, of_nll: Tensor):
        logits, labels, norm = ctx.saved_tensors
        found = torch.empty_like(logits)
        for part in pieces(logits):
            likely = (logits[part].float() - norm[part, None]).exp_().mul_(of_nll[part, None])
            minus_label(likely, labels[part], of_nll[part])
            found[part] = likely
        return found, None


def logits_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, V), (N,) -> the negative log-likelihood of each label, (N,), fp32, without bf16 logits in fp32."""
    return _Nll.apply(logits, labels)
