"""People's own dialogues as a corpus: jsonl or csv -> the official layout, which every later stage reads.

A jsonl holds a dialogue a line: its turns in order, each with a speaker and a text, or texts alone that
alternate. A csv holds a turn a row, the rows of a conversation together and in order. Id, emotion and split
are optional.
"""

import csv
import io
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import DIALOGUE_COLUMNS, EMOTIONS
from options import SPLITS, UserError
from records import FORMATS, Records, format_of, read_records
from turns import NAMES, Cast, a_turn, cast, pick, require_order, said_by, word

COLUMNS = ("conversation", "speaker", "text")  # that a csv must have
#: what a split is called in people's files
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
#: columns without which a csv is no official dialogue file
OFFICIAL = {"conv_id", "utterance_idx", "context", "speaker_idx", "utterance"}
SHARE_HELD_OUT = 0.1  # of the dialogues, for each of valid and test, where a split is drawn


@dataclass(frozen=True)
class Dialogue:
    """One dialogue as it stands in a file."""

    place: str  # file and line, for messages
    name: str
    turns: Sequence[tuple[str, str]]  # (speaker, text), oldest first
    emotion: str  # "" for none
    split: str  # "" for none


# ---------------------------------------------------------------------------------------------------- reading


def files_in(source: Path) -> list[Path]:
    """The files of a `--source` that hold own dialogues: none where it is a folder of official files."""
    if source.is_file():
        return [source]
    official_names = ("empathetic_dialogues", "empatheticdialogues", "train.csv.gz")
    if any((source / name).exists() for name in official_names):
        return []
    there = [f for f in sorted(source.iterdir()) if f.is_file() and not f.name.endswith("-reddit.csv")]
    found = [f for f in there if f.suffix.lower() in FORMATS]
    tables = {f: set(header(f)) for f in found if format_of(f) != "jsonl"}
    if any(columns >= OFFICIAL for columns in tables.values()):
        return []

    def has_all(columns: set[str]) -> bool:
        return all(columns & set(NAMES[part]) for part in COLUMNS)

    def meant(file: Path) -> bool:
        """With these columns under whatever separator: reading it says that another is expected."""
        headers = (set(header(file, sign)) for sign in ",\t;|")
        return file not in tables or any(has_all(h) and not h >= OFFICIAL for h in headers)

    chosen = [f for f in found if meant(f)]
    for file in there if chosen else ():
        if file not in chosen and not file.name.startswith("."):
            why = (
                f"no columns for {', '.join(COLUMNS)}"
                if file in tables
                else "not one of " + ", ".join(FORMATS)
            )
            print(f"warning: {file}: left out, {why}")
    if not chosen and not meant_as_official(source / "train.csv"):
        return found  # reading them says what they lack
    return chosen


def meant_as_official(file: Path) -> bool:
    """Whether there is such a csv with most of the official columns, or with all of them and another
    separator; whoever reads the official files says what is wrong with it."""
    if not file.is_file():
        return False
    with open(file, "rb") as handle:
        if handle.read(2) == b"\x1f\x8b":
            return True  # packed, as own dialogues never are
    most = len(OFFICIAL.intersection(header(file))) > len(OFFICIAL) / 2
    return most or any(OFFICIAL.issubset(header(file, sign)) for sign in "\t;|")


def header(file: Path, delimiter: str | None = None) -> list[str]:
    """The columns of a csv in small letters; whatever it holds, this is no error."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as handle:
        line = handle.readline()
    delimiter = delimiter or ("\t" if format_of(file) == "tsv" else ",")
    return [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]


def read(file: Path) -> list[Dialogue]:
    """Every dialogue of a jsonl, csv or tsv. Raises `UserError` that names the line and what is wrong."""
    kind = format_of(file)
    if kind == "text":
        raise UserError(f"{file}: own dialogues are read from a file that ends in {', '.join(FORMATS)}")
    records = read_records(file)
    found = of_lines(records) if kind == "jsonl" else of_rows(records)
    by_name: dict[str, str] = {}
    for dialogue in found:
        if dialogue.name in by_name:
            remedy = "give each its own id"
            if kind != "jsonl":
                remedy = "keep the rows of a conversation together, and give another one another id"
            raise UserError(
                f"{dialogue.place}: conversation {dialogue.name[:40]} was there already "
                f"({by_name[dialogue.name]}); {remedy}"
            )
        by_name[dialogue.name] = dialogue.place
    return found


def of_lines(records: Records) -> list[Dialogue]:
    """The dialogues of a jsonl."""
    found = []
    for row, line in zip(records.rows, records.lines, strict=True):
        place = f"{records.place}, line {line}"
        turns = pick(row, "turns")
        if turns == []:
            raise UserError(f"{place}: its list of turns is empty; leave the dialogue out")
        if not isinstance(turns, list):
            raise UserError(
                f"{place}: no list of turns; it stands under one of {', '.join(NAMES['turns'])} "
                f"(found: {', '.join(row)[:200]})"
            )
        said = said_by(turns, place)
        name = word(pick(row, "id"), "id", place) or f"{Path(records.place).stem}:{line}"
        found.append(Dialogue(place, name, said, emotion_of(row, place), split_of(row, place)))
    return found


def of_rows(records: Records) -> list[Dialogue]:
    """The dialogues of a csv."""
    known = set(records.small_names().values())
    if missing := [part for part in COLUMNS if not known & set(NAMES[part])]:
        wanted = "; ".join(f"no column for the {p}: name it one of {', '.join(NAMES[p])}" for p in missing)
        found_here = f"(found: {', '.join(records.columns)[:200]})"
        raise UserError(f"{records.place}, line 1: {wanted} {found_here}")
    numbered = list(zip(records.rows, records.lines, strict=True))
    found = []
    for name, group in itertools.groupby(numbered, key=lambda pair: str(pick(pair[0], "conversation"))):
        rows = list(group)
        place = f"{records.place}, line {rows[0][1]}"
        if not name.strip():
            raise UserError(f"{place}: no conversation; number the conversations")
        require_order([(row, f"{records.place}, line {line}") for row, line in rows])
        turns = [a_turn(row, n, f"{records.place}, line {line}") for n, (row, line) in enumerate(rows)]
        first = rows[0][0]
        emotion, split = emotion_of(first, place), split_of(first, place)
        for row, line in rows[1:]:
            here = f"{records.place}, line {line}"
            for what, mine, other in (
                ("emotion", emotion_of(row, here), emotion),
                ("split", split_of(row, here), split),
            ):
                if mine != other:
                    raise UserError(
                        f"{here}: {what} {mine!r} in a conversation of {other!r}; it is one for a whole "
                        "conversation: repeat it in each row, or leave the column out"
                    )
        found.append(Dialogue(place, name.strip(), turns, emotion, split))
    return found


def emotion_of(row: Mapping[str, Any], place: str) -> str:
    """One of the corpus's 32, or "" for none."""
    emotion = word(pick(row, "emotion"), "emotion", place).lower()
    if emotion and emotion not in EMOTIONS:
        raise UserError(
            f"{place}: unknown emotion {emotion[:40]!r}; rename it to one of {', '.join(EMOTIONS)}, or leave "
            "emotions out"
        )
    return emotion


def split_of(row: Mapping[str, Any], place: str) -> str:
    split = word(pick(row, "split"), "split", place).lower()
    if split and split not in SPLIT_NAMES:
        raise UserError(f"{place}: unknown split {split[:40]!r}; the known ones are {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES.get(split, "")


# -------------------------------------------------------------------------------------------------- a split


def draw_splits(said: Sequence[tuple[str, ...]], seed: int) -> list[str]:
    """A split for each dialogue: a tenth is valid, a tenth test, at least one each. Equal dialogues share it,
    where there are enough others."""
    if len(set(said)) < len(SPLITS):
        said = [(str(n), *texts) for n, texts in enumerate(said)]
    different = list(dict.fromkeys(said))
    count = len(different)
    held = max(1, round(SHARE_HELD_OUT * count))
    order = random.Random(seed).sample(range(count), count)
    splits = dict.fromkeys(different, "train")
    for place in order[:held]:
        splits[different[place]] = "valid"
    for place in order[held : 2 * held]:
        splits[different[place]] = "test"
    return [splits[texts] for texts in said]


def splits_of(
    dialogues: Sequence[Dialogue], said: Sequence[tuple[str, ...]], seed: int
) -> tuple[list[str], str]:
    """(the split of each dialogue, how it came about): as given, or drawn where no dialogue has one. `said`:
    the turns of each."""
    if len(dialogues) < len(SPLITS):
        raise UserError(
            f"{dialogues[0].place}: {len(dialogues)} dialogues with a reply; training, validation and test "
            "need at least one each"
        )
    without = [d for d in dialogues if not d.split]
    if len(without) == len(dialogues):
        return draw_splits(said, seed), f"drawn by dialogue, seed {seed}"
    if without:
        raise UserError(f"{without[0].place}: no split, but others have one; give it to all or none")
    for split in SPLITS:
        if all(d.split != split for d in dialogues):
            raise UserError(
                f"{dialogues[0].place}: no dialogue of the split {split}; give it some, or leave the splits "
                "out, and one is drawn"
            )
    return [d.split for d in dialogues], "as given"


# ------------------------------------------------------------------------------------------------- converting


def read_all(files: Sequence[Path]) -> list[Dialogue]:
    """The dialogues of all files, with names that differ; a file's name can be its split (dev.jsonl)."""
    found = []
    stems = [file.stem for file in files]
    for file in files:
        called = file.stem if stems.count(file.stem) == 1 else file.name  # chats.csv beside chats.jsonl
        of_name = SPLIT_NAMES.get(file.stem.lower(), "") if len(files) > 1 else ""
        for d in read(file):
            name = f"{called}:{d.name}" if len(files) > 1 else d.name
            found.append(Dialogue(d.place, name, d.turns, d.emotion, d.split or of_name))
    return found


def convert(files: Sequence[Path], folder: Path, listener: str | None, seed: int) -> dict[str, Any]:
    """{train,valid,test}.csv in `folder`, in the official columns; says what was joined and left out.

    Returns what is to be recorded: how many dialogues each split has, how it came about, whether there are
    emotions. Raises `UserError` with the file and line of what cannot be read.
    """
    dialogues = read_all(files)
    casts = {d.name: cast(d.turns, d.place, listener) for d in dialogues}
    answered = [d for d in dialogues if len(casts[d.name].texts) > 1]
    if not answered:
        raise UserError(f"{files[0]}: no dialogue has a reply: a second speaker after the first")
    said = [tuple(casts[d.name].texts) for d in answered]
    splits, how = splits_of(answered, said, seed)
    emotions = all(d.emotion for d in answered)

    def count(chosen: Sequence[Dialogue], what: str) -> None:
        if chosen:
            print(f"  {len(chosen):,} {what} (the first: {chosen[0].place})")

    turns = sum(len(casts[d.name].texts) for d in answered)
    print(f"  {', '.join(map(str, files))}: {len(answered):,} dialogues, {turns:,} turns")
    joined = sum(c.joined for c in casts.values())
    count(
        [d for d in dialogues if casts[d.name].joined],
        f"with consecutive turns of one person: {joined} joined",
    )
    count([d for d in dialogues if casts[d.name].opening], "where the listener begins: that turn left out")
    count([d for d in dialogues if len(casts[d.name].texts) < 2], "without a reply: left out")
    listen = {casts[d.name].people[1] for d in answered}
    both = [d for d in answered if casts[d.name].people[0] in listen]
    who = ", ".join(sorted({casts[d.name].people[0] for d in both})[:3])
    count(
        both,
        f"whose speaker listens in others ({who}): replies of both are learnt; --listener NAME says whose "
        "should be",
    )
    first = {texts: n for n, texts in reversed([*enumerate(said)])}
    again = [n for n, texts in enumerate(said) if first[texts] != n]
    across = [n for n in again if splits[n] != splits[first[said[n]]]]
    count([answered[n] for n in again], "stand there before, word for word")
    count([answered[n] for n in across], "of these in another split: what is tested was learnt")
    if not emotions and (some := [d for d in answered if d.emotion]):
        count(some, f"of {len(answered):,} have an emotion: none is used; give it to all, or to none")
    sizes = {split: splits.count(split) for split in SPLITS}
    shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    print(
        f"  split {how}: {shown}" + ("" if emotions else "; no emotions: exemplars come from all dialogues")
    )
    for split in SPLITS:
        chosen = [d for d, own in zip(answered, splits, strict=True) if own == split]
        (folder / f"{split}.csv").write_text(official(chosen, casts, emotions), encoding="utf-8")
    return {"dialogues": sizes, "split": how, "emotions": emotions, "listener": listener, "joined": joined}


def official(dialogues: Sequence[Dialogue], casts: Mapping[str, Cast], emotions: bool) -> str:
    """A dialogue file in the official columns, every cell in quotation marks."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(DIALOGUE_COLUMNS)
    for d in dialogues:
        for n, text in enumerate(casts[d.name].texts):
            writer.writerow((d.name, n + 1, d.emotion if emotions else "", "", n % 2, text))
    return out.getvalue()
