"""csv -> validated rows -> token ids -> batches. Knows columns and collation, and no model.

Every reader either returns every row of its file or raises `UserError` naming file and line. Dialogues are
joined with labels and exemplars on (conv_id, utterance_idx), so an ablation swaps one file.
"""

import csv
import gzip
import io
import itertools
import json
import math
import re
import shlex
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from advice import makes
from options import DIMENSIONS, UserError
from storage import cached, decode, fingerprint

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
PREDICTION_COLUMNS = ("conv_id", "utterance_idx", "response")
#: stands before each exemplar in the source; plain words, so that a pretrained tokenizer knows them too
EXEMPLAR_MARKER = "example:"
#: the longest utterance index that is believed; guards against absurd numbers in damaged files
MAX_TURNS = 10_000


# -------------------------------------------------------------------------------------------------- reading

#: the columns of the official dialogue files, whose valid and test carry candidates in a ninth without a name
OFFICIAL_COLUMNS = (*DIALOGUE_COLUMNS, "selfeval", "tags")
#: the official selfeval: the grades of both persons, 5|5|5_2|2|5
GRADES = re.compile(r"[0-9]*[|_][0-9|_]*")
WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
#: pandas writes whole numbers as 2.0 where a cell of the column is empty
WHOLE_OR_FLOAT = re.compile(r"\s*[0-9]+(?:\.0*)?\s*")
SEPARATORS = {"commas": ",", "semicolons": ";", "tabs": "\t", "vertical bars": "|", "tildes": "~"}
#: what tokenizers write for their control tokens
CONTROL_TOKEN = re.compile(
    r"</?s>|<pad>|<unk>|<mask>|<[be]os>|<extra_id_\d+>|\[(?:PAD|SEP|CLS|UNK|MASK)\]|<\|\w+\|>"
)

Row = tuple[list[str], int]  # the cells, and the 1-based line at which they end
#: a format without quoting: (header, all rows) -> a function that says why one row cannot be of it, or None
Format = Callable[[list[str], list[list[str]]], Callable[[list[str]], str | None]]


def read_rows(
    path: Path,
    columns: Sequence[str],
    *,
    made_by: str | None,
    delimiter: str = ",",
    unquoted: Format | None = None,
) -> pd.DataFrame:
    """All rows of a csv (plain or gzip) as text, with the 1-based `line` each one ends at.

    Quoting is the usual one of csv files (pandas, Excel). `unquoted` allows a format without quoting besides;
    which of both a file has follows from its rows. A row that is neither, a missing column and an empty file
    are errors: no text is cut in silence.
    `made_by` is the command that writes this file, for messages; None where it is the user's own.
    """
    path = Path(path)
    remedy = f"make it again with: {makes(path, made_by)}" if made_by else "save or fetch it again"
    if not path.exists():
        raise UserError(f"{path}: no such file; {remedy}")
    text = decode(file_content(path, remedy), path)
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), None)
        if header is None:
            raise UserError(f"{path}: the file is empty; {remedy}")
        places = _places(path, header, columns, text, delimiter)
        if unquoted is None:
            rows = _quoted_rows(path, text, delimiter, header, remedy)
        else:
            rows = _rows_of_either_format(path, text, delimiter, header, places, unquoted, remedy)
    except csv.Error as error:
        raise UserError(f"{path}, line {_line_of(error)}: cannot be read ({error}); {remedy}") from error
    if not rows:
        raise UserError(f"{path}: no rows under the header; {remedy}")
    table = pd.DataFrame([[row[p] for p in places] for row, _ in rows], columns=list(columns), dtype=object)
    table["line"] = [line for _, line in rows]
    return table


def file_content(path: Path, remedy: str) -> bytes:
    """The bytes of a plain or gzip file, whatever its name ends with."""
    pieces = []
    try:
        with open(path, "rb") as handle:
            packed = path.suffix == ".gz" or handle.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as handle:
            while piece := handle.read(1 << 20):
                pieces.append(piece)
    except (OSError, EOFError, zlib.error) as error:
        line = sum(piece.count(b"\n") for piece in pieces) + 1
        raise UserError(f"{path}, line {line}: cannot be read ({error}); {remedy}") from error
    return b"".join(pieces)


def _places(path: Path, header: list[str], columns: Sequence[str], text: str, delimiter: str) -> list[int]:
    """Where each of `columns` stands in the header; a file with another separator is told so."""
    missing = [c for c in columns if c not in header]
    if missing:
        wanted = next(name for name, sign in SEPARATORS.items() if sign == delimiter)
        for name, sign in SEPARATORS.items():
            # Excel may say its separator in a line of its own
            for line in text.splitlines()[: 2 if text.startswith("sep=") else 1]:
                if sign != delimiter and set(columns) <= set(next(csv.reader([line], delimiter=sign), [])):
                    raise UserError(
                        f"{path}, line 1: separated by {name}, expected {wanted}; convert it with: "
                        f"{_converting(path, sign, delimiter)}"
                    )
        raise UserError(
            f"{path}, line 1: missing column {', '.join(missing)} (found: {', '.join(header)[:200]})"
        )
    twice = [c for c in columns if header.count(c) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column {', '.join(twice)} stands there twice")
    return [header.index(c) for c in columns]


def _converting(path: Path, found: str, wanted: str) -> str:
    """A command that writes the file with another separator, every cell as it is."""
    new = path.with_name(f"{path.name.removesuffix(path.suffix)}-converted{path.suffix}")
    code = (
        f"import pandas; pandas.read_csv({str(path)!r}, sep={found!r}, dtype=str, keep_default_na=False)"
        f".to_csv({str(new)!r}, sep={wanted!r}, index=False)"
    )
    return f"python -c {shlex.quote(code)}"


def _parse(text: str, delimiter: str, quoted: bool) -> list[Row]:
    """Every row below the header that is not blank; csv.Error with the line as its second argument."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    rows, line = [], 0
    try:
        for row in reader:
            line = reader.line_num
            if row:
                rows.append((row, line))
    except csv.Error as error:
        raise csv.Error(str(error), line + 1) from error
    return rows[1:]


def _line_of(error: csv.Error) -> int:
    return error.args[1] if len(error.args) > 1 else 1


def _quoted_rows(path: Path, text: str, delimiter: str, header: list[str], remedy: str) -> list[Row]:
    """The rows of a file with the usual quoting: as many cells each as the header has."""
    rows = _parse(text, delimiter, quoted=True)
    for row, line in rows:
        if len(row) != len(header):
            name = next(name for name, sign in SEPARATORS.items() if sign == delimiter)
            raise UserError(
                f"{path}, line {line}: {len(row)} columns, expected {len(header)}; a text with {name} "
                f"in it stands in quotation marks, or: {remedy}"
            )
    return rows


def _rows_of_either_format(
    path: Path,
    text: str,
    delimiter: str,
    header: list[str],
    places: list[int],
    unquoted: Format,
    remedy: str,
) -> list[Row]:
    """The rows of a file that may be of a format without quoting, or quoted as usual.

    Quoted where the header is, where only that reading gives every row the header's shape, or where the marks
    themselves show it; else without quoting, and then each row must be able to be that.
    """
    raw_header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE))
    if raw_header != header:
        return _quoted_rows(path, text, delimiter, header, remedy)
    raw = _parse(text, delimiter, quoted=False)
    why_not = unquoted(header, [row for row, _ in raw])
    faults = {line: fault for row, line in raw if (fault := why_not(row))}
    line, fault = next(iter(faults.items()), (0, None))
    if '"' in text:
        quoted = _sound_quoted_rows(text, delimiter, header)
        # quoting explains a fault only where it changes the row
        before = {line: row for row, line in raw if line in faults}
        explained = quoted is not None and not any(before.get(line) == row for row, line in quoted)
        if quoted and explained and (fault or _marks_are_quoting(raw, quoted, places)):
            return quoted
        if not fault and ('""' in text or '\\"' in text):
            line, fault = _looks_quoted(raw)
    if fault:
        raise UserError(f"{path}, line {line}: {fault}")
    return raw


def _sound_quoted_rows(text: str, delimiter: str, header: list[str]) -> list[Row] | None:
    """The rows read with the usual quoting, or None where a row then has another shape than the header."""
    try:
        rows = _parse(text, delimiter, quoted=True)
    except csv.Error:
        return None
    index = header.index("utterance_idx")
    if all(len(row) == len(header) and WHOLE_OR_FLOAT.fullmatch(row[index]) for row, _ in rows):
        return rows
    return None


def _marks_are_quoting(raw: list[Row], quoted: list[Row], places: list[int]) -> bool:
    """Whether quotation marks belong to the format, where both readings give rows of the right shape.

    A writer that quotes doubles the marks inside, and leaves none in a cell that it has not quoted; or it
    quotes every cell of a column.
    """
    if len(raw) != len(quoted):  # a mark without its partner has swallowed line ends
        return False
    doubled, whole_columns = False, set(places)
    for (raw_row, _), (row, _) in zip(raw, quoted, strict=True):
        if len(raw_row) != len(row):
            return False
        for place, (before, after) in enumerate(zip(raw_row, row, strict=True)):
            if before == after:
                whole_columns.discard(place)
                if '"' in before:
                    return False
            elif '""' in before[1:-1]:
                doubled = True
    return doubled or (bool(whole_columns) and len(raw) > 1)


def _looks_quoted(rows: list[Row]) -> tuple[int, str | None]:
    """The first cell that some writer has quoted, in a file that is not quoted as a whole."""
    for row, line in rows:
        for cell in row:
            inside = cell[1:-1]
            if inside and cell[0] == cell[-1] == '"' and ('""' in inside or '\\"' in inside):
                return line, (
                    f"{cell[:40]!r} is quoted, but the file as a whole is not readable with quotation marks "
                    "as pandas and Excel write them (doubled inside); write it again with one way of quoting"
                )
    return 0, None


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


def _number(text: str, path: Path, line: int, column: str, kind=int, low=-math.inf, high=math.inf):
    """`text` as a number of `kind` in [low, high], or an error that says where it stands."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        what = "a number" if kind is float else "a whole number"
        raise UserError(
            f"{path}, line {line}: {column} is {text[:40]!r}, expected {what} from {low} to {high}"
        )
    return value


def _whole(text: str) -> int:
    if not WHOLE.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _index(text: str) -> int:
    """A whole number; pandas writes 2 as 2.0 where a cell of the column is empty."""
    if not WHOLE_OR_FLOAT.fullmatch(text):
        raise ValueError(text)
    return int(text.split(".")[0])


def _numbers(table: pd.DataFrame, path: Path, column: str, kind=_whole, **limits) -> list:
    return [
        _number(text, path, line, column, kind, **limits)
        for text, line in zip(table[column], table["line"], strict=True)
    ]


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
    table["utterance_idx"] = _numbers(table, path, "utterance_idx", kind=_index, low=1, high=MAX_TURNS)
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
            fault = f"has utterance_idx {turn.utterance_idx}, expected {expected} (a gap or a repeat)"
        elif not turn.utterance:
            fault = "has an empty utterance"
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
    return _answers(path, every=2)


def all_turns(path: Path) -> list[Example]:
    """The same with the speaker's turns, each dialogue's first left out, which answers nothing. Whose turn an
    example is, its history tells: the last to have spoken is the other one."""
    return _answers(path, every=1)


def _answers(path: Path, every: int) -> list[Example]:
    examples = []
    for conv_id, turns in read_dialogues(path).groupby("conv_id", sort=False):
        texts = turns["utterance"].tolist()
        emotion = turns["context"].iloc[0]
        for i in range(1, len(texts), every):
            examples.append(Example(str(conv_id), i + 1, emotion, tuple(texts[:i]), texts[i]))
    if not examples:
        raise UserError(f"{path}: no conversation has a listener turn")
    return examples


def _keyed(table: pd.DataFrame, path: Path) -> list[tuple[str, int]]:
    """(conv_id, utterance_idx) of each row; a repeat is an error."""
    indices = _numbers(table, path, "utterance_idx", kind=_index, low=1, high=MAX_TURNS)
    keys = list(zip(table["conv_id"], indices, strict=True))
    if len(set(keys)) < len(keys):
        twice = next(k for k, again in zip(keys, pd.Series(keys).duplicated(), strict=True) if again)
        raise UserError(f"{path}: {twice[0]}, utterance {twice[1]} stands there twice")
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
    table["level"] = _numbers(table, path, "level", low=0, high=2)
    if not raw:
        table["label"] = _numbers(table, path, "label", low=0, high=2)
    for column in ("seeker_post", "response_post"):
        table[column] = table[column].str.strip()
    return table


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
        held = both["seeker_post"].map(lambda post: hash_seed("valid", post) % 5 == 0)
        train, valid = both[~held], both[held]
    if part != "all":
        half = train["seeker_post"].map(lambda post: "ab"[hash_seed("part", post) % 2])
        train = train[half == part]
    return train, valid


def read_vader(path: Path) -> pd.DataFrame:
    """Every utterance with its VADER compound score in [-1, 1]."""
    table = read_rows(path, VADER_COLUMNS, made_by="python prepare_data.py")
    table["sentiment"] = _numbers(table, path, "sentiment", kind=float, low=-1, high=1)
    return table


def read_sentiment(path: Path, examples: Sequence[Example]) -> list[float]:
    """The VADER score of the reply of each of `examples`."""
    table = read_vader(path)
    found = dict(zip(_keyed(table, path), table["sentiment"], strict=True))
    return _covering(found, examples, path, "python prepare_data.py")


def read_labels(path: Path, examples: Sequence[Example]) -> dict[str, list]:
    """{emo, exp, int: list of int; sentiment: list of float}, one entry for each of `examples`."""
    made_by = "python label_dialogues.py"
    table = read_rows(path, LABEL_COLUMNS[:-1], made_by=made_by)
    keys = _keyed(table, path)
    labels = {}
    for column in (*DIMENSIONS, "sentiment"):
        # three levels of empathy; VADER's compound score
        limits = {"kind": float, "low": -1, "high": 1} if column == "sentiment" else {"low": 0, "high": 2}
        found = dict(zip(keys, _numbers(table, path, column, **limits), strict=True))
        labels[column] = _covering(found, examples, path, made_by)
    return labels


def read_exemplars(path: Path, examples: Sequence[Example], top: int = 10) -> list[list[str]]:
    """The texts of at most `top` exemplars for each of `examples`, best first."""
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
            raise UserError(f"{path}, line {line}: exemplars is not a JSON list of texts")
        texts.append(row[:top])
    return _covering(dict(zip(_keyed(table, path), texts, strict=True)), examples, path, made_by)


def read_predictions(path: Path, examples: Sequence[Example]) -> list[str]:
    """The reply for each of `examples` from a tab-separated predictions file (anybody's).

    Written without quoting, or quoted as pandas and Excel do. Rows that answer none of `examples` are an
    error, and so are replies that consist of control tokens; a control token inside a reply is warned about.
    """
    made_by = "a train_*.py run, or --inference RUN"
    table = read_rows(path, PREDICTION_COLUMNS, made_by=made_by, delimiter="\t", unquoted=not_a_prediction)
    keys = _keyed(table, path)
    refuse_unknown(path, keys, examples)
    check_control_tokens(path, table["response"], table["line"])
    return _covering(dict(zip(keys, table["response"], strict=True)), examples, path, made_by)


def refuse_unknown(path: Path, keys: Sequence[tuple[str, int]], examples: Sequence[Example]) -> None:
    """Raise `UserError` where a file of replies answers what is none of `examples`."""
    known = {e.key for e in examples}
    unknown = [key for key in keys if key not in known]
    if unknown:
        first = ", ".join(f"{conv} utterance {index}" for conv, index in unknown[:3])
        raise UserError(
            f"{path}: {len(unknown):,} of {len(keys):,} rows are no listener turn of this split (first: "
            f"{first}); give the predictions of this split, one row for each listener turn"
        )


def not_a_prediction(header: list[str], rows: list[list[str]]) -> Callable[[list[str]], str | None]:
    """A function that says why a row cannot be a row of an unquoted predictions file."""

    def why_not(row: list[str]) -> str | None:
        if len(row) == len(header):
            return None
        return (
            f"{len(row)} columns, expected {len(header)}; a reply with a tab or a line break in it is "
            "written in quotation marks (pandas: to_csv(path, sep='\\t', index=False)), or with blanks in "
            "their place"
        )

    return why_not


def check_control_tokens(path: Path, replies: Sequence[str], lines: Sequence[int]) -> None:
    """Refuse replies of nothing but control tokens; warn of one inside a reply, since it counts as a word."""
    inside = []
    for reply, line in zip(replies, lines, strict=True):
        if CONTROL_TOKEN.search(reply):
            inside.append(line)
            if not CONTROL_TOKEN.sub("", reply).strip():
                raise UserError(
                    f"{path}, line {line}: the reply is nothing but control tokens ({reply[:40]!r}); decode "
                    "without them (skip_special_tokens=True) and write the file again"
                )
    if inside:
        print(
            f"warning: {path}: {len(inside):,} replies hold control tokens (first: line {inside[0]}), which "
            "count as words here; decode without them (skip_special_tokens=True) and write the file again"
        )


# ----------------------------------------------------------------------------------------------------- tokens


def tokenizer_hash(tokenizer) -> str:
    """sha256 of the whole vocabulary with its ids: two tokenizers with one hash give the same ids to the same
    words."""
    return fingerprint(sorted(f"{i} {w}" for w, i in tokenizer.get_vocab().items()))


def require_same_words(folder: Path, tokenizer, expected: str) -> None:
    """Raise `UserError` where `tokenizer`, loaded from `folder`, is not the one of the hash `expected`."""
    if tokenizer_hash(tokenizer) != expected:
        raise UserError(f"{folder}: its tokenizer has other words than the one that was trained with")


def encode(
    tokenizer, texts: Sequence[str], cache: Path | None = None, controls: bool = False
) -> dict[str, np.ndarray]:
    """text -> token ids (int32, no special tokens). Each distinct text is tokenised once, and cached by
    content.

    A control token that stands in a text literally (</s>, <pad>) is words like any other; with `controls` it
    is the control token, as in the marks of a chat template.
    """
    distinct = list(dict.fromkeys(texts))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = None
    if cache:  # the hash of a vocabulary takes longer than a dialogue's tokens
        # one vocabulary can be read in two ways
        rules = str([getattr(backend, part, None) for part in ("normalizer", "pre_tokenizer")])
        name = fingerprint(tokenizer_hash(tokenizer), rules, f"control tokens: {controls}", distinct)[:32]
        file = Path(cache) / f"{name}.npz"

    def tokenise() -> dict[str, np.ndarray]:
        rows = _ids(tokenizer, distinct)
        known = {} if controls else _controls(tokenizer)
        literal = re.compile("|".join(map(re.escape, known.values())) or r"(?!)")
        never = known.keys() - {getattr(tokenizer, "unk_token_id", None)}  # an unknown word is unknown
        # rare; all other texts are given to the tokenizer as they are
        held = [n for n, t in enumerate(distinct) if literal.search(t) or not never.isdisjoint(rows[n])]
        apart = [_apart(distinct[n], literal, getattr(backend, "normalizer", None)) for n in held]
        for n, row in zip(held, _ids(tokenizer, apart), strict=True):
            rows[n] = row
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        count = int(ends[-1]) if len(ends) else 0
        flat = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=count)
        return {"ids": flat, "ends": ends}

    found = cached(file, tokenise)
    flat, ends = found["ids"], found["ends"]
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return {text: flat[a:b] for text, a, b in zip(distinct, starts, ends, strict=True)}


#: a tokenizer that cuts remembers how, and refuses to be told while another thread uses it
CUTTING = threading.Lock()


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def _controls(tokenizer) -> dict[int, str]:
    """{id: how it is written} of the tokens that are no words: end, padding, unknown, T5's extra ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items() if token.special}


def _apart(text: str, literal: re.Pattern, normalizer) -> str:
    """`text` with a blank inside each literal control token, which a tokenizer then reads as words.

    `split_special_tokens=True` is not enough: T5's vocabulary holds </s> as a piece, and its model finds it.
    """

    def cut(uncut: str) -> str:
        return literal.sub(lambda found: f"{found[0][0]} {found[0][1:]}", uncut)

    text = cut(text)
    # a normaliser may make a control token of other characters (full-width ones)
    if normalizer is not None and literal.search(normal := normalizer.normalize_str(text)):
        text = cut(normal)
    return text


def pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows -> (B, longest) int64 ids and their (B, longest) 0/1 mask; a batch of empty rows has width
    1."""
    lengths = np.array([len(r) for r in rows])[:, None]  # (B, 1)
    width = max(1, int(lengths.max()))
    places = np.arange(width)
    real = places >= width - lengths if left else places < lengths  # (B, longest)
    ids = np.full(real.shape, value, dtype=np.int64)
    ids[real] = np.concatenate(rows)  # not row by row: a GPU waits for its batch
    return torch.from_numpy(ids), torch.from_numpy(real.astype(np.int64))


# ---------------------------------------------------------------------------------------------------- batches


def plan_epoch(
    lengths: Sequence[int], *, batch_size: int, batch_tokens: int = 0, seed: int, epoch: int
) -> list[list[int]]:
    """The steps of one epoch, each a list of example numbers of like length: a function of its arguments
    alone.

    A step closes at `batch_size` examples or, where `batch_tokens` > 0, before examples x longest would
    exceed it. Shuffled, sorted by length inside pools of 100 batches, cut, and the batches shuffled again.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    steps: list[list[int]] = []
    for start in range(0, len(order), 100 * batch_size):
        pool = sorted(order[start : start + 100 * batch_size], key=lambda i: -lengths[i])
        step: list[int] = []
        for i in pool:
            longest = lengths[step[0]] if step else lengths[i]
            if step and (
                len(step) == batch_size or (batch_tokens and (len(step) + 1) * longest > batch_tokens)
            ):
                steps.append(step)
                step = []
            step.append(i)
        steps.append(step)
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def plan_once(lengths: Sequence[int], batch_size: int, batch_tokens: int = 0) -> list[list[int]]:
    """All examples, longest first (running out of memory shows at once), in batches of like length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batches and (
            len(batches[-1]) == batch_size
            or (batch_tokens and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens)
        )
        if full or not batches:
            batches.append([])
        batches[-1].append(i)
    return batches


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    return int(fingerprint(*parts)[:15], 16)


@dataclass
class Data:
    """Examples ready for the loop: `collate(list of numbers)` gives one batch of CPU tensors, `lengths` its
    cost.

    `reply_lengths`: of the replies to be written, whose logits take most of the memory.
    """

    lengths: list[int]
    collate: Callable[[list[int]], dict]
    reply_lengths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def plan(self, batch_size: int, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(
            self.lengths, batch_size=batch_size, batch_tokens=batch_tokens, seed=seed, epoch=epoch
        )


def join(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The turns' ids one after the other; nothing for no turns."""
    return np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int32)


def latest(row: np.ndarray, most: int) -> np.ndarray:
    """The last `most` ids: what is too long loses its oldest part."""
    return row[-most:] if most else row[:0]


def reply_layout(
    context: np.ndarray, reply: np.ndarray, sep: int, bos: int | None, context_len: int, reply_len: int
) -> tuple[np.ndarray, int]:
    """The one layout of every critic: `[bos] context </s> reply </s>`, and where the reply begins.

    The context keeps its latest `context_len` tokens, the reply its first `reply_len`.
    """
    head = [] if bos is None else [bos]
    context = latest(context, context_len)
    row = np.concatenate([head, context, [sep], reply[:reply_len], [sep]]).astype(np.int64)
    return row, len(head) + len(context) + 1


def critic_data(
    contexts: Sequence[Sequence[str]],
    replies: Sequence[str],
    targets: Sequence[float] | None,
    tokenizer,
    settings,
    cache: Path | None = None,
) -> Data:
    """Context (its turns, oldest first) and reply of each example in the critics' layout.

    `settings` (models.CriticSettings): `context_len` and `reply_len` say how much the critic reads.
    """
    encoded = encode(tokenizer, [t for c in contexts for t in c] + list(replies), cache)
    sep = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    bos = tokenizer.cls_token_id
    rows = []
    for context, reply in zip(contexts, replies, strict=True):
        said = join([encoded[turn] for turn in context])
        rows.append(reply_layout(said, encoded[reply], sep, bos, settings.context_len, settings.reply_len))

    def collate(numbers: list[int]) -> dict:
        input_ids, mask = pad([rows[i][0] for i in numbers], tokenizer.pad_token_id)  # (B, L)
        begins = torch.tensor([rows[i][1] for i in numbers])[:, None]
        batch = {
            "names": [f"row {i}" for i in numbers],
            "input_ids": input_ids,
            "attention_mask": mask,
            # the reply and its final </s>
            "reply_mask": mask * (torch.arange(input_ids.shape[1])[None] >= begins),
        }
        if targets is not None:
            batch["targets"] = torch.tensor([targets[i] for i in numbers])
        return batch

    return Data([len(r[0]) for r in rows], collate)


class NoExemplars:
    """How exemplars enter a batch: not at all. The other ways (exemplars.py) give the same two answers."""

    def before(self, number: int) -> np.ndarray:
        """Token ids that stand before the dialogue of example `number`."""
        return join([])

    def part(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """What a batch of these examples holds besides."""
        return {}


@dataclass(frozen=True)
class GeneratorRow:
    """One example as token ids."""

    source: np.ndarray
    speakers: np.ndarray  # of each source token: 0 exemplar, 1 speaker, 2 listener
    reply: np.ndarray
    context: np.ndarray  # what stands before the soft reply in a critic's input: the latest turns, then </s>


def generator_data(
    examples: Sequence[Example],
    tokenizer,
    *,
    src_len: int,
    tgt_len: int | None,
    cache: Path | None = None,
    exemplars: NoExemplars | None = None,
    labels: dict[str, list] | None = None,
    critic_context_len: int = 0,
    marks: Sequence[str] | None = None,
    start: int = 0,
) -> Data:
    """Source, speakers, target, and what the critics need, for each listener turn.

    Source: `[exemplars] turn </s> turn </s> ...`; exemplars carry speaker id 0; the dialogue keeps its latest
    `src_len` tokens, speaker 1 and listener 2 in turn. Target: `reply </s>`, cut to `tgt_len` tokens; a cut
    one has no end, for its reply does not end there. `tgt_len=None` keeps replies whole. `labels`: {critic:
    one target an example}, of the critics that the loss asks. `marks`: words for each example, or "", which
    the decoder reads after the token that it starts with, `start`, and before the reply.
    """
    entering = exemplars or NoExemplars()
    encoded = encode(tokenizer, [t for e in examples for t in (*e.history, e.response)], cache)
    marked = encode(tokenizer, marks or (), cache)
    eos = tokenizer.eos_token_id
    rows = []
    for n, example in enumerate(examples):
        turns = [encoded[t] for t in example.history]
        # every turn ends with </s>, so that the model sees where the speaker changes
        dialogue = join([np.append(t, eos) for t in turns])
        # one speaker id a token, </s> included: the same cut below keeps the two aligned
        speakers = join([np.full(len(t) + 1, 1 + i % 2) for i, t in enumerate(turns)])
        before = entering.before(n)
        # whole exemplars, then as much of the dialogue's end as fits
        source = np.concatenate([before, latest(dialogue, src_len)])
        speakers = np.concatenate([np.zeros(len(before), dtype=np.int64), latest(speakers, src_len)])
        reply = encoded[example.response]
        target = np.append(reply, eos)[:tgt_len]
        context = np.append(latest(join(turns), critic_context_len), eos)
        rows.append(GeneratorRow(source, speakers, target, context))
    names = [f"{e.conv_id} utterance {e.utterance_idx}" for e in examples]

    def collate(numbers: list[int]) -> dict:
        chosen = [rows[i] for i in numbers]
        source_ids, source_mask = pad([r.source for r in chosen], tokenizer.pad_token_id)
        # (B, T), T the longest reply of this batch
        reply_ids, reply_mask = pad([r.reply for r in chosen], -100)
        batch = {
            "names": [names[i] for i in numbers],
            "numbers": list(numbers),
            "source_ids": source_ids,  # (B, S)
            "source_mask": source_mask,
            "speaker_ids": pad([r.speakers for r in chosen], 0)[0],
            "labels": reply_ids,
            "reply_mask": reply_mask,
            "reply_places": reply_mask.flatten().nonzero()[:, 0],  # (N,) of the real tokens among B * T
        }
        batch |= entering.part(numbers)
        if marks is not None:
            # padded on the left, so that the reply follows its marks directly whatever else is in the batch
            prefixes = [np.append(start, marked[marks[i]]) for i in numbers]
            batch["prefix_ids"], batch["prefix_mask"] = pad(prefixes, tokenizer.pad_token_id, left=True)
        if labels:
            # padded on the left, so that a soft reply follows its context directly whatever else is in the
            # batch
            contexts = [r.context for r in chosen]
            batch["context_ids"], batch["context_mask"] = pad(contexts, tokenizer.pad_token_id, left=True)
            batch["critic_targets"] = {k: torch.tensor([v[i] for i in numbers]) for k, v in labels.items()}
        return batch

    return Data([len(r.source) + len(r.reply) for r in rows], collate, [len(r.reply) for r in rows])
