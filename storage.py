"""Files that are there whole or not at all, notes of what made them, and long stages that go on where they stopped."""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from options import UserError

# ------------------------------------------------------------------------------------------------------ safe writing


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename that follows cannot outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, origin: dict | None = None):
    """Write `path` by way of a temporary file beside it: it is there whole, or as it was before.

    `origin`: what it is made from, noted beside it (`ready`, `warn_if_stale`); the old output goes before the new note
    comes, so that a note never stands beside an output it does not describe.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        if origin is not None:
            path.unlink(missing_ok=True)
            write_json(origin_file(path), origin)
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free space or rights there, then the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str, origin: dict | None = None) -> None:
    with whole_file(path, origin) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def write_csv(path: Path, table: pd.DataFrame, sep: str = ",", origin: dict | None = None) -> None:
    """A csv with a header, whole or not at all; with sep="\\t" nothing is quoted (the predictions' format)."""
    quoting = csv.QUOTE_NONE if sep == "\t" else csv.QUOTE_MINIMAL
    if sep != "\t" and any(isinstance(v, str) and "\r" in v for c in table for v in table[c]):
        quoting = (
            csv.QUOTE_NONNUMERIC
        )  # before Python 3.13 a bare \r is not quoted otherwise, and ends the row
    with whole_file(path, origin) as part:
        table.to_csv(part, index=False, sep=sep, quoting=quoting, lineterminator="\n", encoding="utf-8")


@contextlib.contextmanager
def locked(folder: Path, otherwise: str):
    """Hold `folder` against other processes. Held by the process, not by the file: it goes when the process goes, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {otherwise}") from None
        yield


def share(folder: Path) -> None:
    """safetensors writes for its owner alone; give its files the rights of any other new file."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)


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


def fingerprint(*parts: object) -> str:
    """sha256 over the text of `parts`, for cache names and notes of origin."""
    digest = hashlib.sha256()
    for part in parts:
        for piece in part if isinstance(part, list | tuple) else [part]:
            digest.update(str(piece).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def identity(name: str | Path) -> str:
    """What a model's hub name or folder stands for: the name itself, or the sha256 of the folder's model files."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    files = sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    )
    return fingerprint(*(f"{p.name} {sha256(p)}" for p in files))


def weights_hash(module: nn.Module) -> str:
    """sha256 over a module's tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def require(folder: Path) -> Path:
    """A folder that prepare_data.py makes."""
    if not folder.is_dir():
        workdir = folder.parent.parent
        raise UserError(f"{folder}: no such folder; make it with: python prepare_data.py --workdir {workdir}")
    return folder


def origin_file(path: Path) -> Path:
    """The note beside an output that says what made it."""
    return Path(path).with_name(f"{Path(path).name}.origin.json")


def read_origin(path: Path) -> dict:
    """What the note beside `path` says; empty where there is none."""
    note = origin_file(path)
    return read_json(note) if note.exists() else {}


def ready(path: Path, origin: dict, overwrite: bool) -> bool:
    """True where `path` was already made from exactly `origin`; an output of other origin is never replaced silently."""
    path, origin = Path(path), json.loads(json.dumps(origin, default=str))
    if not path.exists() or overwrite:
        return False
    before = read_origin(path)
    if before == origin:
        print(f"{path}: already made from the same inputs, kept")
        return True
    changed = sorted(k for k in before.keys() | origin.keys() if before.get(k) != origin.get(k))
    raise UserError(
        f"{path}: already there, made with another {', '.join(changed)}; add --overwrite to replace it"
    )


def warn_if_stale(path: Path, sources: dict[str, Path]) -> list[str]:
    """Say where `path` was made from an older `{name: file}` than is there now; returns those names."""
    made_of = read_origin(path)
    old = []
    for name, file in sources.items():
        entry = made_of.get(name)
        recorded = entry.get("sha256") if isinstance(entry, dict) else entry
        if recorded and file.exists() and sha256(file) != recorded:
            old.append(name)
    if old:
        print(
            f"warning: {path} was made from another {', '.join(old)} than is there now; make it again (--overwrite) to be sure"
        )
    return old


def cached(file: Path | None, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`make()`, or what it gave before, from `file`; one that cannot be read is named and made again."""
    if file is None:
        return make()
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as stored:  # a zip: each part has a checksum
                return dict(stored)
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            tqdm.write(f"warning: {file}: cannot be read ({error}); it is made again")
    arrays = make()
    with whole_file(file) as part, open(part, "wb") as handle:
        np.savez(handle, **arrays)
    return arrays


def in_chunks(
    batches: list, work: Callable[[list], dict[str, np.ndarray]], keep: Path | None, title: str, size: int = 8
) -> dict[str, np.ndarray]:
    """Rows for all `batches`, in the order of their numbers; with `keep`, results so far wait there for an interrupted stage to go on.

    `work(some batches)` gives "numbers" (N,) and any other arrays (N, ...). `keep` is named by what the results depend
    on; the caller removes it when its output is written.
    """
    parts = []
    with tqdm(total=len(batches), desc=title, disable=None, leave=False) as bar:
        for number, start in enumerate(range(0, len(batches), size)):
            group = batches[start : start + size]
            parts.append(cached(keep and keep / f"{number:05d}.npz", lambda group=group: work(group)))
            bar.update(len(group))
    order = np.argsort(np.concatenate([p["numbers"] for p in parts]))
    return {name: np.concatenate([p[name] for p in parts])[order] for name in parts[0]}
