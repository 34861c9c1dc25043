"""Systems to be compared: whose replies they are, to which items, and on which items they can be compared.

A system is a run's folder or anybody's file (layouts.py reads it). Its replies are matched with the split's
listener turns by key, else by history and reference as normalising.py writes them, else by order.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from safetensors import safe_open

import advice
import corpora
import runs
import storage
from corpora import Example
from layouts import Output, Reply, joined_turns, read_outputs
from metrics import perplexity
from normalising import words
from options import SPLITS, Paths, UserError
from predicting import READ_WITH, prediction_files

ITEM_SETS = ("all", "last", "non-last", "shared")
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
    perplexities: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    adapter: bool = False  # `parameters` are an adapter's, without its base
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know of the file
    #: number of a listener turn -> its gold reply's LIKELIHOOD; nan what the file does not have
    likelihoods: dict[int, tuple[float, ...]] = field(default_factory=dict)
    origin: dict = field(default_factory=dict)  # the note beside its file
    left_out: list[Reply] = field(default_factory=list)  # replies of its file that answer no item


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
    trained, _ = advice.kind_of(folder)
    if not trained and (folder / "config.json").exists():
        storage.read_json(folder / "config.json")  # what cannot be read is no sign of another kind of run
    if trained not in ("Generator", "CausalGenerator"):
        raise UserError(
            f"{folder}: the run of a {trained or 'retriever'}, not of a generator, whose replies are scored"
        )


def read_run(folder: Path, examples: Sequence[Example], split: str, paths: Paths) -> System:
    """A generator's run: its replies, the gold replies' perplexity, its number of parameters."""
    refuse_other_models(folder)
    predictions, likelihood = prediction_files(folder, split)
    if not predictions.exists():
        raise UserError(f"{predictions}: no such file; make it with: {advice.replies(folder, split)}")
    origin = storage.read_origin(predictions)
    weights = storage.weights_file(folder)
    made_of = {"model": weights, "dialogues": paths.dialogues(split)}
    storage.warn_if_stale(predictions, made_of, advice.replies(folder, split, paths.root))
    with safe_open(weights, framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no dict)
    [output] = read_outputs(predictions, "tsv")
    return dataclasses.replace(
        placed(output, examples, predictions),
        name=f"{folder.parent.name}/{folder.name}",
        folder=folder,
        decoding=decoding_in_words(origin),
        origin=origin,
        **likelihood_of(likelihood, examples, origin),
        parameters=sum(math.prod(shape) for shape in shapes),
        adapter=weights.name.startswith("adapter"),  # its base, which is large, is not there
    )


def read_file(
    file: Path,
    examples: Sequence[Example],
    paths: Paths,
    layout: str = "auto",
    references: Path | None = None,
) -> list[System]:
    """The systems of one file; what --inference wrote to a folder of its own is named after that."""
    outputs = read_outputs(file, layout, references)
    systems = [placed(output, examples, file) for output in outputs]
    origin = storage.read_origin(file)
    named = file.name.startswith("predictions")
    if not origin or not (named or "model" in origin) or len(systems) > 1:  # score.py leaves a note, too
        return systems
    split = origin.get("split")
    if split in SPLITS:  # written by --inference
        storage.warn_if_stale(file, {"dialogues": paths.dialogues(split)})
    run = None
    if isinstance(origin.get("model"), dict):
        found = paths.find(origin["model"]["path"])
        run = found if (found / "args.json").exists() else None
    likelihood = file.with_name(file.name.replace("predictions", "likelihood", 1)[:-4] + ".csv")
    return [
        dataclasses.replace(
            systems[0],
            name=file.parent.resolve().name if named else systems[0].name,
            run=run,
            decoding=decoding_in_words(origin),
            origin=origin,
            **(likelihood_of(likelihood, examples, origin) if named else {}),
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


def likelihood_of(file: Path, examples: Sequence[Example], beside: dict | None = None) -> dict:
    """`likelihoods` and `perplexities` of a System, where the file with its gold replies' likelihood is
    there. `beside`: the origin of its replies; what was read otherwise than they were written is left out."""
    if not file.exists():
        return {}
    own, theirs = (storage.content(origin) for origin in (storage.read_origin(file), beside or {}))
    if other := [name for name in READ_WITH if own and theirs and own.get(name) != theirs.get(name)]:
        print(
            f"warning: {file}: read with another {', '.join(other)} than the replies beside it were written "
            "with, and left out; write both again: --inference RUN --overwrite"
        )
        return {}
    table = pd.read_csv(file, dtype={"conv_id": str}, keep_default_na=False)
    number = {e.key: n for n, e in enumerate(examples)}
    keys = zip(table["conv_id"], table["utterance_idx"], strict=True)
    known = table.reindex(columns=LIKELIHOOD).replace("", math.nan).astype(float)
    values = known.itertuples(index=False, name=None)
    found = {number[key]: row for key, row in zip(keys, values, strict=True) if key in number}
    return {"likelihoods": found, "perplexities": perplexities(found.values())}


def perplexities(rows) -> dict[str, float]:
    """Of the gold replies, from the LIKELIHOOD of each; empty where there are none."""
    rows = list(rows)
    if not rows:
        return {}
    nll, tokens, count, *_ = (sum(column) for column in zip(*rows, strict=True))
    return {"ppl_token": perplexity(nll, tokens), "ppl_word": perplexity(nll, count)}


# ------------------------------------------------------------------------------------------------- matching


def placed(output: Output, examples: Sequence[Example], path: Path) -> System:
    """The replies of one file beside the items that they answer.

    Raises `UserError` for unknown and doubled keys, for a file of empty replies, of control tokens, and for
    one that answers no item.
    """
    replies = output.replies
    name = f"{path.stem}/{output.name}" if output.name else path.stem
    if not any(reply.text.strip() for reply in replies):
        raise UserError(f"{path}: every reply of {name} is empty; write the file again")
    _check_quotes(path, replies)
    corpora.check_control_tokens(path, [r.text for r in replies], [r.line for r in replies])
    if replies[0].key is not None:
        found, notes = _by_key(replies, examples, path)
    else:
        first = min(reply.sample for reply in replies)
        found, notes = _by_text([r for r in replies if r.sample == first], examples, path)
        _follow(found, replies, first)
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
    )


def _check_quotes(path: Path, replies: Sequence[Reply]) -> None:
    """Refuse replies that some writer has quoted and nobody has unquoted."""
    texts = [r for r in replies if r.text.strip()]
    quoted = [r for r in texts if len(r.text) > 1 and r.text[0] == r.text[-1] == '"']
    if len(quoted) == len(texts) > 1:
        raise UserError(
            f"{path}, line {quoted[0].line}: every reply stands in quotation marks; write them without, or "
            "as a csv with a header"
        )
    escaped = [r.line for r in replies if '\\"' in r.text or "\\n" in r.text]
    if escaped:
        print(
            f"warning: {path}: {len(escaped):,} replies hold escaped marks or line ends (first: line "
            f"{escaped[0]}), which count as words here; write the file again without them"
        )


#: where nothing but single references finds an item, the share of a file's replies that must: "I'm so sorry
#: to hear that!" is a reference of any split
FEWEST_LONE = 0.2
Found = dict[int, list[Reply]]  # number of an item -> the replies to it


def _by_key(replies: Sequence[Reply], examples: Sequence[Example], path: Path) -> tuple[Found, list[str]]:
    keys = [r.key for r in replies if r.key is not None]
    corpora.refuse_unknown(path, keys, examples)
    number = {e.key: n for n, e in enumerate(examples)}
    found: Found = {}
    taken: set[tuple] = set()
    other = 0
    for reply, key in zip(replies, keys, strict=True):
        if (key, reply.sample) in taken:
            raise UserError(
                f"{path}, line {reply.line}: {key[0]}, utterance {key[1]} stands there twice; where a system "
                "gives several replies, number them in a column named sample"
            )
        taken.add((key, reply.sample))
        n = number[key]
        found.setdefault(n, []).append(reply)
        if reply.reference is not None:
            other += _letters(reply.reference) != _letters(examples[n].response)
    notes = [f"references that differ from the split's: {other:,}"] if other else []
    return found, notes


def _letters(text: str) -> str:
    """What two spellings of one text share: its words without marks and blanks; marks where it has no
    word."""
    parts = words(text)
    return "".join(w for w in parts if w.isalnum()) or "".join(parts)


#: by what a reply finds its item: the places of (history, reference) that must agree, and what a note says
WAYS: tuple[tuple[tuple[int, ...], str], ...] = (
    ((0, 1), ""),
    ((0,), "matched by the history alone"),
    ((1,), "matched by the reference alone"),
)


def _by_text(replies: Sequence[Reply], examples: Sequence[Example], path: Path) -> tuple[Found, list[str]]:
    """By history and reference; what is left by one of the two, where that stands once in the split and once
    in the file. Without histories first by order, where every reference agrees."""
    theirs = [(_letters_or_none(r.history), _letters_or_none(r.reference)) for r in replies]
    ours = [(_letters(joined_turns(e.history)), _letters(e.response)) for e in examples]
    if all(pair == (None, None) for pair in theirs):
        raise UserError(
            f"{path}: nothing in it says which of the {len(examples):,} listener turns of this split its "
            f"{len(replies):,} replies answer; give the gold replies in their order, one a line: "
            "--references FILE"
        )
    if all(history is None for history, _ in theirs):
        for which in ("all", "last", "non-last"):
            numbers = item_set(examples, which)
            if [reference for _, reference in theirs] == [ours[n][1] for n in numbers]:
                return {n: [reply] for n, reply in zip(numbers, replies, strict=True)}, []
    found: Found = {}
    left, notes = list(range(len(replies))), []
    by_history = 0
    referring = any(reference for _, reference in theirs)
    for parts, how in WAYS:
        before = len(left)
        left = _matched(found, left, parts, theirs, ours, replies)
        by_history += (0 in parts) * (before - len(left))
        if how and before > len(left):
            why = ", their references being written otherwise" if parts == (0,) and referring else ""
            notes.append(f"replies {how}{why}: {before - len(left):,}")
    before = len(left)
    left = _between(found, left, theirs, ours, replies)
    if before > len(left):
        notes.append(
            f"replies matched by a reference that comes again, and their place: {before - len(left):,}"
        )
    if not found:
        raise UserError(
            f"{path}: none of its {len(replies):,} replies answers a listener turn of this split, neither by "
            "its history nor by its reference; is it of another --split?"
        )
    if not by_history and len(found) < FEWEST_LONE * len(replies):
        raise UserError(
            f"{path}: {len(found):,} of its {len(replies):,} replies find a listener turn of this split, "
            "these by a reference alone, which other turns have, too; is it of another --split?"
        )
    if left:
        first = ", ".join(str(replies[row].line) for row in left[:3])
        notes.append(
            f"replies left out, for they answer no listener turn of this split or one that is answered: "
            f"{len(left):,} of {len(replies):,} (first: line {first})"
        )
    return found, notes


def _follow(found: Found, replies: Sequence[Reply], first: int) -> None:
    """Put the further samples of a file without keys beside the first of the same history and reference; of
    rows that agree in both, the second sample numbered so beside the second, and so on."""
    number = {id(several[0]): n for n, several in found.items()}
    leaders: dict[Pair, list[int | None]] = {}
    for reply in replies:
        if reply.sample == first:
            leaders.setdefault((reply.history, reply.reference), []).append(number.get(id(reply)))
    seen: Counter[tuple] = Counter()
    for reply in replies:
        if reply.sample != first:
            places = leaders.get((reply.history, reply.reference), [])
            case = (reply.history, reply.reference, reply.sample)
            n = places[seen[case]] if seen[case] < len(places) else None
            seen[case] += 1
            if n is not None:
                found[n].append(reply)


def _letters_or_none(text: str | None) -> str | None:
    return None if text is None else _letters(text)


Pair = tuple[str | None, str | None]  # history and reference


def _matched(
    found: Found,
    left: list[int],
    parts: tuple[int, ...],
    theirs: list[Pair],
    ours: Sequence[Pair],
    replies: Sequence[Reply],
) -> list[int]:
    """Put the replies of the rows `left` beside free items that agree in `parts`; returns what is still
    left."""
    places: dict[tuple, list[int]] = {}
    for n, pair in enumerate(ours):
        places.setdefault(tuple(pair[part] for part in parts), []).append(n)
    asked = Counter(tuple(theirs[row][part] for part in parts) for row in left)
    rest = []
    for row in left:
        name = tuple(theirs[row][part] for part in parts)
        items = places.get(name, [])
        free = [n for n in items if n not in found]
        # of items that agree in both one is as good as the other; in one of the two it must be the only one
        if None in name or not free or (len(parts) == 1 and (len(items) > 1 or asked[name] > 1)):
            rest.append(row)
        else:
            found[free[0]] = [replies[row]]
    return rest


def _between(
    found: Found, left: list[int], theirs: list[Pair], ours: Sequence[Pair], replies: Sequence[Reply]
) -> list[int]:
    """Match replies by a reference that several items have, where the replies before and after them in a file
    without histories leave one such item between theirs; returns what is still left."""
    number = {id(reply): n for n, several in found.items() for reply in several}
    at = [number.get(id(reply)) for reply in replies]
    rest = []
    for row in left:
        before = next((n for n in reversed(at[:row]) if n is not None), -1)
        after = next((n for n in at[row + 1 :] if n is not None), len(ours))
        fits = [n for n in range(before + 1, after) if n not in found and ours[n][1] == theirs[row][1]]
        if theirs[row][0] is None and len(fits) == 1:
            found[fits[0]], at[row] = [replies[row]], fits[0]
        else:
            rest.append(row)
    return rest


# ------------------------------------------------------------------------------------------------- item sets


def item_set(examples: Sequence[Example], which: str, systems: Sequence[System] = ()) -> list[int]:
    """Numbers of the listener turns of a set, ascending: all; the last of each conversation; the others;
    those that every one of `systems` answers."""
    everything = list(range(len(examples)))
    if which == "all":
        return everything
    if which == "shared":
        answered = [set(system.numbers) for system in systems]
        numbers = sorted(set(everything).intersection(*answered))
        if not numbers:
            counts = ", ".join(f"{s.name} {len(s.numbers):,}" for s in systems)
            raise UserError(f"--items shared: no item is answered by every system ({counts}); leave some out")
        return numbers
    last = {e.conv_id: n for n, e in enumerate(examples)}
    wanted = set(last.values())
    if which == "last":
        return sorted(wanted)
    if which == "non-last":
        return [n for n in everything if n not in wanted]
    raise UserError(f"--items {which}: must be one of {', '.join(ITEM_SETS)}")


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
    """The same system on the items `numbers`, all of which it answers, in their order; its perplexities are
    those of these items, and none where some are unknown."""
    place = {n: i for i, n in enumerate(system.numbers)}
    chosen = [place[n] for n in numbers]
    known = {n: system.likelihoods[n] for n in numbers if n in system.likelihoods}
    return dataclasses.replace(
        system,
        replies=[system.replies[i] for i in chosen],
        numbers=list(numbers),
        samples=None if system.samples is None else [system.samples[i] for i in chosen],
        likelihoods=known,
        perplexities=perplexities(known.values()) if len(known) == len(numbers) else {},
    )


def set_hash(examples: Sequence[Example], numbers: Sequence[int]) -> str:
    """12 hexadecimal digits of the items' ids and gold replies: equal on equal items only, in any order."""
    items = sorted([*examples[n].key, examples[n].response] for n in numbers)
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]
