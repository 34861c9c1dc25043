"""Systems to be compared: whose replies they are, to which items, and on which items they can be compared.

A system is a run's folder or anybody's file: layouts.py reads it, matching.py finds which of the split's
listener turns its replies answer.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

import advice
import runs
import storage
from corpora import Example
from layouts import Output, Reply, read_outputs
from matching import items_called, matched
from options import SPLITS, Paths, UserError
from predicting import READ_WITH, prediction_files

#: files of a folder that may hold replies, by their endings
READABLE = {".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".txt"}

#: columns of likelihood.csv: nats of a gold reply, model tokens, words with one for the end; nats of the end
#: alone, and those that unknown words cost for their class (both later than the others)
LIKELIHOOD = ("nll", "tokens", "words", "nll_end", "nll_class")


@dataclass(frozen=True)
class System:
    """One row of a table."""

    name: str
    replies: list[str]  # one for each of `numbers`; the first sample where there are several
    numbers: list[int]  # which listener turns of the split they answer, ascending
    samples: list[list[str]] | None = None  # all replies to each, where the file gives several
    folder: Path | None = None  # of a run
    run: Path | None = None  # whose replies these are, where they lie in a folder of their own
    decoding: str = ""
    parameters: int | None = None
    adapter: bool = False  # `parameters` are an adapter's, without its base
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know of the file
    #: number of a listener turn -> its gold reply's LIKELIHOOD; nan what the file does not have
    likelihoods: dict[int, tuple[float, ...]] = field(default_factory=dict)
    origin: dict = field(default_factory=dict)  # the note beside its file
    left_out: list[Reply] = field(default_factory=list)  # replies of its file that answer no item
    layout: str = ""  # as which its file was read
    referenced: bool = False  # a file of references says which items its replies answer


@dataclass
class Named:
    """A line of the table: one system, or several runs of one under a name."""

    name: str
    systems: list[System]


# -------------------------------------------------------------------------------------------------- reading


def read_system(
    path: Path,
    examples: Sequence[Example],
    split: str,
    paths: Paths,
    *,
    layout: str = "auto",
    references: Path | None = None,
) -> list[System]:
    """The systems of a run's folder, a file of replies, or a folder of such files.

    `examples`: all listener turns of the split. `layout`: one of options.LAYOUTS. `references`: the gold
    replies of a file without keys, one a line. Raises `UserError` where a reply cannot be read whole, answers
    no item of the split, or all are empty; what else could not be matched stands in `notes`.
    """
    path = Path(path)
    if path.is_dir() and not (path / "args.json").exists():
        predictions = prediction_files(path, split)[0]
        if predictions.exists():
            return read_file(predictions, examples, paths, layout, references)
        if runs.is_published(path):
            refuse_other_models(path)
            raise UserError(
                f"{path}: a published model; have its replies written to a folder, and give that: "
                f"{advice.replies(path, split, paths.root)} --output DIR"
            )
        files = _files(path)
        if files:
            found = [s for f in files for s in read_file(f, examples, paths, layout, references)]
            return [dataclasses.replace(s, name=f"{path.resolve().name}/{s.name}") for s in found]
    if path.is_file():
        return read_file(path, examples, paths, layout, references)
    runs.require_run(path, f"{advice.GIVE_A_GENERATOR}; or a file of predictions")
    return [read_run(path, examples, split, paths)]


def _files(folder: Path) -> list[Path]:
    """The files of a folder that may hold replies, without our notes and likelihoods."""
    found = []
    for file in sorted(folder.iterdir()):
        ours = file.name.startswith((".", "likelihood")) or file.name.endswith(".origin.json")
        if file.suffix.lower() in READABLE and file.is_file() and not ours:
            found.append(file)
    return found


def refuse_other_models(folder: Path) -> None:
    """Raises `UserError` for a folder that holds another model than a generator."""
    trained = runs.model_in(folder)
    if trained not in ("Generator", "CausalGenerator"):
        raise UserError(
            f"{folder}: the run of a {trained or 'retriever'}, not of a generator, whose replies are scored"
        )


def read_run(folder: Path, examples: Sequence[Example], split: str, paths: Paths) -> System:
    """A generator's run: its replies, the gold replies' perplexity, its number of parameters."""
    refuse_other_models(folder)
    predictions, likelihood = prediction_files(folder, split)
    storage.require_file(predictions, advice.replies(folder, split))
    origin = storage.read_origin(predictions)
    weights = storage.weights_file(folder)
    made_of = {"model": weights, "dialogues": paths.dialogues(split)}
    again = advice.replies(folder, split, paths.root)
    storage.warn_if_stale(predictions, made_of, again)
    try:
        [output] = read_outputs(predictions, "tsv")
    except UserError as error:
        raise UserError(f"{error}; a run's own file is damaged then: write it again with: {again}") from error
    return dataclasses.replace(
        placed(output, examples, predictions),
        name=f"{folder.parent.name}/{folder.name}",
        folder=folder,
        decoding=decoding_in_words(origin),
        origin=origin,
        likelihoods=likelihoods_of(likelihood, examples, origin),
        parameters=storage.parameters_in(weights),
        adapter=weights.name.startswith("adapter"),  # its base, which is large, is not there
    )


def read_file(
    file: Path,
    examples: Sequence[Example],
    paths: Paths,
    layout: str = "auto",
    references: Path | None = None,
) -> list[System]:
    """The systems of one file; a single one of a file called predictions is named after its folder."""
    outputs = read_outputs(file, layout, references)
    systems = [placed(output, examples, file) for output in outputs]
    if len(systems) > 1:
        return systems
    origin = storage.read_origin(file)
    named = file.name.startswith("predictions")
    name = file.parent.resolve().name if named else systems[0].name
    if not origin or not (named or "model" in origin):  # score.py leaves a note, too
        return [dataclasses.replace(systems[0], name=name)]
    split = origin.get("split")
    if split in SPLITS:  # written by --inference
        storage.warn_if_stale(file, {"dialogues": paths.dialogues(split)})
    run, notes = None, systems[0].notes
    if isinstance(origin.get("model"), dict):
        found = paths.find(origin["model"]["path"])
        if (found / "args.json").exists():
            run = found
        elif runs.is_published(found):
            notes = [*notes, "of a published model: what its training knew of the judges is not recorded"]
    likelihood = file.with_name(file.name.replace("predictions", "likelihood", 1)[:-4] + ".csv")
    return [
        dataclasses.replace(
            systems[0],
            name=name,
            run=run,
            decoding=decoding_in_words(origin),
            origin=origin,
            notes=notes,
            likelihoods=likelihoods_of(likelihood, examples, origin) if named else {},
        )
    ]


def decoding_in_words(origin: dict) -> str:
    """How the note beside predictions says that they were decoded; nothing where it does not."""
    how = origin.get("decoding", {})
    if how.get("num_beams", 1) > 1:
        text = f"beam search, {how['num_beams']} beams"
    elif how.get("do_sample"):
        text = f"sampled among the {how['top_k']} likeliest tokens at temperature {how['temperature']}"
        if "top_p" in how:
            text += f", of these the fewest that reach {how['top_p']}"
        text += f", seed {origin.get('seed')}"
    else:
        return ""
    if "no_repeat_ngram_size" in how:
        text += f", no {how['no_repeat_ngram_size']} tokens in a row twice"
    return f"{text}, at most {how['max_new_tokens']} tokens"


def likelihoods_of(file: Path, examples: Sequence[Example], beside: dict | None = None) -> dict:
    """A System's `likelihoods`, where there is a file of them. `beside`: the origin of its replies; what was
    read otherwise than they were written is left out."""
    if not file.exists():
        return {}
    own, theirs = (storage.content(origin) for origin in (storage.read_origin(file), beside or {}))
    if other := [name for name in READ_WITH if own and theirs and own.get(name) != theirs.get(name)]:
        print(
            f"warning: {file}: read with another {', '.join(other)} than the replies beside it were written "
            "with, and left out; write both again: --inference RUN --overwrite"
        )
        return {}
    try:  # pandas' own errors are ValueErrors
        table = pd.read_csv(file, dtype={"conv_id": str}, keep_default_na=False)
        if lacks := [c for c in ("conv_id", "utterance_idx", "nll") if c not in table]:
            raise ValueError(f"no column {', '.join(lacks)}")
        known = table.reindex(columns=LIKELIHOOD).replace("", math.nan).astype(float)
    except ValueError as error:
        raise UserError(f"{file}: not as --inference RUN writes it ({error})") from error
    number = {e.key: n for n, e in enumerate(examples)}
    keys = zip(table["conv_id"], table["utterance_idx"], strict=True)
    values = known.itertuples(index=False, name=None)
    return {number[key]: row for key, row in zip(keys, values, strict=True) if key in number}


# ------------------------------------------------------------------------------------------------- matching


def placed(output: Output, examples: Sequence[Example], path: Path) -> System:
    """The replies of one file beside the items that they answer.

    Raises `UserError` for a file of empty replies, and see `matched`.
    """
    replies = output.replies
    name = f"{path.stem}/{output.name}" if output.name else path.stem
    if not any(reply.text.strip() for reply in replies):
        raise UserError(f"{path}: every reply of {name} is empty; write the file again")
    found, notes = matched(replies, examples, path)
    answering = {id(reply) for several in found.values() for reply in several}
    numbers = sorted(found)
    several = [len(found[n]) for n in numbers]
    texts = [[r.text.strip() for r in sorted(found[n], key=lambda r: r.sample)] for n in numbers]
    empty = sum(not row[0] for row in texts)
    if empty:
        notes.append(f"empty replies: {empty:,}")
    if len(set(several)) > 1:
        notes.append(f"between {min(several)} and {max(several)} samples a context")
    notes = [*output.notes, *notes]
    for note in notes:
        print(f"{path}: {name}: {note}")
    return System(
        name,
        [row[0] for row in texts],
        numbers,
        samples=texts if max(several) > 1 else None,
        notes=notes,
        left_out=[reply for reply in replies if id(reply) not in answering],
        layout=output.layout,
        referenced=output.referenced,
    )


# ------------------------------------------------------------------------------------------------- item sets


def item_set(examples: Sequence[Example], which: str, systems: Sequence[System] = ()) -> list[int]:
    """Numbers of the listener turns of one of options.ITEM_SETS, ascending; shared: those that every one of
    `systems` answers."""
    if which != "shared":
        return items_called(which, examples)
    numbers = sorted(set(range(len(examples))).intersection(*(system.numbers for system in systems)))
    if not numbers:
        counts = ", ".join(f"{s.name} {len(s.numbers):,}" for s in systems)
        raise UserError(f"--items shared: no item is answered by every system ({counts}); leave some out")
    return numbers


def require_complete(system: System, numbers: Sequence[int], examples: Sequence[Example]) -> None:
    """Raise `UserError` where a system leaves one of the items `numbers` without a reply."""
    answered = set(system.numbers)
    missing = [n for n in numbers if n not in answered]
    if missing:
        first = ", ".join(f"{examples[n].conv_id} utterance {examples[n].utterance_idx}" for n in missing[:3])
        remedy = "compare on fewer items: --items shared, last or non-last"
        if system.folder:  # a run writes them all
            again = advice.replies(system.folder, system.origin.get("split", "test"))
            remedy = f"a run answers all of them, so its file is damaged: write it again with: {again}"
        raise UserError(
            f"{system.name}: covers {len(numbers) - len(missing):,} of {len(numbers):,} listener turns "
            f"(first missing: {first}); {remedy}"
        )


def restrict(system: System, numbers: Sequence[int]) -> System:
    """The same system on the items `numbers`, all of which it answers, in their order."""
    place = {n: i for i, n in enumerate(system.numbers)}
    chosen = [place[n] for n in numbers]
    return dataclasses.replace(
        system,
        replies=[system.replies[i] for i in chosen],
        numbers=list(numbers),
        samples=None if system.samples is None else [system.samples[i] for i in chosen],
        likelihoods={n: system.likelihoods[n] for n in numbers if n in system.likelihoods},
    )


def set_hash(examples: Sequence[Example], numbers: Sequence[int]) -> str:
    """12 hexadecimal digits of the items' ids and gold replies: equal on equal items only, in any order."""
    items = sorted([*examples[n].key, examples[n].response] for n in numbers)
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]
