"""What is worth carrying to a machine that is lent for minutes, and away from it."""

import contextlib
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import storage
from bundled import MINILM_PACKAGE, TAKEN, is_bundled, package_folder
from options import Paths

#: of a run: what it was, what it logged, what a reader of its weights needs, and what it wrote
OF_A_RUN = ("*.json", "*.jsonl", "*.tsv", "*.csv", "*.model", "*.jinja", "README.md")
OF_RESULTS = ("*.json", "*.md", "*.png", "*.csv", "*.log")
OWN = {"gathered", ".gathered"}  # in results/: what was gathered, and what is just being
MEGABYTE = 10**6
LIMIT = 60 * MEGABYTE
#: in data/: what the repository has, or what is made from the rest
NOT_TAKEN = {"sample", "downloads", "cache", "README.md", "splits.json"}


def take(paths: Paths, target: Path) -> int:
    """Pack the prepared data of a workdir, and MiniLM in half precision, for a machine without a network.

    Unpacked in the project's folder there, its commands find both. Returns the bytes of `target`, a .tar.gz;
    says where MiniLM is not at hand.
    """
    storage.require_file(paths.data / "prepared.json", f"python prepare_data.py --workdir {paths.root}")
    minilm = package_folder(MINILM_PACKAGE)
    with storage.whole_file(target) as part, tarfile.open(part, "w:gz", dereference=True) as packed:
        for file in sorted(paths.data.iterdir()):
            if file.name not in NOT_TAKEN and not file.name.startswith("."):
                packed.add(file, Path("data", file.name))
        if minilm is None:
            print("note: without MiniLM, whose package is not installed (requirements-offline.txt)")
        else:
            for file in sorted((minilm / "model").rglob("*")):
                pack_smaller(packed, file, Path(TAKEN.name, MINILM_PACKAGE, file.relative_to(minilm)))
    return target.stat().st_size


def gather(paths: Paths, target: Path, limit: int = LIMIT) -> list[str]:
    """Copy the runs' metrics, notes and replies, the tables, and as many finished weights, in half precision,
    as fit into `limit` bytes together; small ones first. What was gathered before is replaced, when all is
    there.

    Returns what was left out, each with its size, or with why it cannot be read.
    """
    part = target.with_name(f".{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = [f for f in found(paths.saved, OF_A_RUN) if "checkpoints" not in f.parts]
    results = paths.results
    files += [f for f in found(results, OF_RESULTS) if not OWN & {*f.relative_to(results).parts}]
    left, used = [], 0
    for file, size in by_size(files):
        if used + size > limit:
            left.append(f"{paths.note(file)} ({size / MEGABYTE:.1f} MB)")
            continue
        used += size
        place = part / file.relative_to(paths.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a stage that is running took it away
            shutil.copyfile(file, place)
    for file, size in by_size(finished_weights(paths.saved)):
        if used + size // 2 > limit:  # half precision halves it at best: not worth reading
            left.append(f"{paths.note(file)} (at least {size / 2 / MEGABYTE:.1f} MB in half precision)")
            continue
        try:
            weights = halved(file)
        except (OSError, SafetensorError) as error:  # cut, a pointer of git-lfs, or gone by now
            left.append(f"{paths.note(file)} (cannot be read: {error})")
            continue
        size = sum(tensor.nbytes for tensor in weights.values()) + MEGABYTE // 10  # names and shapes
        if used + size > limit:
            left.append(f"{paths.note(file)} ({size / MEGABYTE:.1f} MB in half precision)")
            continue
        used += size
        place = part / file.relative_to(paths.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, place, metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return left


def pack_smaller(packed: tarfile.TarFile, file: Path, place: Path) -> None:
    """A file as it is, weights in half precision."""
    if file.suffix != ".safetensors":
        packed.add(file, place, recursive=False)
        return
    with tempfile.NamedTemporaryFile(suffix=file.suffix) as smaller:
        save_file(halved(file), smaller.name, metadata={"format": "pt"})
        packed.add(smaller.name, place)


def by_size(files: list[Path]) -> list[tuple[Path, int]]:
    """Each with its bytes, small ones first; without those that are gone by now."""
    sizes = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            sizes.append((file, file.stat().st_size))
    return sorted(sizes, key=lambda pair: pair[1])


def found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [f for pattern in patterns for f in folder.rglob(pattern) if f.is_file()]


def finished_weights(saved: Path) -> list[Path]:
    """Of runs whose result.json is there, their checkpoints left out."""
    out = []
    for result in saved.rglob("result.json"):
        if is_bundled(result.parent):  # it came with the repository
            continue
        out += [f for f in result.parent.rglob("*.safetensors") if "checkpoints" not in f.parts]
    return out


def halved(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a .safetensors, in half precision."""
    return {name: half(tensor) for name, tensor in load_file(file).items()}


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor
