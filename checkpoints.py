"""Checkpoints that are written whole, checked, and never lost.

A checkpoint is written beside its target, listed in a sha256 manifest, synced, and renamed once; older ones
go only after the new one stands. Everything in it is safetensors, plain tensors (`weights_only=True`) or
JSON: no pickle.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError

from options import UserError
from storage import abandoned, link_or_copy, read_json, sha256, sync, write_json

MANIFEST = "manifest.json"


def named(folder: Path, kind: str) -> list[Path]:
    """The entries `<kind>step-N` or `<kind>step-N-xxxxxx` of a checkpoint folder, lowest step first.

    Not `glob`: that takes a folder that may not be read for an empty one.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {n: m for n in names if (m := re.fullmatch(rf"{re.escape(kind)}step-(\d+)(-\w+)?", n))}
    return [folder / n for n in sorted(found, key=lambda n: (int(found[n][1]), n))]


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their step, lowest first."""
    return {int(c.name.removeprefix("step-")): c for c in named(folder, "") if c.name.count("-") == 1}


def write_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    keep: Collection[int] = (),
    update: bool = False,
) -> Path:
    """Let `write(temporary folder)` fill a checkpoint, check it in; all but the newest two and `keep` go.

    `update`: step-N stands already, and `write` gives only the files that have changed since; the others are
    taken over, without being written again where the file system has hard links.
    """
    target = folder / f"step-{step:07d}"
    part = folder / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        part.mkdir(parents=True)
        write(part)
        files = sorted(p for p in part.iterdir() if p.is_file())
        for file in files:
            sync(file)
        listing = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        if update:
            listing = take_over(target, part) | listing
        write_json(part / MANIFEST, {"step": step, "files": listing})
        sync(part)
        before = target.with_name(f".old-{target.name}")
        if target.exists():  # this step again, with what an evaluation has found since
            target.rename(before)
        part.rename(target)
        sync(folder)
        shutil.rmtree(before, ignore_errors=True)
    # a full disk is a RuntimeError in torch.save
    except (UserError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{target}: cannot be written ({error}); the checkpoints before it are untouched"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for number, old in list(steps(folder).items())[:-2]:
        if number not in keep:
            discard(old)
    return target


def take_over(standing: Path, part: Path) -> dict:
    """Bring what `part` lacks over from the `standing` checkpoint; returns that one's manifest entries.

    The checksums are those of when they were written: what has been damaged since is still found.
    """
    entries = read_json(standing / MANIFEST)["files"]
    for name in entries:
        if not (part / name).exists():
            link_or_copy(standing / name, part / name)
    return entries


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, under another name first: a kill in between leaves none that looks damaged."""
    with contextlib.suppress(OSError):
        checkpoint = checkpoint.rename(
            checkpoint.with_name(f".gone-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
        )
    shutil.rmtree(checkpoint, ignore_errors=True)


def drop_checkpoints(folder: Path) -> None:
    """A finished run has its weights beside this folder; the optimizer's state has served its time.

    What `--resume CHECKPOINT` has set aside stays: somebody may still mean to go on from there.
    """
    with contextlib.suppress(OSError):  # also: not empty, or a link to where there is more room, which stays
        for checkpoint in [*steps(folder).values(), *named(folder, "damaged-")]:
            discard(checkpoint)
        folder.rmdir()


def set_aside(checkpoint: Path, why: str) -> Path:
    """Keep a checkpoint under a name that no run goes on from."""
    return checkpoint.rename(checkpoint.with_name(f"{why}-{checkpoint.name}-{uuid.uuid4().hex[:6]}"))


def bring_back(later: Path) -> Path:
    """What was set aside as `later-step-N-xxxxxx` as step-N again, with the best checkpoint that it knows;
    what has taken their places since is set aside for them."""
    state = read_json(later / "state.json")
    step, best = (f"step-{n:07d}" for n in (state["step"], state["best_step"]))
    wanted = {step: later}
    for other in named(later.parent, "later-"):
        mine = best != step and other.name.startswith(f"later-{best}-")
        if mine and read_json(other / "state.json")["best"] == state["best"]:
            wanted[best] = other
    for name, kept in wanted.items():
        place = later.with_name(name)
        if place.exists():
            set_aside(place, "later")
        kept.rename(place)
    return later.with_name(step)


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: an empty list where every file is there with its sha256."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except PermissionError:  # forbidden is not damaged
        raise
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


def sweep(folder: Path, alone: bool = True) -> None:
    """Clear away what killed saves have left; not `alone` (another process may be saving): a day later."""
    for leftover in [*named(folder, ".tmp-"), *named(folder, ".gone-")]:
        if alone or abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    for old in named(folder, ".old-"):  # a replacement that was killed between its two renames
        target = folder / old.name.removeprefix(".old-")
        shutil.rmtree(old, ignore_errors=True) if target.exists() else old.rename(target)


def newest_good(folder: Path, accept: Callable[[Path], None] = lambda checkpoint: None) -> Path | None:
    """The newest checkpoint that passes its check, None where there never was one.

    Damaged ones are named and set aside. `accept(checkpoint)` may refuse it, before anything is moved.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder}: a link to {os.readlink(folder)}, which is not there; bring that folder back, "
            "or --overwrite begins anew"
        )
    damaged = {}
    for checkpoint in reversed(steps(folder).values()):
        problems = faults(checkpoint)
        if not problems:
            break
        damaged[checkpoint] = "; ".join(problems)
        print(f"warning: checkpoint {checkpoint} is damaged ({damaged[checkpoint]}), trying the one before")
    else:
        if damaged or named(folder, "damaged-"):
            raise UserError(
                f"{folder}: no good checkpoint is left; --overwrite begins anew, "
                "another --name leaves this as it is"
            )
        return None
    accept(checkpoint)
    for bad in damaged:
        print(f"{bad}: set aside as {set_aside(bad, 'damaged').name}")
    return checkpoint
