"""The run folder: its lock, its log, what it was made of, and which of its checkpoints it goes on from."""

import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import advice
import checkpoints
from options import HERE, Paths, UserError
from storage import locked, read_if_there, read_json, sweep_parts, write_json, write_text

#: what a run can begin from or learn from without its flag being compared, by the first word of that input's
#: name
ADDED = {"init": "--init-from", "teacher": "--teacher"}

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "scikit-learn",
    "faiss-gpu",
    "faiss-cpu",
)


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def command_line(again: bool = False) -> str:
    """This process's command as one would type it.

    `again`: to go on with the run, without what would begin it elsewhere or anew.
    """
    words = [w for w in sys.orig_argv[1:] if w != "-u"]  # torchrun's
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={processes}"] if processes else ["python"]
    words = [*launcher, *words]
    return shlex.join(advice.without_anew(words) if again else words)


def typed(flag: str) -> bool:
    """Whether this process's command gives a flag (`warmup_steps`)."""
    given = f"--{flag.replace('_', '-')}"
    no = f"--no-{given[2:]}"
    return any(word in (given, no) or word.startswith(f"{given}=") for word in sys.orig_argv)


def signals_to_stop() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and the end of the terminal, unless nohup has it ignored."""
    heeded = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * heeded]


def commit() -> str:
    """Of this code, and whether it has been changed since."""
    git = ["git", "-C", str(HERE)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found + " with uncommitted changes" * bool(dirty)


def environment(device: str) -> dict:
    """Where and with what a run was made."""
    return {
        "command": command_line(),
        "commit": commit(),
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def made_by() -> str:
    """The last line of a table's foot."""
    return f"Commit {commit()}; `{command_line()}`."


#: entries of args.json that no flag gives by itself
OTHERWISE_CALLED = {
    "processes": "torchrun --nproc-per-node",
    "examples_per_update": "--batch-size x --accumulate",
    "tokens_per_update": "--batch-tokens x --accumulate",
}


def flag_of(name: str) -> str:
    """The flag of an entry of args.json."""
    return OTHERWISE_CALLED.get(name, f"--{name.replace('_', '-')}")


class Run:
    """One folder, complete in itself: weights, config, tokenizer, args.json, metrics.jsonl, checkpoints/.

    `args`: every flag as plain JSON values; `free`: the names of those that do not change the mathematics.
    `inputs`: sha256 of every file the run reads; where some of them lie, `sources` say ({name: {path,
    sha256}}, see `sources`). `order`: fingerprint of the first epoch's batches, for another version of this
    code may make others. Raises `UserError` where the folder belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        args: dict,
        *,
        free: set[str],
        inputs: dict[str, str],
        order: str = "",
        sources: dict[str, dict[str, str]] | None = None,
        main: bool = True,
    ):
        self.folder, self.free, self.main = Path(folder), free, main
        self.args, self.inputs = json.loads(json.dumps(args, default=str)), inputs
        self.order, self.sources = order, sources or {}
        self.checkpoints = self.folder / "checkpoints"
        self._lock = contextlib.ExitStack()

    def open(self, resume: str, overwrite: bool) -> tuple[str, Path | None]:
        """("new", None), ("resume", checkpoint) or ("finished", None).

        All that can refuse is read first: a call that is refused leaves the folder as it was.
        """
        busy = "another process is training there; wait for it or choose another --name"
        alone = self._lock.enter_context(locked(self.folder, busy))
        try:
            return self._open(resume, overwrite, alone)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read or written ({error})") from error

    def _open(self, resume: str, overwrite: bool, alone: bool) -> tuple[str, Path | None]:
        known = self._known()
        if known:
            self._refuse_itself()
        self._sweep(alone)
        if resume not in ("auto", "never"):
            return "resume", self._asked_for(resume)
        if known and overwrite or self._half_cleared.exists():
            self._clear()
            return "new", None
        if not known:
            return "new", None
        if resume == "never":
            raise UserError(
                f"{self.folder}: there already; use --resume auto to go on, --overwrite to begin anew, "
                "or another --name"
            )
        if (self.folder / "result.json").exists():
            self.compare(None)
            return "finished", None
        checkpoint = checkpoints.newest_good(self.checkpoints, accept=self.compare)
        if checkpoint:
            return "resume", checkpoint
        self._refuse_finished_weights()
        print(f"note: {self.folder}: no checkpoint was written yet; the run begins at its beginning")
        return "new", None

    def _refuse_itself(self) -> None:
        """Raises `UserError` for a run made from what lies in its own folder, whose place it would take."""
        here, workdir = self.folder.resolve(), Paths(self.args.get("workdir") or ".")
        for name, entry in self.sources.items():
            if workdir.find(entry["path"]).resolve().is_relative_to(here):
                raise UserError(
                    f"{self.folder}: it would be made from itself ({name}), whose place it takes; give the "
                    "new run another --name"
                )

    def _known(self) -> bool:
        """Whether this is a run's folder; a stranger's is refused."""
        if (self.folder / "args.json").exists():
            return True
        there = list(checkpoints.steps(self.checkpoints).values())
        others = [p for p in self.folder.iterdir() if not p.name.startswith(".")]
        if not others or others == [self.checkpoints] and not there:  # a link to where there is room, say
            return False
        remedy = "choose another --name"
        if there:
            remedy += f", or copy {there[-1] / 'args.json'} there if it is this run's"
        raise UserError(
            f"{self.folder}: not empty and not a run folder (no args.json), so it is left alone; {remedy}"
        )

    def _sweep(self, alone: bool) -> None:
        """Clear away what killed writes have left: all of it, where the lock says that nobody is at it."""
        checkpoints.sweep(self.checkpoints, alone)
        sweep_parts(self.folder, everything=alone)

    @property
    def _half_cleared(self) -> Path:
        """Stands while `--overwrite` deletes; where that was killed halfway, the next call does the rest."""
        return self.folder / ".overwriting"

    def _clear(self) -> None:
        """Delete the run, its mark of being finished first and what makes it a run's folder last."""
        order = {"result.json": 0, "checkpoints": 1, "args.json": 3}
        entries = sorted(self.folder.iterdir(), key=lambda p: order.get(p.name, 2))
        self._half_cleared.touch()
        for old in entries:
            try:
                if old.name in (".lock", self._half_cleared.name):
                    continue
                if old == self.checkpoints and old.is_symlink() and old.is_dir():
                    self._clear_behind_link()
                elif old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink()
            except OSError as error:
                raise UserError(
                    f"{old}: cannot be removed ({error}); remove it by hand, then the same command again"
                ) from error
        self._half_cleared.unlink()

    def _clear_behind_link(self) -> None:
        """`checkpoints` as a link says where there is room, so it stays; what a run has put there goes."""
        for kind in ("", ".tmp-", ".old-", ".gone-", "later-", "damaged-"):
            for old in checkpoints.named(self.checkpoints, kind):
                shutil.rmtree(old)

    def _asked_for(self, resume: str) -> Path:
        """The checkpoint of --resume CHECKPOINT, or why it cannot be gone on from."""
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise UserError(f"--resume {resume}: no such folder; {self._what_is_there()}")
        if checkpoint.resolve().parent != self.checkpoints.resolve():
            raise UserError(
                f"--resume {resume}: not a checkpoint of this run ({self.checkpoints}); "
                "set --name to the run it belongs to"
            )
        if problems := checkpoints.faults(checkpoint):
            raise UserError(f"--resume {resume}: {'; '.join(problems)}")
        self.compare(checkpoint)
        self._half_cleared.unlink(missing_ok=True)  # what is left of it is wanted after all
        return checkpoints.bring_back(checkpoint) if checkpoint.name.startswith("later-") else checkpoint

    def _what_is_there(self) -> str:
        later = checkpoints.named(self.checkpoints, "later-")
        if there := [*checkpoints.steps(self.checkpoints).values(), *later]:
            return f"there are {', '.join(map(str, there))}"
        if (self.folder / "result.json").exists():
            return (
                f"{self.folder} is finished, and a finished run keeps its weights and no checkpoints; "
                "--overwrite begins anew, another --name leaves it as it is"
            )
        return f"{self.checkpoints} holds no checkpoint"

    def _refuse_finished_weights(self) -> None:
        """Weights without result.json and without a checkpoint: somebody has taken those two away."""
        weights = [w for w in self.folder.rglob("*.safetensors") if self.checkpoints not in w.parents]
        if weights:
            raise UserError(
                f"{min(weights)}: trained weights, but {self.folder} has neither result.json nor a "
                "checkpoint to go on from; bring one back, choose another --name, or --overwrite deletes them"
            )

    def begin(self, device: str) -> None:
        # first: makes this a run folder
        write_json(self.folder / "args.json", self.recorded)
        write_json(self.folder / "sources.json", self.sources)
        write_json(self.folder / "environment.json", environment(device))
        write_text(self.folder / "metrics.jsonl", "")

    def go_on(self, step: int, evaluation_due: bool, device: str) -> None:
        """Take up the log at `step`, and note where and with what the rest is made.

        What came after `step` (with --resume CHECKPOINT) is no longer this run's future; it is kept, out of
        the way.
        """
        file = self.folder / "environment.json"
        made = read_if_there(file)  # before anything is changed
        if not made:
            print(f"note: {file}: gone; with what the run was begun is no longer known")
        (self.folder / "result.json").unlink(missing_ok=True)
        write_json(self.folder / "sources.json", self.sources)  # the same content, perhaps at other places
        for number, later in checkpoints.steps(self.checkpoints).items():
            if number > step:
                aside = checkpoints.set_aside(later, "later")
                print(
                    f"note: {later} comes after the step that the run goes on from; set aside as {aside.name}"
                )
        self.rewind(step, evaluation_due)
        before, now = made.get("versions", {}), package_versions()
        for name in sorted(k for k in before.keys() | now.keys() if before and before.get(k) != now.get(k)):
            print(
                f"note: {name} was {before.get(name)}, is now {now.get(name)}: "
                "the rest may differ in the last digits"
            )
        resumed = {"step": step, **environment(device)}
        write_json(file, made | {"resumed": [*made.get("resumed", []), resumed]})

    @property
    def recorded(self) -> dict[str, Any]:
        """What a later call is compared with, as args.json holds it."""
        return {"args": self.args, "inputs": self.inputs, "order": self.order}

    def compare(self, checkpoint: Path | None) -> None:
        """Refuse a resume whose mathematics differ from the saved run's; list the other differences."""
        saved = read_json((checkpoint or self.folder) / "args.json")
        before, now = saved.get("args", {}), self.args
        # the code of then had no such flag: where none is given now, it goes on as it would have then
        for k in sorted(k for k in now.keys() - before.keys() - self.free if not typed(k)):
            print(f"note: --{k.replace('_', '-')}: not recorded when the run began, so it is not compared")
            before = before | {k: now[k]}
        names = sorted(before.keys() | now.keys())
        changed = {k: (before.get(k), now.get(k)) for k in names if before.get(k) != now.get(k)}
        refused = [
            f"{flag_of(k)}: {a!r} then, {b!r} now" for k, (a, b) in changed.items() if k not in self.free
        ]
        known = saved.get("inputs", {})
        for name in sorted(known.keys() | self.inputs.keys()):
            first = name.split()[0]
            less = "not" if name == first else "fewer"
            if first in ADDED and name not in known:
                refused.append(f"{ADDED[first]}: {less} given then")
            elif name not in self.inputs:
                refused.append(f"{ADDED.get(first, name)}: {less if first in ADDED else 'not'} given now")
            elif name not in known:
                print(f"note: {name}: not recorded when the run began, so it is not compared")
            elif known[name] != self.inputs.get(name):
                refused.append(f"{name}: its content has changed")
        if checkpoint and not refused and saved.get("order") != self.order:
            unsaid = "order" not in saved
            refused.append(
                "earlier code did not note in which order its examples came: it cannot go on"
                if unsaid
                else "the examples came in another order then, by another version of this code"
            )
        if refused:
            raise UserError(
                f"{self.folder}: was begun with other settings:\n  "
                + "\n  ".join(refused)
                + "\nUse the old ones, another --name, or --overwrite."
            )
        for k, (a, b) in changed.items():
            if k in self.free:
                print(f"note: --{k.replace('_', '-')} was {a!r}, is now {b!r}")

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def log(self, row: dict) -> None:
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row, allow_nan=True) + "\n")

    def logged(self, kind: str, step: int | None = None) -> list[dict]:
        """What `log` has kept of one kind (train, valid), without step and epoch; of one `step`, or all."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [
            {k: v for k, v in row.items() if k not in ("step", "epoch", "kind")}
            for row in rows
            if row["kind"] == kind and step in (None, row["step"])
        ]

    def rewind(self, step: int, evaluation_due: bool) -> None:
        """Drop what was logged after `step`: the log of a resumed run is that of an uninterrupted one.

        `evaluation_due`: an evaluation at `step` itself is yet to come.
        """
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if (
                    row["step"] < step
                    or row["step"] == step
                    and not (evaluation_due and row["kind"] == "valid")
                ):
                    kept.append(line)
        write_text(file, "".join(f"{line}\n" for line in kept))


@dataclass(frozen=True)
class Source:
    """Something that a run was made from."""

    path: Path  # where it lies, if it has not been moved
    sha256: str  # of the file, of a model's weights, or of all model files of a folder to begin from


def sources(folder: Path, paths: Paths) -> dict[str, Source]:
    """{name: what a run's folder says that it was made from}, such as `critic emo`, `exemplars train`, `pool`
    (the dialogues whose replies are candidates) and `question encoder`; empty for a run that does not say."""
    noted = read_if_there(Path(folder) / "sources.json")
    return {name: Source(paths.find(entry["path"]), entry["sha256"]) for name, entry in noted.items()}


def with_own_exemplars(paths: Paths, folder: Path) -> Paths:
    """The same places with the exemplars that a run was trained with, where it reads any."""
    made_from = sources(folder, paths)
    if "exemplars train" in made_from:
        return paths.with_exemplars(made_from["exemplars train"].path.parent)
    trained = read_if_there(Path(folder) / "args.json").get("args", {})
    reads = trained.get("add_exemplars") != "none"
    return paths.with_exemplars(trained["exemplars"]) if trained.get("exemplars") and reads else paths


def model_in(folder: Path) -> str | None:
    """What kind of model a folder holds (Critic, Generator ...), by its config.json. Raises `UserError` where
    that cannot be read."""
    found = read_if_there(Path(folder) / "config.json").get("model")
    return found if isinstance(found, str) else None


def is_published(folder: Path) -> bool:
    """Whether a folder holds a model without the notes of its training, as the bundled ones and the hub's."""
    weights = ("model.safetensors", "adapter_config.json")
    return not (folder / "args.json").exists() and any((folder / name).exists() for name in weights)


def require_run(folder: Path, remedy: str) -> dict:
    """The args.json of a finished run. `remedy`: for the error where the folder is no run's."""
    folder = Path(folder)
    if not (folder / "args.json").exists():
        raise UserError(f"{folder}: not a run folder (no args.json); {remedy}")
    if not (folder / "result.json").exists():
        began = read_if_there(folder / "environment.json").get("command")
        raise UserError(
            f"{folder}: this run is not finished; the command that began it goes on with it"
            + (f": {shlex.join(advice.without_anew(shlex.split(began)))}" if isinstance(began, str) else "")
        )
    return read_json(folder / "args.json")["args"]
