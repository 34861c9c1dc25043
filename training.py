"""The training loop of every stage. Knows neither empathy nor exemplars.

A stage hands over a model, its data and an `Objective`: named loss terms, each a sum over its own unit (tokens or
examples). The loop divides each by that unit's count in the whole step, over micro-batches and processes:

    loss = sum_k weight_k * (sum of term k over the step) / (units of term k in the step)

so 8x1, 4x2 and 2x4 micro-batches, or two processes, give one and the same gradient.
"""

import contextlib
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import runs
from options import UserError

#: flags that change neither the updates nor which of them is kept
FREE = {"workdir", "overwrite", "device", "resume", "log_every", "save_every", "name", "deterministic"}


class Session:
    """Where the numbers are computed: device, precision, and the processes that share the work (`torchrun`)."""

    def __init__(self, args):
        disable_progress_bar()  # of loading and saving weights; ours stay
        set_verbosity_error()  # its load reports: what matters in them is checked where weights are loaded
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device that torch can use; use --device auto or cpu")
        if getattr(args, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA starts
            torch.use_deterministic_algorithms(True)
        self.accelerator = Accelerator(cpu=args.device == "cpu" or not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0
        precision = args.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        self.precision = precision
        set_seed(args.seed)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def move(self, batch):
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        return {k: self.move(v) for k, v in batch.items()} if isinstance(batch, dict) else batch

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the processes."""
        if self.world == 1:
            return values
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, items: list) -> list:
        """The items of all processes, one process after the other."""
        return gather_object(items) if self.world > 1 else items

    def gather_rows(self, vectors: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, int]:
        """Rows (N, E) with gradient, and a number for each, of all processes; and how many stand before one's own."""
        from torch.distributed.nn.functional import all_gather

        sizes = self.accelerator.gather(torch.tensor([len(vectors)], device=self.device)).tolist()
        short = max(sizes) - len(vectors)
        padded = all_gather(nn.functional.pad(vectors, (0, 0, 0, short)))
        all_numbers = self.accelerator.gather(nn.functional.pad(numbers, (0, short))).view(self.world, -1)
        kept = [(rows[:n], ids[:n]) for rows, ids, n in zip(padded, all_numbers, sizes, strict=True)]
        return torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept]), sum(sizes[: self.rank])

    def over(self, batches: list, title: str) -> Iterator:
        """This process's share of `batches`, with a progress bar."""
        return iter(tqdm(batches[self.rank :: self.world], desc=title, disable=None if self.main else True, leave=False))

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)


@dataclass
class Objective:
    """`units(batch)`: how many units each term sums over; `terms(model, batch)`: each term's sum, with gradient."""

    weights: dict[str, float]
    units: Callable[[dict], dict[str, float]]
    terms: Callable[[nn.Module, dict], dict[str, Tensor]]


class Signals:
    """SIGTERM and SIGINT set a flag that the loop reads at a step's end; a second signal exits at once."""

    def __enter__(self):
        self.number = 0
        self._old = {}
        with contextlib.suppress(ValueError):  # not the main thread: leave the handlers alone
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._set)
        return self

    def _set(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        print("\nsignal received: finishing this step, then saving (again to exit at once)", file=sys.stderr, flush=True)

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def random_state() -> dict:
    """All random streams as plain values and tensors, fit for `torch.load(weights_only=True)`."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def own_random_stream(*seed: int):
    """Draw from a stream of one's own, and leave the training's dropout stream where it was."""
    before = random_state()
    set_seed(sum(seed) % 2**31)
    try:
        yield
    finally:
        set_random_state(before)


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
    ):
        """`data` has `plan(...)`, `collate(numbers)` and a length (dataloaders.Data). `export(folder)` writes the model for use.

        `metric` of `evaluate()` decides what is best, by `mode` min or max. `files` and `inputs` (name: sha256) are what the
        run depends on; `free` names the script's flags that do not change the training. `micro_batches_matter`: the loss of an
        example depends on its micro-batch (in-batch negatives).
        """
        self.args, self.session, self.objective, self.data = args, session, objective, data
        self.evaluate, self.export, self.metric, self.mode = evaluate, export, metric, mode
        self.model = model.to(session.device)
        self.state = State()
        if args.batch_size == "auto":
            self._fit_batch_size(folder)
        flags = vars(args) | {"precision": session.precision, "processes": session.world}
        if not micro_batches_matter:  # only their product does
            flags["examples_per_update"] = args.batch_size * args.accumulate
            free = free | {"batch_size", "accumulate", "effective_batch"}
        # by place in the workdir: a moved or differently spelled workdir is the same run
        inputs = {os.path.relpath(f, args.workdir): runs.sha256(f) for f in files} | (inputs or {})
        self.run = runs.Run(folder, flags, free=FREE | free, inputs=inputs, main=session.main)

    # ------------------------------------------------------------------------------------------- setting up

    def plan(self, epoch: int) -> list[list[int]]:
        """The steps of an epoch: what all micro-batches and processes of a step hold together."""
        together = self.args.accumulate * self.session.world
        return self.data.plan(self.args.batch_size * together, self.args.batch_tokens * together, self.args.seed, epoch)

    def _fit_batch_size(self, folder: Path) -> None:
        """--batch-size auto: the most examples whose longest batch fits; accumulation keeps the stage's usual batch an update."""
        args = self.args
        if (folder / "args.json").exists() and not args.overwrite:  # a run that goes on keeps what it found
            saved = runs.read_json(folder / "args.json")["args"]
            args.batch_size, args.accumulate = saved["batch_size"], saved["accumulate"]
            return
        if self.session.world > 1:
            raise UserError("--batch-size auto: find it with one process, then give --batch-size and --accumulate to torchrun")
        longest = sorted(range(len(self.data)), key=lambda i: -self.data.lengths[i])
        size = args.effective_batch
        while not self._fits(longest[:size]):
            if size == 1:
                raise UserError("--batch-size auto: not even one example fits; shorter sequences or a smaller model are needed")
            size = max(n for n in range(1, size) if args.effective_batch % n == 0)
        args.batch_size, args.accumulate = size, args.effective_batch // size
        self.session.say(f"--batch-size auto: {args.batch_size} x {args.accumulate} micro-batches fit")

    def _fits(self, numbers: list[int]) -> bool:
        """Whether a forward and a backward pass over `numbers` fit in memory beside AdamW's two states."""
        self.model.train()
        try:
            states = [torch.empty_like(p) for p in self.model.parameters() if p.requires_grad for _ in range(2)]
            with self.session.autocast():
                terms = self.objective.terms(self.model, self.session.move(self.data.collate(numbers)))
            sum(t.float() for t in terms.values()).backward()
            del states
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            if self.session.device.type == "cuda":
                torch.cuda.empty_cache()

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
        steps = args.max_steps if args.schedule == "constant" and args.max_steps else sum(len(self.plan(e)) for e in range(args.epochs))
        self.total_steps = min(steps, args.max_steps or steps)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if args.schedule == "constant" else args.schedule,
            self.optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=self.total_steps,
        )  # fmt: skip
        set_seed((args.seed * 1009 + self.session.rank + 1) % 2**31)  # every process its own dropout

    def _save(self) -> Path | None:
        random_states = self.session.gather([random_state()])
        if not self.session.main:
            return None

        def write(folder: Path) -> None:
            save_model(self.model, str(folder / "model.safetensors"))
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(), "random": random_states}
            torch.save(state, folder / "state.pt")
            runs.write_json(folder / "state.json", vars(self.state))
            runs.write_json(folder / "args.json", {"args": self.run.args, "inputs": self.run.inputs})

        return runs.write_checkpoint(self.run.checkpoints, self.state.step, write, keep={self.state.best_step})

    def _load(self, checkpoint: Path) -> None:
        self._load_weights(checkpoint)
        stored = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        self.state = State(**runs.read_json(checkpoint / "state.json"))
        set_random_state(stored["random"][self.session.rank])
        if self.session.main:
            self.run.rewind(self.state.step)

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
        parts = [(self.data.collate(chosen), weight) for chosen, weight in self._parts(numbers)]
        counted = [self.objective.units(batch) for batch, _ in parts]
        units = session.sum([sum(c[k] * w for c, (_, w) in zip(counted, parts, strict=True)) for k in weights])
        units = dict(zip(weights, units, strict=True))
        self.wrapped.train()
        sums = torch.zeros(len(parts), len(weights), device=session.device)
        for i, (batch, weight) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else session.accelerator.no_sync(self.wrapped):
                with session.autocast():
                    terms = self.objective.terms(self.wrapped, session.move(batch))
                # DDP averages over processes, the formula sums: hence the factor `world`
                loss = sum(weights[k] * weight * session.world * terms[k].float() / max(units[k], 1) for k in weights)
                loss.backward()
            sums[i] = torch.stack([terms[k].detach().float() * weight for k in weights])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self._assert_finite(sums, norm, parts)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        *totals, self._stop = session.sum([*sums.sum(0).tolist(), float(self._signals.number)])
        values = {k: t / max(units[k], 1) for k, t in zip(weights, totals, strict=True)}
        return {"loss": sum(weights[k] * v for k, v in values.items()), **values, "grad_norm": float(norm)}

    @contextlib.contextmanager
    def _memory_advice(self, where: str):
        """Running out of memory names the flag to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            size, count = self.args.batch_size, self.args.accumulate
            less = max(n for n in range(1, max(size, 2)) if size % n == 0)
            advice = (
                f"--batch-size {less} --accumulate {size * count // less}, as many examples an update" if size > 1 else "shorter sequences"
            )
            raise UserError(
                f"{where}: out of memory with --batch-size {size} --accumulate {count}; try {advice}, or --batch-size auto "
                f"({str(error).splitlines()[0][:120]})"
            ) from error

    def _assert_finite(self, sums: Tensor, norm: Tensor, parts: list) -> None:
        bad = 1.0 - float(torch.isfinite(sums).all() & torch.isfinite(norm))
        if not self.session.sum([bad])[0]:
            return
        names = list(self.objective.weights)
        found = [f"{names[k]} on {', '.join(parts[i][0].get('ids', []))[:300]}" for i, k in (~torch.isfinite(sums)).nonzero().tolist()]
        where = "; ".join(found) or f"gradient (norm {float(norm)}) on {', '.join(n for b, _ in parts for n in b.get('ids', []))[:300]}"
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
        args, session, run = self.args, self.session, self.run
        status, checkpoint = self._open()
        if status == "finished":
            run.close()
            result = runs.read_json(run.folder / "result.json")
            session.say(f"{run.folder}: this run is already finished ({self.metric} {result.get(self.metric)}); --overwrite makes it anew")
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
                result = self._finish()
        except OSError as error:
            run.close()
            raise UserError(f"{run.folder}: cannot be written ({error}); the last checkpoint in {run.checkpoints} is good") from error
        except BaseException:
            run.close()
            raise
        finally:
            if self._board:
                self._board.close()
        return result

    def finish(self, result: dict) -> None:
        """Write the card and result.json, which marks the run as finished, and let go of its lock."""
        if self.session.main:
            runs.write_card(self.run.folder, result)
            runs.write_json(self.run.folder / "result.json", result)
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
            while state.position < len(steps) and state.step < self.total_steps and not self._out_of_patience():
                with self._memory_advice(f"step {state.step + 1}"):
                    values = self._step(steps[state.position])
                state.step += 1
                state.position += 1
                state.seconds = time.monotonic() - self._clock
                bar.update()
                self._log(values)
                at_end = state.position == len(steps) or state.step == self.total_steps
                if (state.step % args.eval_every == 0 or state.step == self.total_steps) if args.eval_every else at_end:
                    state.evaluation_due = True
                if self._stop:
                    self._leave()
                if state.evaluation_due:
                    self._evaluate()
                    if session.sum([float(self._signals.number)])[0]:
                        self._leave(save=False)  # the evaluation has just saved
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
        number = self._signals.number or signal.SIGTERM
        words = [w for w in sys.orig_argv[1:] if w != "--overwrite"]
        self.session.say(f"stopped at step {self.state.step}; this goes on from here: {shlex.join(['python', *words])}")
        raise SystemExit(128 + number)

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
        self.session.say(f"step {state.step:>6}/{self.total_steps} | {terms} | lr {rate:.2e} | {state.seconds:.0f} s, {eta:.0f} s to go")

    def _record(self, kind: str, values: dict[str, float]) -> None:
        self.run.log({"step": self.state.step, "epoch": self.state.epoch, "kind": kind, **values})
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def measure(self) -> dict[str, float]:
        """The stage's own evaluation, without dropout and gradient; the training's random streams stay where they were."""
        self.model.eval()
        with own_random_stream(self.args.seed), torch.no_grad(), self._memory_advice("evaluation"):
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
        self.session.say(f"step {state.step:>6} | valid: {shown}{' | best so far' if better else ''} | {time.monotonic() - began:.0f} s")
        self._clock = time.monotonic() - state.seconds
        if better and self.session.main:
            self.export(self.run.folder)
        self._save()

    def _finish(self) -> dict:
        state, run = self.state, self.run
        if state.best is None:
            raise UserError(
                f"{run.folder}: {self.metric} was not finite in any of {state.evaluations} evaluations, so there is no best model; "
                "try a lower --lr, or --precision fp32"
            )
        best = run.checkpoints / f"step-{state.best_step:07d}"
        if problems := runs.faults(best):
            raise UserError(f"{best}: the best checkpoint is damaged ({'; '.join(problems)}); remove {run.folder} or use --overwrite")
        self._load_weights(best)
        self.model.eval()
        if self.session.main:
            self.export(run.folder)
        result = {self.metric: state.best, "best_step": state.best_step, "steps": state.step, "evaluations": state.evaluations,
                  "seconds": round(state.seconds, 1)}  # fmt: skip
        if self.session.device.type == "cuda":
            result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.session.say(
            f"best {self.metric}: {state.best:.4f} at step {state.best_step} of {state.step} | {state.seconds:.0f} s | {run.folder}"
        )
        return result
