"""The training loop of every stage. Knows neither empathy nor exemplars.

A stage hands over a model, its data and an `Objective`: named loss terms, each a sum over its own unit (tokens or
examples). The loop divides each by that unit's count in the whole step, over micro-batches and processes:

    loss = sum_k weight_k * (sum of term k over the step) / (units of term k in the step)

so 8x1, 4x2 and 2x4 micro-batches, or two processes, give one and the same gradient.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_scheduler

import runs
from options import UserError
from session import (
    Session,
    Signals,
    largest_that_fits,
    memory_advice,
    own_random_stream,
    random_state,
    set_random_state,
)
from storage import read_json, sha256, share, sync, write_json

#: flags that change neither the updates nor which of them is kept
FREE = {"workdir", "overwrite", "device", "resume", "log_every", "save_every", "name", "deterministic"}


@dataclass
class Objective:
    """`units(batch)`: how many units each term sums over; `terms(model, batch)`: each term's sum, with gradient."""

    weights: dict[str, float]
    units: Callable[[dict], dict[str, float]]
    terms: Callable[[nn.Module, dict], dict[str, Tensor]]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: norms (T5's are not nn.LayerNorm) and biases are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen), shared tensors once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, g in sizes if g), sum(n for n, g in sizes if not g)


@dataclass
class State:
    """Where the loop stands; all of it is in every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # steps done in this epoch
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    evaluations: int = 0
    evaluation_due: bool = False
    seconds: float = 0.0
    window_steps: int = 0  # what the next log line averages over
    window: dict | None = None


class Loop:
    """One training run: `Loop(...).train()` gives the result dictionary. The model ends with its best weights."""

    def __init__(
        self,
        args,
        session: Session,
        model: nn.Module,
        objective: Objective,
        data,
        evaluate: Callable[[], dict[str, float]],
        export: Callable[[Path], None],
        folder: Path,
        *,
        metric: str,
        mode: str,
        files: list[Path],
        inputs: dict[str, str] | None = None,
        free: set[str] = frozenset(),
        micro_batches_matter: bool = False,
        evaluate_first: bool = False,
    ):
        """`data` has `plan(...)`, `collate(numbers)` and a length (dataloaders.Data). `export(folder)` writes the model for use.

        `metric` of `evaluate()` decides what is best, by `mode` min or max. `files` and `inputs` (name: sha256) are what the
        run depends on; `free` names the script's flags that do not change the training. `micro_batches_matter`: the loss of an
        example depends on its micro-batch (in-batch negatives). `evaluate_first`: also before the first update, which can be the best.
        """
        self.args, self.session, self.objective, self.data = args, session, objective, data
        self.evaluate, self.export, self.metric, self.mode = evaluate, export, metric, mode
        self.model = model.to(session.device)
        self.state = State(evaluation_due=evaluate_first)
        self._best_before = 0  # best_step when the checkpoint before was written
        if args.batch_size == "auto":
            self._fit_batch_size(folder)
        flags = vars(args) | {"precision": session.precision, "processes": session.world}
        if not micro_batches_matter:  # only their products do
            flags |= {
                "examples_per_update": args.batch_size * args.accumulate,
                "tokens_per_update": args.batch_tokens * args.accumulate,
            }
            free = free | {"batch_size", "batch_tokens", "accumulate", "effective_batch"}
        # by place in the workdir: a moved or differently spelled workdir is the same run
        inputs = {os.path.relpath(f, args.workdir): sha256(f) for f in files} | (inputs or {})
        self.run = runs.Run(folder, flags, free=FREE | free, inputs=inputs, main=session.main)

    # ------------------------------------------------------------------------------------------- setting up

    def plan(self, epoch: int) -> list[list[int]]:
        """The steps of an epoch: what all micro-batches and processes of a step hold together."""
        together = self.args.accumulate * self.session.world
        return self.data.plan(
            self.args.batch_size * together, self.args.batch_tokens * together, self.args.seed, epoch
        )

    def _fit_batch_size(self, folder: Path) -> None:
        """--batch-size auto: the most examples that fit at their longest; accumulation keeps the stage's usual batch an update."""
        args, session = self.args, self.session
        if (
            folder / "args.json"
        ).exists() and not args.overwrite:  # a run that goes on keeps what it found, to the bit
            saved = read_json(folder / "args.json")["args"]
            args.batch_size, args.accumulate = saved["batch_size"], saved["accumulate"]
            return
        if session.world > 1:
            raise UserError(
                "--batch-size auto: find it with one process, then give --batch-size and --accumulate to torchrun"
            )
        numbers = range(len(self.data))
        longest = [
            sorted(numbers, key=lambda i: -of[i]) for of in (self.data.lengths, self.data.targets) if of
        ]

        def try_out(size: int) -> int:
            self.model.train().zero_grad(set_to_none=True)
            states = [
                torch.empty_like(p) for p in self.model.parameters() if p.requires_grad for _ in range(2)
            ]  # AdamW's
            for chosen in [
                order[:size] for order in longest
            ] * 2:  # the second time beside gradients, as in accumulation
                with session.autocast():
                    terms = self.objective.terms(self.model, session.move(self.data.collate(chosen)))
                sum(t.float() for t in terms.values()).backward()
            del states
            return size

        with own_random_stream(args.seed):
            args.batch_size = largest_that_fits(args.effective_batch, try_out)
        self.model.zero_grad(set_to_none=True)
        args.accumulate = args.effective_batch // args.batch_size
        session.say(f"--batch-size auto: {args.batch_size} x {args.accumulate} micro-batches fit")

    def _prepare(self) -> None:
        args = self.args
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, args.weight_decay),
            lr=args.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=self.session.device.type == "cuda",
        )
        self.wrapped = self.session.accelerator.prepare_model(self.model)  # DDP under torchrun
        self.total_steps = self._count_steps()
        self.scheduler = get_scheduler(
            "constant_with_warmup" if args.schedule == "constant" else args.schedule,
            self.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=self.total_steps,
        )
        set_seed((args.seed * 1009 + self.session.rank + 1) % 2**31)  # every process its own dropout

    def _count_steps(self) -> int:
        steps = 0
        for epoch in range(self.args.epochs):
            steps += len(self.plan(epoch))
            if self.args.max_steps and steps >= self.args.max_steps:
                return self.args.max_steps
        return steps

    def _save(self) -> None:
        state = self.state
        random_states = self.session.gather([random_state()])

        def write(folder: Path) -> None:
            save_model(self.model, str(folder / "model.safetensors"))
            parts = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "random": random_states,
            }
            torch.save(parts, folder / "state.pt")
            write_json(folder / "state.json", vars(state))
            write_json(folder / "args.json", {"args": self.run.args, "inputs": self.run.inputs})

        if self.session.main:
            sync(self.run.folder / "metrics.jsonl")
            # the checkpoint before this one is kept too, and so the best that it knows
            runs.write_checkpoint(
                self.run.checkpoints, state.step, write, keep={state.best_step, self._best_before}
            )
        self._best_before = state.best_step
        # torchrun ends all processes when one ends: none leaves before the checkpoint stands
        self.session.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path) -> None:
        self._load_weights(checkpoint)
        try:
            stored = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # whatever it is: not what this loop writes
            raise UserError(
                f"{checkpoint / 'state.pt'}: not plain tensors and values, so it is not loaded ({str(error)[:200]})"
            ) from error
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        self.state = State(**read_json(checkpoint / "state.json"))
        self._best_before = self.state.best_step
        if self.state.best is not None:
            self._check_best()  # now, and not after the hours that are left
        set_random_state(stored["random"][self.session.rank])
        if self.session.main:
            self.run.go_on(self.state.step, self.state.evaluation_due, str(self.session.device))

    def _best(self) -> Path:
        return self.run.checkpoints / f"step-{self.state.best_step:07d}"

    def _check_best(self) -> None:
        if problems := runs.faults(self._best()):
            raise UserError(
                f"{self._best()}: the best checkpoint so far is damaged ({'; '.join(problems)}), and the run would end without it; "
                f"--overwrite begins anew, another --name leaves this as it is"
            )

    def _load_weights(self, checkpoint: Path) -> None:
        try:
            load_model(self.model, str(checkpoint / "model.safetensors"), strict=True)
        except RuntimeError as error:
            raise UserError(f"{checkpoint}: its weights do not fit this model ({error})") from error

    # ---------------------------------------------------------------------------------------------- one step

    def _parts(self, step: list[int]) -> list[tuple[list[int], float]]:
        """This process's micro-batches of a step with their weight: 0 for a stand-in where there are too few examples.

        Dealt out one by one, so that lengths (a step is sorted by them) come out even.
        """
        pieces = self.args.accumulate * self.session.world
        dealt = [(step[i::pieces], 1.0) if i < len(step) else (step[:1], 0.0) for i in range(pieces)]
        mine = dealt[self.session.rank :: self.session.world]
        return [d for d in mine if d[1]] if self.session.world == 1 else mine

    def _step(self, numbers: list[int]) -> dict[str, float]:
        """One update. Raises before it where the loss or the gradient is not finite."""
        weights, session = self.objective.weights, self.session
        parts = [
            (self.data.collate(chosen) | {"stand_in": not weight}, weight)
            for chosen, weight in self._parts(numbers)
        ]
        counted = [self.objective.units(batch) for batch, _ in parts]
        units = session.sum(
            [sum(c[k] * w for c, (_, w) in zip(counted, parts, strict=True)) for k in weights]
        )
        units = dict(zip(weights, units, strict=True))
        self.wrapped.train()
        sums = torch.zeros(len(parts), len(weights), device=session.device)
        for i, (batch, weight) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.wrapped):
                with session.autocast():
                    terms = self.objective.terms(self.wrapped, session.move(batch))
                # DDP averages over processes, the formula sums: hence the factor `world`
                loss = sum(
                    weights[k] * weight * session.world * terms[k].float() / (units[k] or 1) for k in weights
                )
                loss.backward()
            sums[i] = torch.stack([terms[k].detach().float() * weight for k in weights])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self._assert_finite(sums, norm, parts)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        *totals, self._stop = session.sum([*sums.sum(0).tolist(), float(self._signals.number)])
        values = {k: t / (units[k] or 1) for k, t in zip(weights, totals, strict=True)}
        return {"loss": sum(weights[k] * v for k, v in values.items()), **values, "grad_norm": float(norm)}

    def _assert_finite(self, sums: Tensor, norm: Tensor, parts: list) -> None:
        bad = 1.0 - float(torch.isfinite(sums).all() & torch.isfinite(norm))
        if not self.session.sum([bad])[0]:
            return
        names = list(self.objective.weights)
        found = [
            f"{names[k]} on {', '.join(parts[i][0].get('ids', []))[:300]}"
            for i, k in (~torch.isfinite(sums)).nonzero().tolist()
        ]
        here = ", ".join(n for b, _ in parts for n in b.get("ids", []))
        found, everywhere = self.session.gather(found), self.session.gather([here])
        where = "; ".join(found) or f"gradient (norm {float(norm)}) on {', '.join(everywhere)[:300]}"
        raise UserError(
            f"step {self.state.step + 1}: not finite: {where}. No update was made; the last checkpoint in {self.run.checkpoints} "
            "is good. A lower --lr, more --warmup-steps or a --clip usually help."
        )

    # ------------------------------------------------------------------------------------------------ the run

    def _open(self) -> tuple[str, Path | None]:
        """`Run.open` by the main process alone; all others hear its answer, or its refusal."""
        answer: list = [None]
        if self.session.main:
            try:
                answer = [self.run.open(self.args.resume, self.args.overwrite)]
            except UserError as error:
                answer = [error]
        if self.session.world > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def train(self) -> dict:
        """The result's figures; `finish` makes it the run's. Where training ends early, the folder's lock is let go."""
        try:
            return self._train()
        except BaseException as error:
            self.run.close()
            if isinstance(error, OSError | SafetensorError):
                where = f"the last checkpoint in {self.run.checkpoints} is good"
                raise UserError(
                    f"{self.run.folder}: stopped by a failed write or read ({error}); {where}"
                ) from error
            raise

    def _train(self) -> dict:
        args, session, run = self.args, self.session, self.run
        status, checkpoint = self._open()
        if status == "finished":
            run.close()
            result = read_json(run.folder / "result.json")
            session.say(
                f"{run.folder}: this run is already finished ({self.metric} {result.get(self.metric)}); --overwrite makes it anew"
            )
            return {**result, "already_finished": True}
        self._prepare()
        if checkpoint:
            self._load(checkpoint)
            session.say(f"resuming from {checkpoint} (step {self.state.step})")
        elif session.main:
            run.begin(str(session.device))
        trainable, frozen = count_parameters(self.model)
        session.say(
            f"run: {run.folder} | device: {session.device} x{session.world}, {session.precision} | parameters: {trainable:,} trainable, {frozen:,} frozen\n"
            f"data: {len(self.data):,} examples | {args.batch_size} x {args.accumulate} micro-batches x {session.world} processes a step"
            f" | {self.total_steps:,} steps in at most {args.epochs} epochs"
        )
        self._board = SummaryWriter(str(run.folder), purge_step=self.state.step + 1) if session.main else None
        try:
            with Signals() as self._signals:
                self._epochs()
            return self._finish()
        finally:
            if self._board:
                self._board.close()

    def finish(self, result: dict) -> None:
        """Write the card and result.json, which marks the run as finished, and let go of its lock."""
        if self.session.main:
            share(self.run.folder)
            for file in self.run.folder.rglob("*"):  # all of it stands before the mark does
                if file.is_file() and self.run.checkpoints not in file.parents:
                    sync(file)
            runs.write_card(self.run.folder, result)
            write_json(self.run.folder / "result.json", result)
        self.run.close()

    def _epochs(self) -> None:
        args, state, session = self.args, self.state, self.session
        self._clock = time.monotonic() - state.seconds
        if state.evaluation_due:
            self._evaluate()
        while state.epoch < args.epochs and state.step < self.total_steps and not self._out_of_patience():
            steps = self.plan(state.epoch)
            bar = tqdm(
                total=len(steps),
                initial=state.position,
                desc=f"epoch {state.epoch + 1}",
                disable=None if session.main else True,
                leave=False,
            )
            while (
                state.position < len(steps) and state.step < self.total_steps and not self._out_of_patience()
            ):
                with memory_advice(f"step {state.step + 1}", args):
                    values = self._step(steps[state.position])
                state.step += 1
                state.position += 1
                state.seconds = time.monotonic() - self._clock
                bar.update()
                self._log(values)
                at_end = state.position == len(steps) or state.step == self.total_steps
                if (
                    (state.step % args.eval_every == 0 or state.step == self.total_steps)
                    if args.eval_every
                    else at_end
                ):
                    state.evaluation_due = True
                if self._stop:
                    self._leave()
                if state.evaluation_due:
                    self._save()  # an evaluation can be long, and run out of memory
                    self._evaluate()
                elif args.save_every and state.step % args.save_every == 0:
                    self._save()
            bar.close()
            if state.position == len(steps):
                state.epoch, state.position = state.epoch + 1, 0

    def _out_of_patience(self) -> bool:
        return bool(self.args.patience) and self.state.since_best >= self.args.patience

    def _leave(self, save: bool = True) -> None:
        """Save at this step's end and go, by the shell's convention 128 + signal."""
        if save:
            self._save()
        self.session.say(
            f"stopped at step {self.state.step}; this goes on from here: {runs.command_line(again=True)}"
        )
        raise SystemExit(128 + (self._signals.number or signal.SIGTERM))

    def _log(self, values: dict[str, float]) -> None:
        state = self.state
        window = state.window or dict.fromkeys(values, 0.0)
        state.window = {k: window[k] + v for k, v in values.items()}
        state.window_steps += 1
        if state.step % self.args.log_every and state.step != self.total_steps:
            return
        means = {k: v / state.window_steps for k, v in state.window.items()}
        state.window, state.window_steps = None, 0
        rate = self.scheduler.get_last_lr()[0]
        self._record("train", {**means, "lr": rate})
        eta = state.seconds / state.step * (self.total_steps - state.step)
        terms = " | ".join(f"{k} {v:.4f}" for k, v in means.items())
        self.session.say(
            f"step {state.step:>6}/{self.total_steps} | {terms} | lr {rate:.2e} | {state.seconds:.0f} s, {eta:.0f} s to go"
        )

    def _record(self, kind: str, values: dict[str, float]) -> None:
        self.run.log({"step": self.state.step, "epoch": self.state.epoch, "kind": kind, **values})
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def measure(self) -> dict[str, float]:
        """The stage's own evaluation, without dropout and gradient; the training's random streams stay where they were."""
        self.model.eval()
        with own_random_stream(self.args.seed), torch.no_grad(), memory_advice("evaluation", self.args):
            return self.evaluate()

    def _evaluate(self) -> None:
        """Measure, remember the best, save."""
        state, began = self.state, time.monotonic()
        values = self.measure()
        state.evaluation_due = False
        state.evaluations += 1
        value = values[self.metric]
        sign = 1 if self.mode == "max" else -1
        better = math.isfinite(value) and (state.best is None or sign * value > sign * state.best)
        if better:
            state.best, state.best_step, state.since_best = value, state.step, 0
        else:
            state.since_best += 1
        self._record("valid", values)
        shown = " | ".join(f"{k} {v:.4f}" for k, v in values.items())
        self.session.say(
            f"step {state.step:>6} | valid: {shown}{' | best so far' if better else ''} | {time.monotonic() - began:.0f} s"
        )
        self._clock = time.monotonic() - state.seconds
        self._save()
        if self.session.sum([float(self._signals.number)])[0]:
            self._leave(save=False)

    def _finish(self) -> dict:
        state, run = self.state, self.run
        if state.best is None:
            raise UserError(
                f"{run.folder}: {self.metric} was not finite in any of {state.evaluations} evaluations, so there is no best model; "
                "try a lower --lr, or --precision fp32"
            )
        self._check_best()
        self._load_weights(self._best())
        self.model.eval()
        if self.session.main:
            self.export(run.folder)
        result = {
            self.metric: state.best,
            "best_step": state.best_step,
            "steps": state.step,
            "evaluations": state.evaluations,
            "seconds": round(state.seconds, 1),
        }
        if self.session.device.type == "cuda":
            result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.session.say(
            f"best {self.metric}: {state.best:.4f} at step {state.best_step} of {state.step} | {state.seconds:.0f} s | {run.folder}"
        )
        return result
