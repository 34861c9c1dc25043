"""Any csv or tsv -> rows with the lines at which they end, and the numbers in them. Knows no corpus.

Every function either returns every row of its file or raises `UserError` naming file and line.
"""

import csv
import gzip
import io
import math
import re
import shlex
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from advice import makes
from options import UserError
from records import marks_are_text
from storage import decode

WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
#: pandas writes whole numbers as 2.0 where a cell of the column is empty
WHOLE_OR_FLOAT = re.compile(r"\s*[0-9]+(?:\.0*)?\s*")
SEPARATORS = {"commas": ",", "semicolons": ";", "tabs": "\t", "vertical bars": "|", "tildes": "~"}
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
        places = _places(path, header, columns, text, delimiter, remedy if made_by else "rename it there")
        if unquoted is None:
            rows = _quoted_rows(path, text, delimiter, header, remedy)
        else:
            rows = _rows_of_either_format(path, text, delimiter, header, places, unquoted, remedy)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {_line_of(error)}: cannot be read ({error.args[0]}); {remedy}"
        ) from error
    while len(header) > 1 and rows and not any(rows[-1][0]):  # as a spreadsheet saves them
        rows.pop()
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


def _places(
    path: Path, header: list[str], columns: Sequence[str], text: str, delimiter: str, remedy: str
) -> list[int]:
    """Where each of `columns` stands in the header; a file with another separator is told so."""
    missing = [c for c in columns if c not in header]
    if missing:
        wanted = next(name for name, sign in SEPARATORS.items() if sign == delimiter)
        for name, sign in SEPARATORS.items():
            # Excel may say its separator in a line of its own
            for above, line in enumerate(text.splitlines()[: 2 if text.startswith("sep=") else 1]):
                if sign != delimiter and set(columns) <= set(next(csv.reader([line], delimiter=sign), [])):
                    raise UserError(
                        f"{path}, line 1: separated by {name}, expected {wanted}; convert it with: "
                        f"{_converting(path, sign, delimiter, above)}"
                    )
        found = f"(found: {', '.join(header)[:200]}); {remedy}"
        raise UserError(f"{path}, line 1: missing column {', '.join(missing)} {found}")
    twice = [c for c in columns if header.count(c) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column {', '.join(twice)} stands there twice; rename one")
    return [header.index(c) for c in columns]


def _converting(path: Path, found: str, wanted: str, above: int) -> str:
    """A command that writes the file with another separator, every cell as it is, without the lines `above`
    its header."""
    new = path.with_name(f"{path.name.removesuffix(path.suffix)}-converted{path.suffix}")
    how = f"sep={found!r}, " + f"skiprows={above}, " * bool(above) + "dtype=str, keep_default_na=False"
    code = (
        f"import pandas; pandas.read_csv({str(path)!r}, {how})"
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
    unquoted = delimiter == "\t" and marks_are_text(text, len(header))
    rows = _parse(text, delimiter, quoted=not unquoted)
    for row, line in rows:
        if len(row) != len(header):
            name = next(name for name, sign in SEPARATORS.items() if sign == delimiter)
            raise UserError(
                f"{path}, line {line}: {len(row)} columns, expected {len(header)}; a text with {name} "
                f"in it stands in quotation marks, or: {remedy}"
            )
    return rows


def _rows_of_either_format(
    path: Path, text: str, delimiter: str, header: list[str], places: list[int], unquoted: Format, remedy: str
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


def as_whole(text: str) -> int:
    if not WHOLE.fullmatch(text):
        raise ValueError(text)
    return int(text)


def as_index(text: str) -> int:
    """A whole number; pandas writes 2 as 2.0 where a cell of the column is empty."""
    if not WHOLE_OR_FLOAT.fullmatch(text):
        raise ValueError(text)
    return int(text.split(".")[0])


def numbers_of(
    table: pd.DataFrame, path: Path, column: str, kind=as_whole, low=-math.inf, high=math.inf
) -> list:
    """A column's texts as numbers of `kind` in [low, high], or an error that says where one is none."""
    numbers = []
    for text, line in zip(table[column], table["line"], strict=True):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a number" if kind is float else "a whole number"
            raise UserError(
                f"{path}, line {line}: {column} is {text[:40]!r}, expected {what} from {low} to {high}"
            )
        numbers.append(value)
    return numbers
