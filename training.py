"""The time of a run: epochs, evaluations, log lines, checkpoints, the end. Knows neither empathy nor
exemplars.

A stage hands over a model, its data and an `Objective` (updates.py); what one update does stands there, what
a run folder holds in runs.py. A run that is killed anywhere and started again ends bit for bit as one that
was not.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cards
import checkpoints
import runs
from options import Paths, UserError
from quick import quicken
from session import (
    Session,
    Signals,
    fits,
    memory_advice,
    memory_note,
    own_random_stream,
    random_state,
    set_random_state,
)
from settings import FREE, TrainingOptions
from storage import fingerprint, load_weights, read_json, save_weights, share, sync, write_json
from updates import NotFinite, Objective, Update, count_parameters, fit_batch_size, placed

#: how far a saved model's answer may be from the trained one's, of the largest number in it (and of 1):
#: more than two orders of summing differ by, and far less than two models do
SAME = 1e-3


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
    """One training run: `Loop(...).train()` gives the result dictionary. The model ends with its best
    weights."""

    def __init__(
        self,
        options: TrainingOptions,
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
        flags: dict,
        inputs: dict[str, str],
        sources: dict[str, dict[str, str]] | None = None,
        free: set[str] | frozenset[str] = frozenset(),
        reload: Callable[[Path], nn.Module] | None = None,
        probe: Callable[[nn.Module], Tensor] | None = None,
        same: float = SAME,
        micro_batches_matter: bool = False,
        evaluate_first: bool = False,
    ):
        """`data`: dataloaders.Data.

        `export(folder)` writes the model for use. `metric` of `evaluate()` decides what is best, by `mode`
        min or max. `reload(folder)` loads what was exported, and `probe(model)` is an answer of it (any
        shape): both must agree, within `same`, before the run counts as finished. `flags` are the command's,
        for the record and for comparison on resume; `free` names those of the stage that do not change the
        training.
        `inputs` (name: sha256) is what the run depends on, `sources` (name: its path and sha256) where a
        later command finds it. `micro_batches_matter`: the loss of an example depends on its micro-batch
        (in-batch negatives). `evaluate_first`: also before the first update, which can be the best.
        """
        self.options, self.session, self.objective, self.data = options, session, objective, data
        self.evaluate, self.export, self.metric, self.mode = evaluate, export, metric, mode
        self.reload, self.probe, self.same = reload, probe, same
        with fits("the model"):
            self.model = placed(model, session)
        self.state = State(evaluation_due=evaluate_first)
        self._best_before = 0  # best_step when the checkpoint before was written
        self._stored = -1  # the step whose weights, optimizer and random streams stand in its checkpoint
        self._crowded = False  # said of the memory
        self._micro_batches_matter = micro_batches_matter
        if options.batch_size == "auto":
            saved = folder / "args.json"
            if saved.exists() and not options.overwrite:  # a run that goes on keeps what it found, to the bit
                found = {name: read_json(saved)["args"][name] for name in ("batch_size", "accumulate")}
                options = replace(options, **found)
            else:
                options = fit_batch_size(model, objective, data, options, session)
            self.options = options
        flags = flags | {"batch_size": options.batch_size, "accumulate": options.accumulate}
        flags |= {"precision": session.precision, "processes": session.world}
        if not micro_batches_matter:  # only their products do
            flags["examples_per_update"] = self.batch_size * options.accumulate
            flags["tokens_per_update"] = options.batch_tokens * options.accumulate
            free = free | {"batch_size", "batch_tokens", "accumulate", "effective_batch"}
        self.run = runs.Run(
            folder,
            flags,
            free=FREE | free,
            inputs=inputs,
            order=fingerprint(str(self.plan(0))),
            sources=sources,
            main=session.main,
        )

    # --------------------------------------------------------------------------------------------- setting up

    @property
    def batch_size(self) -> int:
        return int(self.options.batch_size)

    def plan(self, epoch: int) -> list[list[int]]:
        """The updates of an epoch, each the numbers of all its examples, over micro-batches and processes."""
        together = self.options.accumulate * self.session.world
        return self.data.plan(
            self.batch_size * together, self.options.batch_tokens * together, self.options.seed, epoch
        )

    def _prepare(self) -> None:
        self.total_steps = self._count_steps()
        warmup, lr = self.options.warmup_steps, self.options.lr
        if warmup >= self.total_steps > 0:
            self.session.say(
                f"WARNING: --warmup-steps {warmup}: the run has {self.total_steps} updates, so its rate "
                f"never reaches --lr {lr:g}; give fewer, a tenth of them say"
            )
        cache = Paths(self.run.args["workdir"]).cache
        self.update = Update(
            self.model, self.objective, self.data, self.options, self.session, self.total_steps, cache
        )

    def _count_steps(self) -> int:
        steps = 0
        for epoch in range(self.options.epochs):
            steps += len(self.plan(epoch))
            if self.options.max_steps and steps >= self.options.max_steps:
                return self.options.max_steps
        return steps

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        """A checkpoint of this step; where one stands that an evaluation came after, only what that has
        changed."""
        state = self.state
        update = self._stored == state.step
        random_states = None if update else self.session.gather([random_state()])

        def write(folder: Path) -> None:
            write_json(folder / "state.json", vars(state))
            write_json(folder / "args.json", self.run.recorded)
            if update:
                return
            save_weights(self.model, folder / "model.safetensors")
            parts = {
                "optimizer": self.update.optimizer.state_dict(),
                "scheduler": self.update.scheduler.state_dict(),
                "random": random_states,
            }
            torch.save(parts, folder / "state.pt")

        if self.session.main:
            sync(self.run.folder / "metrics.jsonl")
            # the checkpoint before this one is kept too, and so the best that it knows
            kept = {state.best_step, self._best_before}
            checkpoints.write_checkpoint(self.run.checkpoints, state.step, write, kept, update=update)
        self._best_before, self._stored = state.best_step, state.step
        # torchrun ends all processes when one ends: none leaves before the checkpoint stands
        self.session.wait()

    def _load(self, checkpoint: Path) -> None:
        self._load_weights(checkpoint)
        file = checkpoint / "state.pt"
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever it is: not what this loop writes
            raise UserError(
                f"{file}: not plain tensors and values, so it is not loaded ({str(error)[:200]})"
            ) from error
        self.update.optimizer.load_state_dict(stored["optimizer"])
        self.update.scheduler.load_state_dict(stored["scheduler"])
        self.state = State(**read_json(checkpoint / "state.json"))
        self._best_before = self.state.best_step
        if checkpoint.name == f"step-{self.state.step:07d}":  # not one that was set aside
            self._stored = self.state.step
        if self.state.best is not None:
            self._check_best()  # now, and not after the hours that are left
        set_random_state(stored["random"][self.session.rank])
        if self.session.main:
            self.run.go_on(self.state.step, self.state.evaluation_due, str(self.session.device))

    def _best(self) -> Path:
        return self.run.checkpoints / f"step-{self.state.best_step:07d}"

    def _check_best(self) -> None:
        if problems := checkpoints.faults(self._best()):
            raise UserError(
                f"{self._best()}: the best checkpoint so far is damaged ({'; '.join(problems)}), and the "
                "run would end without it; --overwrite begins anew, another --name leaves this as it is"
            )

    def _load_weights(self, checkpoint: Path) -> None:
        try:
            load_weights(self.model, checkpoint / "model.safetensors")
        except RuntimeError as error:
            raise UserError(f"{checkpoint}: its weights do not fit this model ({error})") from error

    # ------------------------------------------------------------------------------------------------ the run

    def _open(self) -> tuple[str, Path | None]:
        """`Run.open` by the main process alone; all others hear its answer, or its refusal."""
        answer: list = [None]
        if self.session.main:
            try:
                answer = [self.run.open(self.options.resume, self.options.overwrite)]
            except UserError as error:
                answer = [error]
        if self.session.world > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def train(self) -> dict:
        """The result's figures; `finish` makes it the run's. Where training ends early, the folder's lock is
        let go."""
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
        session, run = self.session, self.run
        # the folder decides what this call is: a new run, the rest of one, or nothing to do
        status, checkpoint = self._open()
        if status == "finished":
            run.close()
            result = read_json(run.folder / "result.json")
            session.say(
                f"{run.folder}: this run is already finished ({self.metric} {result.get(self.metric)}); "
                "--overwrite makes it anew"
            )
            return {**result, "already_finished": True}
        # the optimizer first: a checkpoint is loaded into it
        self._prepare()
        if checkpoint:
            self._load(checkpoint)
            session.say(f"resuming from {checkpoint} (step {self.state.step})")
        elif session.main:
            run.begin(str(session.device))
        self._say_what_is_trained()
        self._board = SummaryWriter(str(run.folder), purge_step=self.state.step + 1) if session.main else None
        try:
            with Signals() as self._signals:
                self._epochs()
            return self._finish()
        finally:
            if self._board:
                self._board.close()

    def _say_what_is_trained(self) -> None:
        options, session = self.options, self.session
        trainable, frozen = count_parameters(self.model)
        session.say(
            f"run: {self.run.folder} | device: {session.device} x{session.world}, {session.precision} | "
            f"parameters: {trainable:,} trained / {trainable + frozen:,} total\n"
            f"data: {len(self.data):,} examples | "
            f"{options.batch_size} x {options.accumulate} micro-batches x {session.world} processes a step "
            f"| {self.total_steps:,} steps in at most {options.epochs} epochs"
        )

    def _epochs(self) -> None:
        state = self.state
        self._clock = time.monotonic() - state.seconds
        if state.evaluation_due:  # before the first update, or where a kill came inside an evaluation
            self._evaluate()
        while state.epoch < self.options.epochs and not self._at_end():
            self._epoch(self.plan(state.epoch))

    def _epoch(self, steps: list[list[int]]) -> None:
        """The rest of an epoch, from where the state stands."""
        state = self.state
        hidden = None if self.session.main else True
        with tqdm(
            total=len(steps),
            initial=state.position,
            desc=f"epoch {state.epoch + 1}",
            disable=hidden,
            leave=False,
        ) as bar:
            while state.position < len(steps) and not self._at_end():
                self.update.following = steps[state.position + 1] if state.position + 1 < len(steps) else []
                values = self._update(steps[state.position])
                # from here on the update counts: whatever follows is saved with it
                state.step += 1
                state.position += 1
                state.seconds = time.monotonic() - self._clock
                bar.update()
                self._log(values)
                # noted before it is done, so that a run that is killed in it evaluates when it goes on
                state.evaluation_due = self._evaluation_is_due(state.position == len(steps))
                # every process learns of a signal that any of them got, and all stop at this same step
                if self.session.sum([float(self._signals.number)])[0]:
                    self._leave()
                if state.evaluation_due:
                    self._save()  # an evaluation can be long, and run out of memory
                    self._evaluate()
                elif self.options.save_every and state.step % self.options.save_every == 0:
                    self._save()
        # an epoch that a limit has cut short is not over: a longer run would finish it
        if state.position == len(steps):
            state.epoch, state.position = state.epoch + 1, 0

    def _update(self, numbers: list[int]) -> dict[str, float]:
        step = self.state.step + 1
        try:
            with memory_advice(f"step {step}", self.options, self._micro_batches_matter):
                return self.update(numbers)
        except NotFinite as error:
            raise UserError(
                f"step {step}: not finite: {error}. No update was made; the last checkpoint in "
                f"{self.run.checkpoints} is good. A lower --lr, more --warmup-steps or a --clip usually help."
            ) from None

    def _at_end(self) -> bool:
        """All steps are done, or patience has run out."""
        patience = self.options.patience
        return self.state.step >= self.total_steps or bool(patience and self.state.since_best >= patience)

    def _evaluation_is_due(self, epoch_ends: bool) -> bool:
        last = self.state.step == self.total_steps
        every = self.options.eval_every
        return last or (self.state.step % every == 0 if every else epoch_ends)

    def _leave(self, save: bool = True) -> None:
        """Save at this step's end and go, by the shell's convention 128 + signal."""
        if save:
            self._save()
        self.session.say(
            f"stopped at step {self.state.step}; this goes on from here: {runs.command_line(again=True)}"
        )
        raise SystemExit(128 + (self._signals.number or signal.SIGTERM))

    # ------------------------------------------------------------------------------------- log and evaluation

    def _log(self, values: dict[str, float]) -> None:
        """Add to the window's sums; every `log_every` steps their means become a line and a row."""
        state, options = self.state, self.options
        window = state.window or dict.fromkeys(values, 0.0)
        state.window = {k: window[k] + v for k, v in values.items()}
        state.window_steps += 1
        if state.step % options.log_every and state.step != self.total_steps:
            return
        means = {k: v / state.window_steps for k, v in state.window.items()}
        state.window, state.window_steps = None, 0
        rate = self.update.scheduler.get_last_lr()[0]
        self._record("train", {**means, "lr": rate})
        left = state.seconds / state.step * (self.total_steps - state.step)
        terms = " | ".join(f"{k} {v:.4f}" for k, v in means.items())
        self.session.say(
            f"step {state.step:>6}/{self.total_steps} | {terms} | lr {rate:.2e} | "
            f"{state.seconds:.0f} s, {left:.0f} s to go"
        )
        self.session.release_gaps()
        if not self._crowded and (note := memory_note(self.session, options, self._micro_batches_matter)):
            self._crowded = True
            self.session.say(note)

    def _record(self, kind: str, values: dict[str, float]) -> None:
        self.run.log({"step": self.state.step, "epoch": self.state.epoch, "kind": kind, **values})
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def measure(self) -> dict[str, float]:
        """The stage's own evaluation, without dropout and gradient; the training's random streams stay as
        they were."""
        self.model.eval()
        advice = memory_advice("evaluation", self.options, self._micro_batches_matter)
        with own_random_stream(self.options.seed), torch.no_grad(), advice:
            return self.evaluate()

    def _evaluate(self) -> None:
        """Measure, remember the best, save."""
        state, began = self.state, time.monotonic()
        values = self.measure()
        state.evaluation_due = False
        state.evaluations += 1
        # a NaN is never the best, also where it comes first
        value = values[self.metric]
        sign = 1 if self.mode == "max" else -1
        better = math.isfinite(value) and (state.best is None or sign * value > sign * state.best)
        if better:
            state.best, state.best_step, state.since_best = value, state.step, 0
        else:
            state.since_best += 1
        self._record("valid", values)
        shown = " | ".join(f"{k} {v:.4f}" for k, v in values.items())
        best = " | best so far" if better else ""
        self.session.say(f"step {state.step:>6} | valid: {shown}{best} | {time.monotonic() - began:.0f} s")
        self._clock = time.monotonic() - state.seconds  # evaluations are no training time
        self._save()
        if self.session.sum([float(self._signals.number)])[0]:
            self._leave(save=False)

    # ------------------------------------------------------------------------------------------------ the end

    def _finish(self) -> dict:
        state, run = self.state, self.run
        if state.best is None:
            raise UserError(
                f"{run.folder}: {self.metric} was not finite in any of {state.evaluations} evaluations, so "
                "there is no best model; try a lower --lr, or --precision fp32"
            )
        # the weights at the end are those of the last update; the run's are those of its best evaluation
        self._check_best()
        self._load_weights(self._best())
        self.model.eval()
        if self.session.main:
            self.export(run.folder)
            self._check_export()
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
            f"best {self.metric}: {state.best:.4f} at step {state.best_step} of {state.step} | "
            f"{state.seconds:.0f} s | {run.folder}"
        )
        return result

    def _check_export(self) -> None:
        """What was written is loaded as any user would, and answers as the trained model does."""
        if self.reload is None or self.probe is None:
            return
        folder, remedy = self.run.folder, f"the checkpoints in {self.run.checkpoints} are kept"
        with own_random_stream(self.options.seed), torch.no_grad(), self.session.autocast():
            trained = self.probe(self.model).float()
            self.make_room()
            try:
                loaded = placed(self.reload(folder), self.session).eval()
                # as the trained one was: same products, same rounding
                quicken(loaded, self.session.device, self.options.compile)
            except UserError as error:
                raise UserError(
                    f"{folder}: what was saved cannot be loaded again ({error}); {remedy}"
                ) from error
            found = self.probe(loaded).float()
            del loaded
            self.model.to(self.session.device)
        scale = max(1.0, float(trained.abs().max()))
        apart = float("inf") if found.shape != trained.shape else float((found - trained).abs().max())
        if not apart <= self.same * scale:  # nor where it is no number
            raise UserError(
                f"{folder}: what was saved answers otherwise than the trained model (by {apart:.3g}); "
                f"{remedy}"
            )

    def make_room(self) -> None:
        """Take the trained model, and what its optimizer held, off the device: another one comes there."""
        self.model.zero_grad(set_to_none=True)
        self.update.optimizer.state.clear()
        self.model.cpu()
        if self.session.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self, result: dict) -> None:
        """Write the card and result.json, which marks the run as finished; let go of checkpoints and lock."""
        if self.session.main:
            share(self.run.folder)
            for file in self.run.folder.rglob("*"):  # all of it stands before the mark does
                if file.is_file() and self.run.checkpoints not in file.parents:
                    sync(file)
            cards.write_card(self.run.folder, result)
            for left in self.run.folder.glob(".partial-*"):  # predictions with other flags or weights
                shutil.rmtree(left, ignore_errors=True)
            write_json(self.run.folder / "result.json", result)
            checkpoints.drop_checkpoints(self.run.checkpoints)  # a resume needs them until the mark stands
        self.run.close()
