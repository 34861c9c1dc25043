"""One update of the weights: its mathematics, and the optimizer. Knows neither empathy nor exemplars, nor the
time of a run.

    loss = sum_k weight_k * (sum of term k over the update) / (units of term k in the update)

Sums and units run over all micro-batches and processes of the update, so 8x1, 4x2 and 2x4 micro-batches, or
two processes, give one and the same gradient (but where a term depends on the micro-batch: the retriever's,
and with --balance, --sampled-loss-w or --mixture-share).
"""

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_scheduler

from options import UserError
from quick import cast_frozen, compile_stacks, compiled, quicken
from session import Session, largest_that_fits, own_random_stream
from settings import TrainingOptions


class Objective:
    """What a stage minimises: named loss terms, each a sum over its own unit (tokens or examples), and their
    weights."""

    weights: dict[str, float]

    def foresee(self, batch: dict) -> dict:
        """A batch that is still on the processor, with what a GPU would have to be waited for."""
        return batch

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """The batch with what must be known before units can be counted, such as replies that the model
        samples now."""
        return batch

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of the update after `step` others; the same names as `weights`."""
        return self.weights

    def others(self) -> list[nn.Module]:
        """The frozen models that an update asks beside the one that it trains."""
        return []

    def units(self, batch: dict) -> dict[str, float]:
        """How many units each term sums over in this batch."""
        raise NotImplementedError

    def terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """Each term's sum over this batch, with gradient. `model` may be wrapped for several processes."""
        raise NotImplementedError


class NotFinite(ArithmeticError):
    """A loss or gradient that is no finite number; the message names the term and the examples."""


@dataclass
class MicroBatch:
    """One forward pass of an update."""

    batch: dict
    weight: float  # 0: a stand-in, where this process has no example left in the update but must take part


def placed(model: nn.Module, session: Session) -> nn.Module:
    """The model on its device, where frozen weights that bf16 products read never lie in fp32."""
    if session.precision == "bf16":
        cast_frozen(model)
    return model.to(session.device)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: norms (T5's are not nn.LayerNorm) and biases are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen), shared tensors once."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


class Update:
    """`Update(...)(numbers)` makes one update from the examples of these numbers and gives its figures."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data,
        options: TrainingOptions,
        session: Session,
        total_steps: int,
        cache: Path = Path(),
    ):
        """`model` is `placed`; `data` has `collate(numbers)` (dataloaders.Data); `total_steps` is where the
        learning rate's schedule ends; `cache`: where compiled code is kept."""
        self.model, self.objective, self.data = model, objective, data
        self.options, self.session = options, session
        quicken(model, session.device, options.compile)
        if options.compile and session.world > 1:
            raise UserError("--compile: tried with one process alone; leave it out under torchrun")
        if options.compile:
            compile_stacks([model, *objective.others()], cache)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay),
            lr=options.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )
        # DDP under torchrun, but of one process alone
        self.wrapped = session.accelerator.prepare_model(model) if session.world > 1 else model
        self.scheduler = get_scheduler(
            "constant_with_warmup" if options.schedule == "constant" else options.schedule,
            self.optimizer,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=total_steps,
        )
        #: the examples of the update after this one, whose batches are made while a GPU is still at work
        self.following: list[int] = []
        self._ahead: tuple[list[int], list[MicroBatch]] = [], []
        set_seed((options.seed * 1009 + session.rank + 1) % 2**31)  # every process its own dropout

    def __call__(self, numbers: list[int]) -> dict[str, float]:
        """The loss, its terms and the gradient's norm. Raises `NotFinite` before anything is changed."""
        known, dealt = self._ahead
        micro_batches = [self.prepare(m) for m in (dealt if numbers == known else self.deal(numbers))]
        # what the sums are divided by must be known before the first backward pass: gradients add up from
        # there on
        units = self.count_units(micro_batches)
        weights = self.objective.weights_at(self.scheduler.last_epoch)
        sums = self.accumulate_gradients(micro_batches, units, weights)  # (micro-batches, terms)
        # without a limit this only measures: the norm is logged either way
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip or math.inf)
        self._ahead = self.following, self.deal(self.following) if self.following else []
        # all figures of the update leave the device together; here a GPU is waited for
        found = torch.cat([sums.flatten(), norm.float()[None]]).cpu()
        sums, norm = found[:-1].view_as(sums), found[-1]
        bad = not bool(torch.isfinite(sums).all() & torch.isfinite(norm))
        # one bad number, of any process, would spoil all weights at once, and the best checkpoint could be
        # hours old
        spoilt, *totals = self.session.sum([float(bad), *sums.sum(0).tolist()])
        if spoilt:
            raise NotFinite(self.what_is_not_finite(sums, norm, micro_batches))
        self.optimizer.step()
        # the schedule counts updates, not micro-batches
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = {k: total / (units[k] or 1) for k, total in zip(weights, totals, strict=True)}
        loss = sum(weights[k] * value for k, value in values.items())
        return {"loss": loss, **values, "grad_norm": float(norm)}

    def deal(self, numbers: list[int]) -> list[MicroBatch]:
        """This process's micro-batches of an update; nothing is drawn by chance.

        The examples are dealt out one by one, so that the lengths that an update is sorted by come out even.
        Every process has as many, as DDP waits for each in every backward pass: with a stand-in, where there
        are too few examples.
        """
        rank, world = self.session.rank, self.session.world
        pieces = self.options.accumulate * world
        rounds = min(self.options.accumulate, math.ceil(len(numbers) / world))
        mine = []
        for piece in range(rank, rounds * world, world):
            dealt = numbers[piece::pieces]
            mine.append(self.collate(dealt or numbers[:1], stand_in=not dealt))
        return mine

    def collate(self, numbers: list[int], stand_in: bool) -> MicroBatch:
        batch = self.data.collate(numbers) | {"stand_in": stand_in}
        return MicroBatch(self.session.pinned(batch), 0.0 if stand_in else 1.0)

    def prepare(self, micro: MicroBatch) -> MicroBatch:
        with self.session.autocast():
            return replace(micro, batch=self.objective.prepare(self.wrapped, micro.batch))

    def count_units(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Each term's units in the whole update, over all processes."""
        counted = dict.fromkeys(self.objective.weights, 0.0)
        for micro in micro_batches:
            units = self.objective.units(micro.batch)
            for term in counted:
                counted[term] += units[term] * micro.weight
        return dict(zip(counted, self.session.sum(list(counted.values())), strict=True))

    def accumulate_gradients(
        self, micro_batches: list[MicroBatch], units: dict[str, float], weights: dict[str, float]
    ) -> Tensor:
        """Backward passes over all micro-batches; each term's sum in each of them, (micro-batches, terms)."""
        session = self.session
        # an evaluation in between has left the model in eval mode
        self.wrapped.train()
        sums = torch.zeros(len(micro_batches), len(weights), device=session.device)
        for i, micro in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            # gradients travel between processes once an update, with the last micro-batch
            travel = contextlib.nullcontext() if last else session.accelerator.no_sync(self.wrapped)
            with travel, compiled(self.options.compile):  # backward, too: a checkpoint reads again there
                with session.autocast():
                    terms = self.objective.terms(self.wrapped, session.move(micro.batch))
                # DDP averages over processes, the formula sums: hence the factor `world`
                loss = sum(
                    weights[k] * micro.weight * session.world * terms[k].float() / (units[k] or 1)
                    for k in weights
                )
                loss.backward()
            # for the log alone, so without the graph behind them
            sums[i] = torch.stack([terms[k].detach().float() * micro.weight for k in weights])
        return sums

    def what_is_not_finite(self, sums: Tensor, norm: Tensor, micro_batches: list[MicroBatch]) -> str:
        """The terms of all processes that are not finite, and on which examples; else the gradient."""
        terms = list(self.objective.weights)
        names = [micro.batch.get("names", []) for micro in micro_batches]
        found = []
        for i, k in (~torch.isfinite(sums)).nonzero().tolist():
            found.append(f"{terms[k]} on {', '.join(names[i])[:300]}")
        everywhere = self.session.gather([", ".join(name for row in names for name in row)])
        found = self.session.gather(found)
        return "; ".join(found) or f"gradient (norm {float(norm)}) on {', '.join(everywhere)[:300]}"


def fit_batch_size(
    model: nn.Module, objective: Objective, data, options: TrainingOptions, session: Session
) -> TrainingOptions:
    """--batch-size auto: the most examples that fit at their longest; accumulation keeps the usual batch an
    update. `data` has `collate(numbers)`, `lengths` and `further_lengths`."""
    if session.world > 1:
        raise UserError(
            "--batch-size auto: find it with one process, then give --batch-size and --accumulate to torchrun"
        )
    longest = [
        sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        for lengths in (data.lengths, *data.further_lengths)
    ]
    quicken(model, session.device, options.compile)  # other attention takes other memory

    def try_out(size: int) -> int:
        model.train().zero_grad(set_to_none=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in trained for _ in range(2)]  # room for AdamW's two moments
        # the second time beside gradients, as in accumulation
        for order in longest * 2:
            with session.autocast():
                batch = session.move(objective.prepare(model, data.collate(order[:size])))
            with session.autocast():  # another: what was cast without gradients is not used with them
                terms = objective.terms(model, batch)
            torch.stack([t.float() for t in terms.values()]).sum().backward()
        del states
        return size

    with own_random_stream(options.seed):
        size = largest_that_fits(options.effective_batch, try_out)
    model.zero_grad(set_to_none=True)
    if session.device.type == "cuda":  # the peak that is reported is the training's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accumulate = options.effective_batch // size
    session.say(f"--batch-size auto: {size} x {accumulate} micro-batches fit")
    return replace(options, batch_size=size, accumulate=accumulate)
