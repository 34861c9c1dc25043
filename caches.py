"""Arrays that were dear to make, kept in npz files: what is asked again, and long stages that go on where
they stopped."""

import contextlib
import functools
import glob
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from options import UserError
from storage import READ_ONLY, abandoned, fingerprint, warn_once, whole_file

#: seconds between two lines on a stage that no progress bar shows
LOG_EVERY = 60


def cached(
    file: Path | None, make: Callable[[], dict[str, np.ndarray]], required: bool = False
) -> dict[str, np.ndarray]:
    """`make()`, or what it gave before, from `file`; one that cannot be read is named and made again.

    In a place that may not be written nothing is kept, which is said once; `required` makes an error of that.
    """
    if file is None:
        return make()
    if (found := read_arrays(file)) is not None:
        return found
    arrays = make()
    keep_arrays(file, arrays, required)
    return arrays


def kept(file: Path | None, make: Callable[[Path | None], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`cached` of a long stage, which goes on where it stopped: `make` gets the folder for its parts, see
    `in_chunks`, and they go once the whole is kept."""
    if file is None:
        return make(None)
    parts = file.with_suffix("")
    found = cached(file, lambda: make(parts))
    shutil.rmtree(parts, ignore_errors=True)
    return found


def read_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """What an npz holds; None where there is no such file, or one that is damaged, which is said."""
    try:
        with zipfile.ZipFile(file) as parts:  # numpy reads no part to its end, where the checksum is compared
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged header leads to
        tqdm.write(f"warning: {file}: cannot be read ({str(error)[:200]}); it is made again")
        return None


def keep_arrays(
    file: Path, arrays: dict[str, np.ndarray], required: bool = False, origin: dict | None = None
) -> None:
    """Into an npz that `cached` reads; where nothing may be written, as it says. `origin`: noted beside
    it."""
    try:
        with whole_file(file, origin) as part, open(part, "wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
    except UserError as error:
        if required or getattr(error.__cause__, "errno", None) not in READ_ONLY:
            raise
        warn_once("cache", f"{file.parent}: may not be written ({error.__cause__}), so nothing is kept there")


def sweep_kept(keep: Path) -> None:
    """Clear away what stages left beside `keep` and nobody took up again: same kind, a week old."""
    kind = keep.name.rpartition("-")[0]
    for other in keep.parent.glob(f"{glob.escape(kind)}-*") if kind else ():
        with contextlib.suppress(OSError):
            if other != keep and all(abandoned(p, days=7) for p in (other, *other.rglob("*"))):
                shutil.rmtree(other, ignore_errors=True)


def in_chunks(
    batches: list, work: Callable[[list], dict[str, np.ndarray]], keep: Path | None, title: str, size: int = 8
) -> dict[str, np.ndarray]:
    """Rows for all `batches`, in the order of their numbers.

    `work(some batches)` gives "numbers" (N,) and any other arrays (N, ...). With `keep`, results so far wait
    there for an interrupted stage to go on; it is named by what they depend on (`kind-fingerprint`), and the
    caller removes it when its output is written. A `keep` with a dot lies beside that output: it must be
    writable, as the output must.
    """
    if keep:
        sweep_kept(keep)
    required = keep is not None and keep.name.startswith(".")
    parts = []
    began = told = time.monotonic()
    fresh = 0  # batches that were not kept from before

    def make(group: list) -> dict[str, np.ndarray]:
        nonlocal fresh
        fresh += len(group)
        return work(group)

    with tqdm(total=len(batches), desc=title, disable=None, leave=False) as bar:
        for start in range(0, len(batches), size):
            group = batches[start : start + size]
            # by what is in it: on another device the batches may be others
            file = keep and keep / f"{start:05d}-{fingerprint(str(group))[:16]}.npz"
            parts.append(cached(file, functools.partial(make, group), required))
            bar.update(len(group))
            left, now = len(batches) - start - len(group), time.monotonic()
            if bar.disable and left > 0 and now - told >= LOG_EVERY:  # no terminal, but a log
                told = now
                spent = f"{now - began:.0f} s, {(now - began) / max(fresh, 1) * left:.0f} s to go"
                print(f"{title}: {len(batches) - left} of {len(batches)} batches | {spent}", file=sys.stderr)
    order = np.argsort(np.concatenate([p["numbers"] for p in parts]))
    return {name: np.concatenate([p[name] for p in parts])[order] for name in parts[0]}
