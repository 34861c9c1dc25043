"""The csv files of dialogues, pairs, labels, exemplars and replies -> validated rows.

Every reader either returns every row of its file or raises `UserError` naming file and line. Dialogues are
joined with labels and exemplars on (conv_id, utterance_idx), so an ablation swaps one file.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from advice import makes
from options import DIMENSIONS, UserError
from storage import hash_seed
from tabular import WHOLE_OR_FLOAT, as_index, as_whole, numbers_of, read_rows

EMOTIONS = (
    "afraid angry annoyed anticipating anxious apprehensive ashamed caring confident content devastated "
    "disappointed disgusted embarrassed excited faithful furious grateful guilty hopeful impressed "
    "jealous joyful lonely nostalgic prepared proud sad sentimental surprised terrified trusting"
).split()
DIALOGUE_COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance")
RAW_PAIR_COLUMNS = ("sp_id", "rp_id", "seeker_post", "response_post", "level")
PAIR_COLUMNS = (*RAW_PAIR_COLUMNS, "label")
VADER_COLUMNS = ("conv_id", "utterance_idx", "utterance", "sentiment")
LABEL_COLUMNS = ("conv_id", "utterance_idx", *DIMENSIONS, "sentiment", "utterance")
EXEMPLAR_COLUMNS = (
    "conv_id",
    "utterance_idx",
    "emotion",
    "history",
    "utterance",
    "exemplars",
    "exemplars_index",
    "scores",
)
#: the longest utterance index that is believed; guards against absurd numbers in damaged files
MAX_TURNS = 10_000


#: the columns of the official dialogue files, whose valid and test carry candidates in a ninth without a name
OFFICIAL_COLUMNS = (*DIALOGUE_COLUMNS, "selfeval", "tags")
#: the official selfeval: the grades of both persons, 5|5|5_2|2|5
GRADES = re.compile(r"[0-9]*[|_][0-9|_]*")


def _not_official(header: list[str], rows: list[list[str]]) -> Callable[[list[str]], str | None]:
    """A function that says why a row cannot be of the official dialogue format, which has no quoting.

    There a comma in a text is written _comma_. A bare one moves all that follows by a place, so what stands
    behind the utterance tells: the grades, and at most one cell more than the header (the candidates of valid
    and test).
    """
    width = len(header)
    least = 1 + max(header.index(c) for c in DIALOGUE_COLUMNS)
    speaker_place = header.index("speaker_idx")
    official = tuple(header) == OFFICIAL_COLUMNS
    # an empty ninth cell is a column where every row has it, and else an utterance that ends in a comma
    ninth = len(rows) > 1 and all(len(row) == width + 1 for row in rows)

    def moved(row: list[str]) -> bool:
        surplus = len(row) - width
        if not official:
            return surplus != 0
        grades = row[6] if len(row) > 6 else ""
        graded = grades == "" or GRADES.fullmatch(grades) is not None
        speaker = row[speaker_place]
        if surplus == 0:
            return speaker.startswith(" ") or (grades.startswith(" ") and not graded)
        # a row may lack its last columns, so that a bare comma fills them
        if surplus > 1 or not graded or not WHOLE_OR_FLOAT.fullmatch(speaker):
            return True
        return surplus == 1 and not (grades or row[8] or ninth)

    def why_not(row: list[str]) -> str | None:
        if len(row) < least:
            return f"{len(row)} columns, expected {width}"
        opened = len(row) > width and any(c.startswith('"') and c.count('"') == 1 for c in row[:width])
        if not moved(row) and not opened:
            return None
        return (
            f"{len(row)} columns under a header of {width}, and they are not the official format's: a text "
            "has a comma in it; write commas as _comma_ (official), or each text with a comma in quotation "
            "marks (pandas, Excel)"
        )

    return why_not


@dataclass(frozen=True)
class Example:
    """One turn to be written, mostly a listener's: everything said before, and what was said then."""

    conv_id: str
    utterance_idx: int  # 1-based; listener turns are even, the speaker's odd
    emotion: str
    history: tuple[str, ...]  # oldest turn first; speaker and listener alternate, the speaker begins
    response: str

    @property
    def key(self) -> tuple[str, int]:
        return self.conv_id, self.utterance_idx


def read_dialogues(path: Path, made_by: str | None = "python prepare_data.py") -> pd.DataFrame:
    """An EmpatheticDialogues csv, checked: `_comma_` replaced, utterance_idx as int, speakers in turn.

    The official format (no quoting, commas as `_comma_`) or quoted as pandas and Excel do.
    """
    table = read_rows(path, DIALOGUE_COLUMNS, made_by=made_by, unquoted=_not_official)
    table["utterance_idx"] = numbers_of(table, path, "utterance_idx", kind=as_index, low=1, high=MAX_TURNS)
    known = set(EMOTIONS)
    if not any(table["context"]):
        known.add("")  # own dialogues without emotions (own_dialogues.py)
    for emotion, line in zip(table["context"], table["line"], strict=True):
        if emotion not in known:
            raise UserError(
                f"{path}, line {line}: unknown emotion {emotion[:40]!r}; "
                f"the 32 known are {', '.join(EMOTIONS)}"
            )
    for column in ("prompt", "utterance"):
        table[column] = table[column].str.replace("_comma_", ",", regex=False).str.strip()
    finished: set[str] = set()
    for conv, turns in _consecutive(table):
        if conv in finished:
            raise UserError(
                f"{path}, line {turns[0].line}: conversation {conv} goes on after another began; "
                "keep its rows together"
            )
        finished.add(conv)
        _check_conversation(path, conv, turns)
    return table


def _consecutive(table: pd.DataFrame) -> Iterator[tuple[str, list]]:
    """(conv_id, its rows) for each run of rows with one conv_id."""
    for conv, turns in itertools.groupby(table.itertuples(index=False), key=lambda row: row.conv_id):
        yield conv, list(turns)


def _check_conversation(path: Path, conv: str, turns: list) -> None:
    """Turns count from 1 and hold text, and nobody follows on himself: the even ones become the replies."""
    speakers = [turn.speaker_idx.strip() for turn in turns]
    for expected, (turn, speaker) in enumerate(zip(turns, speakers, strict=True), start=1):
        fault = None
        if turn.utterance_idx != expected:
            fault = (
                f"has utterance_idx {turn.utterance_idx}, expected {expected} (a gap or a repeat); "
                "count them anew from 1"
            )
        elif not turn.utterance:
            fault = "has an empty utterance; fill it in, or take the turn out and count utterance_idx anew"
        elif not speaker:
            fault = "has no speaker_idx; number its two speakers, for example 0 and 1"
        elif expected > 1 and speaker == speakers[expected - 2]:
            fault = (
                f"has speaker {speaker[:40]} twice in a row, so that the turn is no reply; join the two "
                "turns into one and count utterance_idx anew, or mend speaker_idx"
            )
        if fault:
            raise UserError(f"{path}, line {turn.line}: conversation {conv} {fault}")


def listener_turns(path: Path) -> list[Example]:
    """Every listener turn (even utterance_idx) of a dialogue file with its history, in file order."""
    return list(_answers(path, _as_written(path), every=2))


def all_turns(path: Path) -> list[Example]:
    """The same with the speaker's turns, each dialogue's first left out, which answers nothing. Whose turn an
    example is, its history tells: the last to have spoken is the other one."""
    return list(_answers(path, _as_written(path), every=1))


def _as_written(path: Path) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    return path.stat().st_mtime_ns, path.stat().st_size


@functools.lru_cache(maxsize=4)  # a training asks for its dialogues up to four times, seconds each
def _answers(path: Path, written: tuple[int, int], every: int) -> tuple[Example, ...]:
    examples = []
    for conv_id, turns in read_dialogues(path).groupby("conv_id", sort=False):
        texts = turns["utterance"].tolist()
        emotion = turns["context"].iloc[0]
        for i in range(1, len(texts), every):
            examples.append(Example(str(conv_id), i + 1, emotion, tuple(texts[:i]), texts[i]))
    if not examples:
        raise UserError(
            f"{path}: no conversation has a listener turn, its second; one turn alone has no reply"
        )
    return tuple(examples)


def _keyed(table: pd.DataFrame, path: Path, made_by: str) -> list[tuple[str, int]]:
    """(conv_id, utterance_idx) of each row; a repeat is an error."""
    indices = numbers_of(table, path, "utterance_idx", kind=as_index, low=1, high=MAX_TURNS)
    keys = list(zip(table["conv_id"], indices, strict=True))
    if len(set(keys)) < len(keys):
        place = int(pd.Series(keys).duplicated().argmax())
        raise UserError(
            f"{path}, line {table['line'][place]}: {keys[place][0]}, utterance {keys[place][1]} stands there "
            f"twice; make it again with: {makes(path, made_by)}"
        )
    return keys


def _covering(found: dict, examples: Sequence[Example], path: Path, made_by: str) -> list:
    """The value of every example's key, in order; an uncovered example is an error."""
    missing = [e.key for e in examples if e.key not in found]
    if missing:
        raise UserError(
            f"{path}: covers {len(examples) - len(missing):,} of {len(examples):,} listener turns "
            f"(first missing: {missing[0][0]}, utterance {missing[0][1]}); make it again with: "
            f"{makes(path, made_by)}"
        )
    return [found[e.key] for e in examples]


def read_pairs(path: Path, raw: bool = False, made_by: str | None = "python prepare_data.py") -> pd.DataFrame:
    """Empathy Mental Health pairs. `raw`: the official csv (a level, no label yet)."""
    table = read_rows(path, RAW_PAIR_COLUMNS if raw else PAIR_COLUMNS, made_by=made_by)
    table["level"] = numbers_of(table, path, "level", kind=as_index if raw else as_whole, low=0, high=2)
    if not raw:
        table["label"] = numbers_of(table, path, "label", low=0, high=2)
    for column in ("seeker_post", "response_post"):
        table[column] = table[column].str.strip()
    return table


def in_one_spacing(text: str) -> str:
    """By which a text is known: the official files space the same one differently in each dimension."""
    return " ".join(text.split())


def choose_pairs(
    train: pd.DataFrame, valid: pd.DataFrame, split_by: str, part: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs that a critic learns from, and those it is measured on.

    `split_by` "files": as they were prepared; "seeker": a fifth of all seeker posts, chosen by their text,
    is the validation side. `part` "a" or "b": only that half of the training side, again by the text of the
    seeker posts, so that critics of the two halves share none, in any dimension.
    """
    if split_by == "seeker":
        both = pd.concat([train, valid], ignore_index=True)
        held = both["seeker_post"].map(lambda post: hash_seed("valid", in_one_spacing(post)) % 5 == 0)
        train, valid = both[~held], both[held]
    if part != "all":
        half = train["seeker_post"].map(lambda post: "ab"[hash_seed("part", in_one_spacing(post)) % 2])
        train = train[half == part]
    return train, valid


def read_vader(path: Path) -> pd.DataFrame:
    """Every utterance with its VADER compound score in [-1, 1]."""
    table = read_rows(path, VADER_COLUMNS, made_by="python prepare_data.py")
    table["sentiment"] = numbers_of(table, path, "sentiment", kind=float, low=-1, high=1)
    return table


def read_sentiment(path: Path, examples: Sequence[Example]) -> list[float]:
    """The VADER score of the reply of each of `examples`."""
    table, made_by = read_vader(path), "python prepare_data.py"
    found = dict(zip(_keyed(table, path, made_by), table["sentiment"], strict=True))
    return _covering(found, examples, path, made_by)


def read_labels(path: Path, examples: Sequence[Example]) -> dict[str, list]:
    """{emo, exp, int: list of int; sentiment: list of float}, one entry for each of `examples`."""
    made_by = "python label_dialogues.py"
    table = read_rows(path, LABEL_COLUMNS[:-1], made_by=made_by)
    keys = _keyed(table, path, made_by)
    labels = {}
    for column in (*DIMENSIONS, "sentiment"):
        # three levels of empathy; VADER's compound score
        limits = {"kind": float, "low": -1, "high": 1} if column == "sentiment" else {"low": 0, "high": 2}
        found = dict(zip(keys, numbers_of(table, path, column, **limits), strict=True))
        labels[column] = _covering(found, examples, path, made_by)
    return labels


def read_exemplars(path: Path, examples: Sequence[Example], top: int | None = None) -> list[list[str]]:
    """The texts of at most `top` exemplars (None: all) for each of `examples`, best first."""
    made_by = "python dpr_exemplar_retriever.py"
    table = read_rows(path, ("conv_id", "utterance_idx", "exemplars"), made_by=made_by)
    texts = []
    for text, line in zip(table["exemplars"], table["line"], strict=True):
        try:
            row = json.loads(text)
            json.dumps(row, ensure_ascii=False).encode()  # refuses lone surrogates
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, list) or not all(isinstance(t, str) for t in row):
            raise UserError(
                f"{path}, line {line}: exemplars is not a JSON list of texts; make it again with: "
                f"{makes(path, made_by)}"
            )
        texts.append(row[:top])
    found = dict(zip(_keyed(table, path, made_by), texts, strict=True))
    return _covering(found, examples, path, made_by)
