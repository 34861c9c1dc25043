"""Runs on the Hugging Face hub: what of a run's folder is published, and how a name becomes a folder.

A run is published as it was trained and checked, file by file; nothing is saved anew. Nothing is sent unless
`push_to_hub` is called, and what it makes is private unless told otherwise.
"""

import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import storage
from options import UserError, by_flag

#: weights, settings, words, figures, the card: no logs, no replies, no code, nothing but safetensors and JSON
PUBLISHED = (
    *(
        "README.md",
        "result.json",
        "*.safetensors",
        "*config.json",
        "modules.json",
        "config_sentence_transformers.json",
    ),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
#: of a run's card: what of it is only here, and what stands in its place where the run is published
OF_THE_RUN = "All flags: args.json. Versions: environment.json. Every logged figure: metrics.jsonl."
OF_THE_PUBLISHED = "It stands here without logs and predictions."
#: user/name
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def published(folder: Path) -> list[Path]:
    """The files of a run that stand on the hub, those of its encoders' folders included."""
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") or part == "checkpoints" for part in inside.parts)
        if file.is_file() and not hidden and any(fnmatch.fnmatch(file.name, p) for p in PUBLISHED):
            found.append(inside)
    return found


class Run(ModelHubMixin):
    """A finished run's folder, as the hub's mixin saves, loads and pushes it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _save_pretrained(self, save_directory: Path) -> None:
        if not (self.folder / "result.json").exists() or not (self.folder / "README.md").exists():
            raise UserError(f"{self.folder}: no finished run (result.json, README.md); finish its training")
        for inside in published(self.folder):
            (save_directory / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / inside, save_directory / inside)
        card = save_directory / "README.md"
        said = card.read_text(encoding="utf-8").replace(OF_THE_RUN, OF_THE_PUBLISHED)
        card.write_text(said, encoding="utf-8")
        if not (save_directory / "config.json").exists():  # of two encoders; the hub counts loads by it
            storage.write_json(save_directory / "config.json", {"model": "Retriever"})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> "Run":
        download = {k: v for k, v in download.items() if k in DOWNLOAD}
        wanted = [f"*{pattern.lstrip('*')}" for pattern in PUBLISHED]  # in any folder
        return cls(Path(snapshot_download(model_id, allow_patterns=wanted, **download)))


#: what the mixin passes on that says how to download
DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")


def folder_of(run: str | Path, **download: Any) -> Path:
    """The folder of a run: the one that is named, or what the hub has under user/name, downloaded once.

    A `Path` is always a folder, and so is a name in a folder that is there. `download`: see
    `ModelHubMixin.from_pretrained` (revision, token ...). Raises `UserError` where neither has it; with
    HF_HUB_OFFLINE=1 only what was downloaded before is found.
    """
    if isinstance(run, Path) or Path(run).parent.is_dir() or not HUB_NAME.fullmatch(run):
        return Path(run)
    try:
        return Run.from_pretrained(run, **download).folder
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{run}: no such folder here, and not to be had from the hub ({reason})") from error


def folder_given(flag: str, run: str | Path) -> Path:
    """`folder_of` what was given by a flag, which an error names."""
    with by_flag(flag):
        return folder_of(str(run))


class Published:
    """Base of what is loaded from a run's folder: it can be saved elsewhere, or pushed, as it was trained."""

    folder: Path | None = None  # the run's; None for what no run has trained

    @property
    def run(self) -> Run:
        if self.folder is None:
            raise UserError("this was not loaded from a run, so there is nothing to save or push")
        return Run(Path(self.folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """What `push_to_hub` would send, in a folder; nothing that is there is replaced."""
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise UserError(f"{folder}: not empty, so it is left alone; give another folder")
        self.run.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True, **how: Any) -> str:
        """Send the run to the hub as `repo_id` (user/name); private unless told otherwise.

        `how`: see `ModelHubMixin.push_to_hub` (token, branch, commit_message ...). Returns the commit's
        address.
        """
        return self.run.push_to_hub(repo_id, private=private, **how)
