"""The run folder: its lock, its log, and checkpoints that are written whole, checked, and never lost.

A checkpoint is written beside its target, listed in a sha256 manifest, synced, and renamed once; older ones go only
after the new one stands. Everything in it is safetensors, plain tensors (`weights_only=True`) or JSON: no pickle.
"""

import contextlib
import csv
import datetime
import fcntl
import hashlib
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

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from tqdm import tqdm

from options import UserError

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pandas", "scikit-learn", "faiss-gpu", "faiss-cpu")


# ------------------------------------------------------------------------------------------------------ safe writing


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename that follows cannot outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path):
    """Write `path` by way of a temporary file beside it: it is there whole, or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def write_csv(path: Path, table: pd.DataFrame, sep: str = ",") -> None:
    """A csv with a header, whole or not at all; with sep="\\t" nothing is quoted (the predictions' format)."""
    quoting = csv.QUOTE_NONE if sep == "\t" else csv.QUOTE_MINIMAL
    if sep != "\t" and any(isinstance(v, str) and "\r" in v for c in table for v in table[c]):
        quoting = csv.QUOTE_NONNUMERIC  # before Python 3.13 a bare \r is not quoted otherwise, and ends the row
    with whole_file(path) as part:
        table.to_csv(part, index=False, sep=sep, quoting=quoting, lineterminator="\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """A JSON object from a file, or an error that names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def origin_file(path: Path) -> Path:
    """The note beside an output that says what made it."""
    return Path(path).with_name(f"{Path(path).name}.origin.json")


def ready(path: Path, origin: dict, overwrite: bool) -> bool:
    """True where `path` was already made from exactly `origin`; an output of other origin is never replaced silently."""
    path, origin = Path(path), json.loads(json.dumps(origin, default=str))
    if not path.exists() or overwrite:
        return False
    before = read_json(origin_file(path)) if origin_file(path).exists() else {}
    if before == origin:
        print(f"{path}: already made from the same inputs, kept")
        return True
    changed = sorted(k for k in before.keys() | origin.keys() if before.get(k) != origin.get(k))
    raise UserError(f"{path}: already there, made with another {', '.join(changed)}; add --overwrite to replace it")


def warn_if_stale(path: Path, sources: dict[str, Path]) -> list[str]:
    """Say where `path` was made from an older `{name: file}` than is there now; returns those names."""
    note = origin_file(path)
    made_of = read_json(note) if note.exists() else {}
    old = []
    for name, file in sources.items():
        entry = made_of.get(name)
        recorded = entry.get("sha256") if isinstance(entry, dict) else entry
        if recorded and file.exists() and sha256(file) != recorded:
            old.append(name)
    if old:
        print(f"warning: {path} was made from another {', '.join(old)} than is there now; make it again (--overwrite) to be sure")
    return old


def in_chunks(batches: list, work: Callable[[list], dict[str, np.ndarray]], keep: Path | None, title: str, size: int = 8) -> list[dict]:
    """`work(some batches) -> arrays`, for all of them; with `keep`, results so far wait there for an interrupted stage to go on.

    `keep` is named by what the results depend on; the caller removes it when its output is written.
    """
    out = []
    with tqdm(total=len(batches), desc=title, disable=None, leave=False) as bar:
        for number, start in enumerate(range(0, len(batches), size)):
            group, file = batches[start : start + size], keep and keep / f"{number:05d}.npz"
            if file and file.exists():
                with np.load(file, allow_pickle=False) as stored:
                    out.append(dict(stored))
            else:
                out.append(work(group))
                if file:
                    with whole_file(file) as part, open(part, "wb") as handle:
                        np.savez(handle, **out[-1])
            bar.update(len(group))
    return out


# ------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: set[int] = frozenset(), last: int = 2) -> Path:
    """Let `write(temporary folder)` fill a checkpoint, check it in as step-N, then drop all but the `last` and `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:07d}"
    part = folder / f".tmp-step-{step:07d}-{uuid.uuid4().hex[:8]}"
    part.mkdir()
    try:
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
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError in torch.save
        raise UserError(f"{target}: cannot be written ({error}); the checkpoints before it are untouched") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    stand = sorted(folder.glob("step-*"))
    for old in stand[:-last]:
        if old != target and int(old.name.split("-")[1]) not in keep:
            shutil.rmtree(old, ignore_errors=True)
    return target


def set_aside(path: Path) -> Path:
    aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:6]}")
    path.rename(aside)
    return aside


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


def newest_good(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that passes its check; damaged ones are named and set aside."""
    for leftover in folder.glob(".tmp-step-*"):  # a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for old in folder.glob(".old-step-*"):  # a replacement that was killed between its two renames
        target = folder / old.name.removeprefix(".old-")
        shutil.rmtree(old, ignore_errors=True) if target.exists() else old.rename(target)
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        problems = faults(checkpoint)
        if not problems:
            return checkpoint
        aside = set_aside(checkpoint)
        say(f"warning: checkpoint {checkpoint} is damaged ({'; '.join(problems)}); set aside as {aside.name}, trying the one before")
    return None


# -------------------------------------------------------------------------------------------------------- run folder


def environment(device: str) -> dict:
    """Where and with what a run was made."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10).stdout.strip()
        commit += " with uncommitted changes" if dirty else ""
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit,
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Run:
    """One folder, complete in itself: weights, config, tokenizer, args.json, metrics.jsonl, checkpoints/.

    `args`: every flag as plain JSON values; `free`: the names of those that do not change the mathematics.
    `inputs`: sha256 of every file the run reads. Raises `UserError` where the folder belongs to something else.
    """

    def __init__(self, folder: Path, args: dict, *, free: set[str], inputs: dict[str, str], main: bool = True):
        self.folder, self.free, self.main = Path(folder), free, main
        self.args, self.inputs = json.loads(json.dumps(args, default=str)), inputs
        self.checkpoints = self.folder / "checkpoints"
        self._lock = None

    def open(self, resume: str, overwrite: bool) -> tuple[str, Path | None]:
        """("new", None), ("resume", checkpoint) or ("finished", None)."""
        known = (self.folder / "args.json").exists()
        self.lock()
        if overwrite and resume == "auto" and self.folder.exists():
            if any(p for p in self.folder.iterdir() if p.name != ".lock") and not known:
                raise UserError(f"{self.folder}: not a run folder (no args.json), so --overwrite does not empty it; choose another --name")
            for old in self.folder.iterdir():
                if old.name != ".lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            known = False
        strangers = [p.name for p in self.folder.iterdir() if p.name != ".lock"] if self.folder.exists() else []
        if not known and strangers:
            raise UserError(f"{self.folder}: not empty and not a run (no args.json); choose another --name")
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
                raise UserError(f"{self.folder}: there already; use --resume auto to go on, --overwrite to begin anew, or another --name")
            if (self.folder / "result.json").exists():
                self.compare(None)
                return "finished", None
            checkpoint = newest_good(self.checkpoints)
            if checkpoint:
                self.compare(checkpoint)
                return "resume", checkpoint
        return "new", None

    def begin(self, device: str) -> None:
        write_json(self.folder / "environment.json", environment(device))
        write_json(self.folder / "args.json", {"args": self.args, "inputs": self.inputs})
        write_text(self.folder / "metrics.jsonl", "")

    def compare(self, checkpoint: Path | None) -> None:
        """Refuse a resume whose mathematics differ from the saved run's; list the other differences."""
        saved = read_json((checkpoint or self.folder) / "args.json")
        before, now = saved.get("args", {}), self.args
        changed = {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)}
        refused = [f"--{k.replace('_', '-')}: {a!r} then, {b!r} now" for k, (a, b) in changed.items() if k not in self.free]
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

    def lock(self) -> None:
        """Held by the process, not by the file: it goes when the process goes, however that ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115 (held open for as long as the run lasts)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is training there; wait for it or choose another --name") from None

    def close(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def log(self, row: dict) -> None:
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row, allow_nan=True) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, so that the log of a resumed run is the log of an uninterrupted one."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(file, "".join(f"{line}\n" for line in kept))


def write_card(folder: Path, result: dict) -> None:
    """README.md of a finished run: what it is, how it was made, what it scored, what it is not for."""
    made = read_json(folder / "environment.json")
    figures = [(k, v) for k, v in result.items() if not isinstance(v, dict)]
    figures += [(f"{k}, {n}", v) for k, d in result.items() if isinstance(d, dict) for n, v in d.items() if not isinstance(v, dict)]
    figures += [
        (f"{k}, {n}, {m}", v)
        for k, d in result.items()
        if isinstance(d, dict)
        for n, e in d.items()
        if isinstance(e, dict)
        for m, v in e.items()
    ]
    rows = [f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in figures]
    inputs = [f"- `{name}` sha256 `{digest[:16]}`" for name, digest in read_json(folder / "args.json")["inputs"].items()]
    parts = [
        f"# {folder.parent.name}/{folder.name}",
        f"Made by `{made['command']}` at commit {made['commit']} on {made['device']} ({made['platform']}), {made['started']}. "
        "All flags: args.json. Versions: environment.json. Every logged figure: metrics.jsonl.",
        "## Figures\n\n| | |\n|---|---|\n" + "\n".join(rows),
        "## Made from\n\n" + "\n".join(inputs),
        "## Limits\n\nResearch code for empathetic replies in small talk. Not a counsellor, and not for people in distress. Weights trained on "
        "EmpatheticDialogues fall under its CC BY-NC 4.0, those trained on Empathy Mental Health under its academic, non-commercial terms.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def require_run(folder: Path, made_by: str) -> dict:
    """The args.json of a finished or started run, or an error that names the command that makes one."""
    if not (Path(folder) / "args.json").exists():
        raise UserError(f"{folder}: not a run folder (no args.json); make it with: {made_by}")
    return read_json(Path(folder) / "args.json")["args"]
