"""The labels of gold replies, as label_dialogues.py has written them: read by whatever trains with them."""

from collections.abc import Mapping, Sequence

import advice
import storage
from corpora import Example, read_labels
from options import DIMENSIONS, Paths, UserError


def gold_labels(
    split: str,
    examples: Sequence[Example],
    paths: Paths,
    family: str | None = None,
    levels: Mapping[str, int] | None = None,
) -> dict[str, list]:
    """{kind: the label of each example's gold reply}; says where they are older than what they were made
    from. `family`: whose critics label by default (None: those that are there). `levels`: how many the
    critics know that read these labels; of others, label 1 would mean something else."""
    file = paths.labels(split)
    storage.require_file(file, advice.label(paths.root, family, file.parent))
    found = read_labels(file, examples)
    made_from = storage.read_origin(file)
    sources = {"dialogues": paths.dialogues(split), "vader": paths.vader(split)}
    for dim in DIMENSIONS:
        noted = made_from[dim] if isinstance(made_from.get(dim), dict) else {}
        if "critic" in noted:
            sources[dim] = paths.find(noted["critic"]) / "model.safetensors"
        known = (levels or {}).get(dim)
        there = max(noted.get("levels", 0), max(found[dim]) + 1)  # an older note does not say
        if known and (there > known or ("levels" in noted and there != known)):
            raise UserError(
                f"{file}: its {dim} labels are of {there} levels, and the critic knows {known}; label with "
                f"critics of the same --levels, or give another --{dim}"
            )
    storage.warn_if_stale(file, sources)
    return found
