"""The run folder: its lock, its log, and checkpoints that are written whole, checked, and never lost.

A checkpoint is written beside its target, listed in a sha256 manifest, synced, and renamed once; older ones go only
after the new one stands. Everything in it is safetensors, plain tensors (`weights_only=True`) or JSON: no pickle.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from options import UserError
from storage import locked, read_json, sha256, sync, write_json, write_text

MANIFEST = "manifest.json"
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


# ------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], keep: set[int] = frozenset(), last: int = 2
) -> Path:
    """Let `write(temporary folder)` fill a checkpoint, check it in as step-N, then drop all but the `last` and `keep`."""
    target = folder / f"step-{step:07d}"
    part = folder / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        part.mkdir(parents=True)
        write(part)
        files = sorted(p for p in part.iterdir() if p.is_file())
        for file in files:
            sync(file)
        listing = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        write_json(part / MANIFEST, {"step": step, "files": listing})
        sync(part)
        before = target.with_name(f".old-{target.name}")
        if target.exists():  # this step again, with what an evaluation has found since
            target.rename(before)
        part.rename(target)
        sync(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (
        UserError,
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # a full disk is a RuntimeError in torch.save
        raise UserError(
            f"{target}: cannot be written ({error}); the checkpoints before it are untouched"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-last]:
        if int(old.name.split("-")[1]) not in keep:
            shutil.rmtree(old, ignore_errors=True)
    return target


def set_aside(checkpoint: Path, why: str) -> Path:
    """Keep a checkpoint under a name that no run goes on from."""
    return checkpoint.rename(checkpoint.with_name(f"{why}-{checkpoint.name}-{uuid.uuid4().hex[:6]}"))


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: an empty list where every file is there with its sha256."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} missing or unreadable ({error})"]
    found = []
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if Path(name).name != name or not file.is_file():
            found.append(f"{name} missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size:,} bytes, expected {size:,}")
        elif sha256(file) != digest:
            found.append(f"{name} does not match its sha256")
    return found


def sweep(folder: Path) -> None:
    """Clear away what killed saves have left."""
    for leftover in folder.glob(".tmp-step-*"):  # a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for old in folder.glob(".old-step-*"):  # a replacement that was killed between its two renames
        target = folder / old.name.removeprefix(".old-")
        shutil.rmtree(old, ignore_errors=True) if target.exists() else old.rename(target)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that passes its check, None where there never was one; damaged ones are named and set aside."""
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        problems = faults(checkpoint)
        if not problems:
            return checkpoint
        aside = set_aside(checkpoint, "damaged")
        print(
            f"warning: checkpoint {checkpoint} is damaged ({'; '.join(problems)}); set aside as {aside.name}, trying the one before"
        )
    if any(folder.glob("damaged-*")):
        raise UserError(
            f"{folder}: no good checkpoint is left; --overwrite begins anew, another --name leaves this as it is"
        )
    return None


# -------------------------------------------------------------------------------------------------------- run folder


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def command_line(again: bool = False) -> str:
    """This process's command as one would type it; `again`: to go on with the run, without what would begin it elsewhere or anew."""
    words = [w for w in sys.orig_argv[1:] if w != "-u"]  # torchrun's
    if again:
        words = [
            w
            for i, w in enumerate(words)
            if w != "--overwrite" and not w.startswith("--resume") and words[i - 1] != "--resume"
        ]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={processes}"] if processes else ["python"]
    return shlex.join([*launcher, *words])


def environment(device: str) -> dict:
    """Where and with what a run was made."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
        commit += " with uncommitted changes" if dirty else ""
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "command": command_line(),
        "commit": commit,
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Run:
    """One folder, complete in itself: weights, config, tokenizer, args.json, metrics.jsonl, checkpoints/.

    `args`: every flag as plain JSON values; `free`: the names of those that do not change the mathematics.
    `inputs`: sha256 of every file the run reads. Raises `UserError` where the folder belongs to something else.
    """

    def __init__(
        self, folder: Path, args: dict, *, free: set[str], inputs: dict[str, str], main: bool = True
    ):
        self.folder, self.free, self.main = Path(folder), free, main
        self.args, self.inputs = json.loads(json.dumps(args, default=str)), inputs
        self.checkpoints = self.folder / "checkpoints"
        self._lock = contextlib.ExitStack()

    def open(self, resume: str, overwrite: bool) -> tuple[str, Path | None]:
        """("new", None), ("resume", checkpoint) or ("finished", None)."""
        self._lock.enter_context(
            locked(self.folder, "another process is training there; wait for it or choose another --name")
        )
        sweep(self.checkpoints)
        for part in self.folder.glob(
            ".*.part"
        ):  # of a write that was killed; the lock says that nobody is at it
            part.unlink()
        known = (self.folder / "args.json").exists()
        if not known and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: not empty and not a run folder (no args.json), so it is left alone; choose another --name"
            )
        if overwrite and resume == "auto" and known:
            # not finished from the first deletion on, a run folder up to the last: a kill in between leaves no riddle
            order = {"result.json": 0, "checkpoints": 1, "args.json": 3}
            for old in sorted(self.folder.iterdir(), key=lambda p: order.get(p.name, 2)):
                if old.name != ".lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            known = False
        if resume not in ("auto", "never"):
            checkpoint = Path(resume)
            if checkpoint.is_dir() and checkpoint.resolve().parent != self.checkpoints.resolve():
                raise UserError(
                    f"--resume {resume}: not a checkpoint of this run ({self.checkpoints}); set --name to the run it belongs to"
                )
            problems = faults(checkpoint) if checkpoint.is_dir() else ["no such folder"]
            if problems:
                raise UserError(f"--resume {resume}: {'; '.join(problems)}")
            self.compare(checkpoint)
            return "resume", checkpoint
        if known:
            if resume == "never":
                raise UserError(
                    f"{self.folder}: there already; use --resume auto to go on, --overwrite to begin anew, or another --name"
                )
            if (self.folder / "result.json").exists():
                self.compare(None)
                return "finished", None
            checkpoint = newest_good(self.checkpoints)
            if checkpoint:
                self.compare(checkpoint)
                return "resume", checkpoint
            print(f"note: {self.folder}: no checkpoint was written yet; the run begins at its beginning")
        return "new", None

    def begin(self, device: str) -> None:
        write_json(
            self.folder / "args.json", {"args": self.args, "inputs": self.inputs}
        )  # first: makes this a run folder
        write_json(self.folder / "environment.json", environment(device))
        write_text(self.folder / "metrics.jsonl", "")

    def go_on(self, step: int, evaluation_due: bool, device: str) -> None:
        """Take up the log at `step`, and note where and with what the rest is made.

        What came after `step` (with --resume CHECKPOINT) is no longer this run's future; it is kept, out of the way.
        """
        (self.folder / "result.json").unlink(missing_ok=True)
        for later in sorted(self.checkpoints.glob("step-*")):
            if int(later.name.split("-")[1]) > step:
                aside = set_aside(later, "later")
                print(
                    f"note: {later} comes after the step that the run goes on from; set aside as {aside.name}"
                )
        self.rewind(step, evaluation_due)
        file = self.folder / "environment.json"
        made = read_json(file)
        before, now = made.get("versions", {}), package_versions()
        for name in sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k)):
            print(
                f"note: {name} was {before.get(name)}, is now {now.get(name)}: the rest may differ in the last digits"
            )
        resumed = {"step": step, **environment(device)}
        write_json(file, made | {"resumed": [*made.get("resumed", []), resumed]})

    def compare(self, checkpoint: Path | None) -> None:
        """Refuse a resume whose mathematics differ from the saved run's; list the other differences."""
        saved = read_json((checkpoint or self.folder) / "args.json")
        before, now = saved.get("args", {}), self.args
        changed = {
            k: (before.get(k), now.get(k))
            for k in sorted(before.keys() | now.keys())
            if before.get(k) != now.get(k)
        }
        refused = [
            f"--{k.replace('_', '-')}: {a!r} then, {b!r} now"
            for k, (a, b) in changed.items()
            if k not in self.free
        ]
        for name in sorted(saved.get("inputs", {}).keys() | self.inputs.keys()):
            if saved.get("inputs", {}).get(name) != self.inputs.get(name):
                refused.append(f"{name}: its content has changed")
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

    def logged(self, kind: str) -> list[dict]:
        """What `log` has kept of one kind (train, valid), without step and epoch."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [
            {k: v for k, v in row.items() if k not in ("step", "epoch", "kind")}
            for row in rows
            if row["kind"] == kind
        ]

    def rewind(self, step: int, evaluation_due: bool) -> None:
        """Drop what was logged after `step`, so that the log of a resumed run is the log of an uninterrupted one.

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


def write_card(folder: Path, result: dict) -> None:
    """README.md of a finished run: what it is, how it was made, what it scored, what it is not for."""
    made = read_json(folder / "environment.json")
    figures = pd.json_normalize(result, sep=", ").iloc[0].to_dict()
    rows = [
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in figures.items()
    ]
    resumed = f"; resumed {len(made['resumed'])} times" if "resumed" in made else ""
    inputs = [
        f"- `{name}` sha256 `{digest[:16]}`"
        for name, digest in read_json(folder / "args.json")["inputs"].items()
    ]
    parts = [
        f"# {folder.parent.name}/{folder.name}",
        f"Made by `{made['command']}` at commit {made['commit']} on {made['device']} ({made['platform']}), {made['started']}{resumed}. "
        "All flags: args.json. Versions: environment.json. Every logged figure: metrics.jsonl.",
        "## Figures\n\n| | |\n|---|---|\n" + "\n".join(rows),
        "## Made from\n\n" + "\n".join(inputs),
        "## Limits\n\nResearch code for empathetic replies in small talk. Not a counsellor, and not for people in distress. Weights trained on "
        "EmpatheticDialogues fall under its CC BY-NC 4.0, those trained on Empathy Mental Health under its academic, non-commercial terms.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def require_run(folder: Path, made_by: str) -> dict:
    """The args.json of a finished run, or an error that names the command that makes or finishes one."""
    if not (Path(folder) / "args.json").exists():
        raise UserError(f"{folder}: not a run folder (no args.json); make it with: {made_by}")
    if not (Path(folder) / "result.json").exists():
        raise UserError(
            f"{folder}: this run is not finished; the command that began it goes on with it: {made_by}"
        )
    return read_json(Path(folder) / "args.json")["args"]
