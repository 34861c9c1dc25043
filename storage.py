"""Files that are whole or not there, and notes of what made them."""

import contextlib
import csv
import errno
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import advice
from options import Paths, UserError

if TYPE_CHECKING:
    import pandas as pd

# -------------------------------------------------------------------------------- what a file system cannot

#: the answers of a file system that does not have a thing (NFS, FUSE, drive mounts); a full disk (ENOSPC), a
#: broken one (EIO) and a forbidden place (EACCES) are not among them, and stay errors
CANNOT = {
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EBADF,
    errno.ENOLCK,
}
#: what a place answers that may be read and not written
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_said: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    """One warning of each kind in a process: a run asks for the same thing thousands of times."""
    from tqdm import tqdm  # every script imports this module, and says itself what is not installed

    if kind not in _said:
        _said.add(kind)
        tqdm.write(f"warning: {text}")


@contextlib.contextmanager
def where_possible(path: Path, kind: str, consequence: str, answers: Collection[int] = CANNOT):
    """Go on without what the file system cannot do, and say so once; every other error is one."""
    try:
        yield
    except OSError as error:
        if error.errno not in answers:
            raise
        warn_once(kind, f"{path}: its file system has no {kind} ({error.strerror}); {consequence}")


# ---------------------------------------------------------------------------------------------- safe writing


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename that follows cannot outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        what = "fsync of folders" if path.is_dir() else "fsync"
        with where_possible(path, what, "a power cut may cost what was written last; a kill does not"):
            os.fsync(handle)
    finally:
        os.close(handle)


def abandoned(path: Path, days: float = 1) -> bool:
    """Untouched for so long that no process can be at it: what is being written grows all the time."""
    return time.time() - path.stat().st_mtime > days * 86400


def sweep_parts(folder: Path, name: str = "*", everything: bool = False) -> None:
    """Clear away what killed writes of `name` (a pattern) left in `folder`: the abandoned, or everything."""
    for part in folder.glob(f".{name}.????????.part"):
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours
            if everything or abandoned(part):
                part.unlink()


@contextlib.contextmanager
def whole_file(path: Path, origin: dict | None = None):
    """Write `path` by way of a temporary file beside it: it is there whole, or as it was before.

    `origin`: what it is made from, noted beside it (`ready`, `warn_if_stale`); the old output goes before the
    new note comes, so that a note never stands beside an output it does not describe.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path.parent, glob.escape(path.name))
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


def require_writable(folder: Path) -> None:
    """Raise `UserError` where `folder` cannot be written, before hours of work whose result goes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or rights there") from error


def require_room_for(folder: Path) -> None:
    """The same of a folder that may not be there yet, and is not made."""
    require_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()))


def write_text(path: Path, text: str, origin: dict | None = None) -> None:
    with whole_file(path, origin) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def write_csv(path: Path, table: "pd.DataFrame", sep: str = ",", origin: dict | None = None) -> None:
    """A csv with a header, whole or not at all.

    With sep="\\t" (the predictions' format) nothing is quoted, or everything, where a text could not be told
    from the format: one with a tab or a line break, or one in quotation marks.
    """
    texts = [v for c in table for v in table[c] if isinstance(v, str)]
    if sep == "\t":
        unclear = any(set(t) & set("\t\r\n") or (t[:1] == t[-1:] == '"' and len(t) > 1) for t in texts)
        quoting = csv.QUOTE_ALL if unclear else csv.QUOTE_NONE
    elif any("\r" in t for t in texts):
        # before Python 3.13 a bare \r is not quoted otherwise, and ends the row
        quoting = csv.QUOTE_NONNUMERIC
    else:
        quoting = csv.QUOTE_MINIMAL
    with whole_file(path, origin) as part:
        table.to_csv(part, index=False, sep=sep, quoting=quoting, lineterminator="\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; nothing there is no error."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(outputs: list[Path], aside: Path):
    """What stands in `outputs` (files, folders) goes when the block succeeds, and comes back when it does
    not.

    Meanwhile it waits in the folder `aside`, on the same file system, so the names of `outputs` must differ.
    After a kill `restore` puts it back. Raises `UserError`, with nothing moved, for an output on another one.
    """
    whole = aside.parent
    for path in outputs:
        if path.exists() and path.lstat().st_dev != whole.stat().st_dev:  # a link itself can be moved
            raise UserError(
                f"{path}: on another disk than {whole}, so it cannot be set aside there; link the whole "
                f"{whole} to that disk instead, or give another --workdir"
            )
    aside.mkdir(parents=True, exist_ok=True)
    for path in outputs:
        if path.exists():
            path.rename(aside / path.name)
    # from here on what stands in an output's place is new, and unfinished
    (aside / "moved").touch()
    try:
        yield
    except BaseException:
        restore(outputs, aside)
        raise
    # under its second name nothing is put back any more, so a kill inside the deletion costs nothing
    done = aside.with_name(f"{aside.name}-done")
    shutil.rmtree(done, ignore_errors=True)
    aside.rename(done)
    shutil.rmtree(done, ignore_errors=True)


def restore(outputs: list[Path], aside: Path) -> None:
    """Put back what `replacing` has set aside, in place of what was written since.

    Without `aside` it does nothing; killed anywhere, it can be called again.
    """
    if (aside / "moved").exists():  # all old ones are aside: what stands in their places is unfinished
        for path in outputs:
            remove(path)
        (aside / "moved").unlink()
    for path in outputs:
        if (aside / path.name).exists():
            (aside / path.name).rename(path)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, otherwise: str):
    """Hold `folder` against other processes; `UserError` with `otherwise` where another one holds it.

    Held by the process, not by the file: it goes when the process goes, however that ends. Yields False where
    the file system has no locks, so that nobody can say whether another process is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error
    with handle:
        held = False
        try:
            with where_possible(folder, "locks", "see to it that no second process works there"):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
        except BlockingIOError:
            raise UserError(f"{folder}: {otherwise}") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked ({error})") from error
        yield held


def share(folder: Path) -> None:
    """safetensors writes for its owner alone; give its files the rights of any other new file."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        with where_possible(file, "chmod", "the place decides who may read it", CANNOT | {errno.EPERM}):
            file.chmod(0o666 & ~mask)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the content of `source`, not written again where the file system has hard links."""
    try:
        os.link(source, target)
    except OSError:  # whatever the reason; a real one stops the copy too
        shutil.copyfile(source, target)
        sync(target)


# --------------------------------------------------------------------------------------------------- weights


def save_weights(module, file: Path) -> None:
    """A torch module's tensors as safetensors: the same weights give the same bytes, every time.

    A tensor with several names is stored once, under the first of them in the alphabet, which is the choice
    of safetensors' own `save_model` too. That one also notes the names left out, in an order that changes
    from call to call; no reader needs them.
    """
    from safetensors.torch import save_file  # brings torch, which the stages without a model do not wait for

    stored, seen = {}, set()
    for name, tensor in sorted(module.state_dict().items()):
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        stored[name] = tensor.contiguous()
    save_file(stored, str(file), metadata={"format": "pt"})


def load_weights(module, file: Path) -> None:
    """Fill a torch module from such a file; RuntimeError where names or shapes differ."""
    from safetensors.torch import load_model

    load_model(module, str(file), strict=True)


# ----------------------------------------------------------------------------------------------------- notes


def wide(head: bytes) -> str | None:
    """The encoding of a file that begins with `head`, where that is one of several bytes a letter."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if len(head) > 3 and not any(head[1::2]):  # Latin letters of two bytes each, without a mark
        return "UTF-16LE"
    return "UTF-16BE" if len(head) > 3 and not any(head[0::2]) else None


def decode(content: bytes, path: Path) -> str:
    """`content` of the file `path` as text: UTF-8, without the byte order mark that may stand before it.

    Raises UserError with file, line and the command that converts it, where it is in another encoding, and
    for a file that is no text.
    """
    found = wide(content[:64])
    if content.startswith(b"PK\x03\x04"):
        raise UserError(f'{path}: an Excel workbook or a zip archive; save it as "CSV UTF-8", or unpack it')
    line = 1
    if found is None:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if b"\0" in content:
                raise UserError(
                    f"{path}: no text (it holds zero bytes); save it as text, in UTF-8"
                ) from error
            line, found = content.count(b"\n", 0, error.start) + 1, "cp1252"
    guess = "perhaps Windows' cp1252" if found == "cp1252" else f"it is {found}"
    name = Path(path)
    new = name.with_name(f"{name.name.removesuffix(name.suffix)}-utf8{name.suffix}")
    convert = f"iconv -f {found} -t UTF-8 {shlex.quote(str(name))} > {shlex.quote(str(new))}"
    if name.suffix == ".gz":
        convert = (
            f"gunzip -c {shlex.quote(str(name))} | iconv -f {found} -t UTF-8 | gzip > {shlex.quote(str(new))}"
        )
    raise UserError(f"{path}, line {line}: not UTF-8 ({guess}); convert it with: {convert}")


def parsed(path: Path) -> Any:
    """What a JSON file holds (UTF-8, a byte order mark may stand before it), or an error that names it."""
    try:
        return json.loads(decode(Path(path).read_bytes(), path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); restore it, or make it anew") from error


def read_json(path: Path) -> dict:
    """The same of a file that is to hold an object."""
    content = parsed(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; restore it, or make it anew")
    return content


def read_if_there(path: Path) -> dict:
    """The same, empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digests(place: Path) -> list[str]:
    """What stands in a file, or in the files of a folder: under the same name another day's are others."""
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return [sha256(file)[:16] for file in files if file.is_file()]


def checksum(file: Path) -> str:
    """The same of a large file that is asked for again and again; read again where it was written since."""
    return _checksum(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _checksum(file: Path, written: int) -> str:
    return sha256(file)


def fingerprint(*parts: object) -> str:
    """sha256 over the text of `parts`, for cache names and notes of origin."""
    digest = hashlib.sha256()
    for part in parts:
        for piece in part if isinstance(part, list | tuple) else [part]:
            digest.update(str(piece).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    return int(fingerprint(*parts)[:15], 16)


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """(user/name, revision) of user/name@revision on the hub; a folder's name is taken whole."""
    place, _, revision = (str(name), "", "") if Path(name).exists() else str(name).partition("@")
    if revision and Path(place).exists():
        raise UserError(f"{name}: {place} is a folder here, which has no revisions; leave out @{revision}")
    return place, revision or None


def snapshot(name: str | Path) -> Path | None:
    """The folder in which the hub's client keeps what it downloaded of a name; called by the commit."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    place, revision = split_revision(name)
    try:
        found = try_to_load_from_cache(place, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def identity(name: str | Path) -> str:
    """What a model's hub name or folder stands for: the name itself, or the sha256 of the folder's model
    files."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    files = sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    )
    return fingerprint(*(f"{p.name} {sha256(p)}" for p in files))


def source(place: str | Path, paths: Paths, digest: str | None = None) -> dict[str, str]:
    """A note of where something lies and what it is; `digest` where it is not one file's sha256."""
    is_name = not Path(place).exists()  # of the hub
    found = {"path": str(place) if is_name else paths.note(place), "sha256": digest or sha256(Path(place))}
    kept = snapshot(place) if is_name else None
    return found | ({"revision": kept.name} if kept else {})


def weights_file(folder: str | Path) -> Path:
    """What a run has learnt: all weights, or an adapter's."""
    adapter = Path(folder) / "adapter_model.safetensors"
    return adapter if adapter.exists() else Path(folder) / "model.safetensors"


def parameters_in(weights: Path) -> int:
    """How many weights a file of them holds, by its header."""
    from safetensors import safe_open

    with safe_open(weights, framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no dict)
    return sum(math.prod(shape) for shape in shapes)


def sources_of(folders: Mapping[str, str | Path | None], paths: Paths) -> dict[str, dict[str, str]]:
    """`source` of each run {name: folder}, which is what it has learnt; none of a name without a folder."""
    there = {name: folder for name, folder in folders.items() if folder}
    return {name: source(folder, paths, sha256(weights_file(folder))) for name, folder in there.items()}


def weights_hash(module) -> str:
    """sha256 over a torch module's weights by name, each tied one once: the same whatever files they lie
    in."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\0".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require(folder: Path) -> Path:
    """A folder that prepare_data.py makes."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; make it with: {advice.makes(folder, 'python prepare_data.py')}"
        )
    return folder


def require_file(file: Path, made_by: str) -> None:
    """`UserError` with the command that makes it where there is no such file."""
    if not file.exists():
        raise UserError(f"{file}: no such file; make it with: {made_by}")


def origin_file(path: Path) -> Path:
    """The note beside an output that says what made it."""
    return Path(path).with_name(f"{Path(path).name}.origin.json")


def read_origin(path: Path) -> dict:
    """What the note beside `path` says; empty where there is none."""
    return read_if_there(origin_file(path))


def content(origin: dict) -> dict:
    """What identifies an origin: of an entry with a sha256 that alone; its path is for people, as the command
    is."""
    return {
        k: v["sha256"] if isinstance(v, dict) and "sha256" in v else v
        for k, v in origin.items()
        if k != "command"
    }


def ready(path: Path, origin: dict, overwrite: bool) -> bool:
    """True where `path` was already made from exactly `origin`, wherever that lay then (`content`).

    An output of other origin is never replaced silently; one that could not be written is refused at once.
    """
    path, origin = Path(path), content(json.loads(json.dumps(origin, default=str)))
    if not path.exists() or overwrite:
        require_writable(path.parent)
        return False
    before = content(read_origin(path))
    if before == origin:
        print(f"{path}: already made from the same inputs, kept")
        return True
    changed = sorted(k for k in before.keys() | origin.keys() if before.get(k) != origin.get(k))
    raise UserError(
        f"{path}: already there, made with another {', '.join(changed)}; add --overwrite to replace it"
    )


def is_still(place: Path, digest: str) -> bool:
    """Whether a file, or a folder's weights, is what had this sha256 or `identity`."""
    if not place.is_dir():
        return checksum(place) == digest
    weights = weights_file(place)
    return (weights.exists() and checksum(weights) == digest) or identity(place) == digest


def warn_if_stale(path: Path, sources: dict[str, Path], again: str = "") -> list[str]:
    """Say where `path` was made from an older `{name: file}` than is there now; returns those names.

    `sources` can be folders of models, too. `again`: the command that makes it anew (default: what makes
    that place).
    """
    made_of = content(read_origin(path))
    old = []
    for name, place in sources.items():
        recorded = made_of.get(name)
        if recorded and place.exists() and not is_still(place, recorded):
            old.append(name)
    if old:
        again = again or advice.makes(path, "")
        how = (
            f"to be sure, make it again with: {again}" if again else "make it again (--overwrite) to be sure"
        )
        print(f"warning: {path}: what it was made from has changed since: {', '.join(old)}; {how}")
    return old
