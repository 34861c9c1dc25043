"""People's own files: the rows of a csv, a jsonl or a plain text file, read with all their columns and
written back.

Nothing heavy is imported. The corpora's files have readers of their own, in corpora.
"""

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import storage
from options import UserError
from turns import pick

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
#: columns that are taken for the reply where none is named, the first that is there
REPLY_COLUMNS = ("reply", "response", "text", "utterance", "response_post")
#: and for what a reply is wanted to: the reply may stand beside it
QUESTION_COLUMNS = ("question", "post", "seeker_post", "context", "prompt", *REPLY_COLUMNS)
#: endings of files that hold no text, or no text a line
NOT_LINES = {".json", ".xlsx", ".xls", ".ods", ".docx", ".pdf", ".parquet", ".zip", ".gz", ".bz2", ".xz"}
TEXT = "text"  # the one column of a plain text file


@dataclass(frozen=True)
class Records:
    """The rows of one file, in its order."""

    place: str  # for messages
    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]  # where each row begins, 1-based; of a csv where it ends
    plain: bool = False  # a text a line: no columns to choose from

    def column(self, name: str | None, flag: str, usual: Sequence[str] = REPLY_COLUMNS) -> str:
        """`name`, or the first of the `usual` columns that is there, with or without capitals. Raises
        `UserError` where none is."""
        written = {c.strip().lower(): c for c in self.columns} | {c: c for c in self.columns}
        found = next((written[c] for c in ([name] if name else usual) if c in written), None)
        if found is None:
            lists_too = flag == "--context"  # of turns
            held = {
                c: next((row[c] for row in self.rows if row.get(c) is not None), "") for c in self.columns
            }
            lists = [c for c, value in held.items() if isinstance(value, list) and not lists_too]
            there = [c for c, value in held.items() if isinstance(value, str) or (value and c not in lists)]
            named = f"name one of {', '.join(there)[:300]} with {flag}" if there else "none of it is a text"
            no_text = f" (lists, not a text a row: {', '.join(lists)})" * bool(lists)
            raise UserError(f"{self.place}: no column {name or ', '.join(usual)}; {named}{no_text}")
        return found

    def small_names(self) -> dict[str, str]:
        """{column: its name in small letters, without white space around it}. Raises `UserError` where two
        columns then have one name."""
        small = {column: column.strip().lower() for column in self.columns}
        if alike := [c for c in small if [*small.values()].count(small[c]) > 1]:
            where = self.place if format_of(self.place) == "jsonl" else f"{self.place}, line 1"
            raise UserError(
                f"{where}: columns have one name but for its capitals ({', '.join(alike)[:200]}), which do "
                "not count here; rename one, or leave it out"
            )
        return small

    def in_small_letters(self) -> "Records":
        """The same rows under the columns' `small_names`."""
        small = self.small_names()
        rows = [{small[column]: value for column, value in row.items()} for row in self.rows]
        return replace(self, columns=[*small.values()], rows=rows)

    def texts(self, column: str) -> list[str]:
        """One text a row, without white space around it, empty where there is none. Raises `UserError` where
        what stands there is no text."""
        found = []
        for row, line in zip(self.rows, self.lines, strict=True):
            text = row.get(column)
            text = "" if text is None else text
            if not isinstance(text, str):
                raise UserError(f"{self.place}, line {line}: {column} is {str(text)[:40]!r}, expected a text")
            found.append(text.strip())
        return found

    def turns(self, column: str) -> list[tuple[str, ...]]:
        """One context a row: a text, or in a jsonl also a list of turns, oldest first, each a text or an
        object that holds one."""
        found = []
        for row, line in zip(self.rows, self.lines, strict=True):
            said = row.get(column) or ()
            turns = self.listed(said) if isinstance(said, str) else said
            if isinstance(turns, list):
                turns = [pick(t, "text") if isinstance(t, dict) else t for t in turns]
            if not isinstance(turns, list | tuple) or not all(isinstance(t, str) for t in turns):
                raise UserError(
                    f"{self.place}, line {line}: {column} is {str(said)[:40]!r}, "
                    "expected a text or a list of texts"
                )
            found.append(tuple(t.strip() for t in turns if t.strip()))
        return found

    def listed(self, said: str) -> list | tuple[str]:
        """The turns of a table's cell: a list of them as JSON, as tables are written here, or one text."""
        if said.lstrip().startswith("[") and not self.plain:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(said), list):
                    return found
        return (said,)


def format_of(path: Path | str) -> str:
    """csv, tsv, jsonl or text, by the name's ending."""
    return FORMATS.get(Path(path).suffix.lower(), "text")


def open_text(path: Path | str) -> TextIO:
    """A file, or standard input for "-", as text; a byte that is not UTF-8 arrives as a lone surrogate, but a
    file of several bytes a letter is refused."""
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if str(path) == "-":
        if sys.stdin is None:  # as a shell's <&- leaves it
            raise UserError("-: there is no standard input; give a file")
        return io.TextIOWrapper(sys.stdin.buffer, **how)
    try:
        handle = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        head = handle.peek(64)[:64]  # a pipe is read once
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if storage.wide(head):
        handle.close()
        storage.decode(head, Path(path))  # says how it is converted
    return io.TextIOWrapper(handle, **how)


def lines_of(handle: TextIO) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of the lines that hold something. They end at line feeds and carriage returns
    alone: U+2028 and its like stand inside of texts."""
    for number, line in enumerate(handle, 1):
        if text := line.strip():
            yield number, text


def marks_are_text(text: str, columns: int) -> bool:
    """Whether quotation marks in a tsv are part of its texts: read as quoting they swallow line ends or
    cannot be read, and without quoting every row has as many `columns` as the header."""
    if columns < 2 or '"' not in text:
        return False

    def rows(**how: Any) -> list[list[str]]:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", **how) if row]

    raw = rows(quoting=csv.QUOTE_NONE)
    try:
        same = len(raw) == len(rows(strict=True))
    except csv.Error:  # "Never give up" is what I say
        same = False
    return not same and all(len(row) == columns for row in raw)


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def of_arguments(texts: Sequence[str]) -> Records:
    """The rows of texts that stand on the command line. Raises `UserError` for one that is not UTF-8."""
    require_utf8(texts)
    rows = [{TEXT: text} for text in texts]
    return Records("the arguments", [TEXT], rows, list(range(1, len(rows) + 1)), plain=True)


def require_utf8(texts: Iterable[str]) -> None:
    """Raises `UserError` for a text with a byte that a terminal gave in another encoding."""
    for text in texts:
        if not is_utf8(text):
            shown = text.encode("utf-8", "replace").decode()[:80]
            raise UserError(f"{shown!r}: not UTF-8; set the terminal to UTF-8, or give the text in a file")


def read_records(path: Path | str, kind: str | None = None) -> Records:
    """All rows of a file or of standard input ("-", plain text unless `kind` says otherwise).

    Raises `UserError` naming the line that cannot be read, or a file without rows.
    """
    place = "standard input" if str(path) == "-" else str(path)
    if kind is None:
        refuse_other_formats(path)
    kind = kind or format_of(path)
    with open_text(path) as handle:
        if kind in ("csv", "tsv"):
            found = _csv_rows(handle, place, "\t" if kind == "tsv" else ",")
        else:
            found = _lines(handle, place, as_json=kind == "jsonl")
    if not found.rows:
        raise UserError(f"{place}: holds no rows")
    return found


def refuse_other_formats(
    path: Path | str,
    read: Sequence[str] = (),
    instead: str = ".csv, .tsv or .jsonl (a JSON object a line)",
) -> None:
    """Raises `UserError` for a name that says that the file is no text, or no line of it a text; `read`: the
    endings of these that are read all the same; `instead`: what can be read."""
    if (ending := Path(path).suffix.lower()) in NOT_LINES.difference(read):
        raise UserError(f"{path}: {ending} is not read here; save it as {instead}")


def _csv_rows(handle: TextIO, place: str, delimiter: str) -> Records:
    text = handle.read()
    said = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    delimiter = said[1] if said else delimiter
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    blank = 0  # blank lines since the last row
    try:
        columns = next(reader, [])
        if said:
            columns = next(reader, [])
        if not is_utf8("".join(columns)):
            raise UserError(f"{place}, line 1: not UTF-8; save the file as UTF-8")
        if len(columns) == 1 and (other := next((s for s in "\t;|" if s in columns[0]), None)):
            raise UserError(
                f"{place}, line 1: one column, {columns[0][:80]!r}: its separator seems to be {other!r}; "
                "save it with commas, or as .tsv with tabs"
            )
        if delimiter == "\t" and marks_are_text(text, len(columns)):
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE)
            next(reader)
        for row in reader:
            if not row and len(columns) != 1:
                continue
            blank = 0 if row else blank + 1
            row = row or [""]  # an empty cell of a single column is saved as a blank line
            if len(row) != len(columns):
                mark = "tabs" if delimiter == "\t" else "commas"
                raise UserError(
                    f"{place}, line {reader.line_num}: {len(row)} columns, expected {len(columns)}; "
                    f'put texts with {mark} in "quotes"'
                )
            if not is_utf8("".join(row)):
                raise UserError(f"{place}, line {reader.line_num}: not UTF-8; save the file as UTF-8")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        if "field larger than" in str(error):
            raise UserError(
                f"{place}, line {reader.line_num}: a text of over {csv.field_size_limit():,} characters, "
                "which a csv cannot hold here; shorten it, or give the file as .jsonl"
            ) from error
        raise UserError(
            f"{place}, line {reader.line_num}: not readable as csv ({error}); a quotation mark that opens a "
            "text must close it, too"
        ) from error
    columns, rows = without_blank_end(columns, rows[: len(rows) - blank])
    if len(set(columns)) < len(columns):
        raise UserError(f"{place}, line 1: two columns have one name ({', '.join(columns)[:200]})")
    return Records(place, columns, [dict(zip(columns, row, strict=True)) for row in rows], lines[: len(rows)])


def without_blank_end(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the empty columns on the right and the empty rows at the end that a spreadsheet saves.
    An empty cell of a single column is a text that somebody left empty."""
    while len(columns) > 1 and rows and not any(rows[-1]):
        rows = rows[:-1]
    width = len(columns)
    while width > 1 and not columns[width - 1].strip() and not any(row[width - 1] for row in rows):
        width -= 1
    return columns[:width], [row[:width] for row in rows]


def _lines(handle: TextIO, place: str, as_json: bool) -> Records:
    rows, lines, columns = [], [], {} if as_json else {TEXT: None}
    empty: list[int] = []
    for number, line in enumerate(handle, 1):
        if not (text := line.strip()):
            empty.append(number)
            continue
        if not is_utf8(text):
            raise UserError(f"{place}, line {number}: not UTF-8; save the file as UTF-8")
        row = json_value(text, f"{place}, line {number}") if as_json else {TEXT: text}
        if not isinstance(row, dict):
            raise UserError(f"{place}, line {number}: expected a JSON object with named values")
        rows.append(row)
        lines.append(number)
        columns |= dict.fromkeys(row)
    if empty:
        said = f"{len(empty)} lines are empty and left out (the first: {empty[0]})"
        print(f"note: {place}: {said}", file=sys.stderr)
    return Records(place, list(columns), rows, lines, plain=not as_json)


def json_value(text: str, where: str, remedy: str = "") -> Any:
    """What a text of JSON holds, or a `UserError` that says `where` it cannot be read, and the remedy."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error}){remedy}") from error
    return value


def refuse_same_names(columns: Sequence[str], added: Sequence[str], remedy: str) -> None:
    """No column of the input is written over."""
    both = [c for c in added if c in columns]
    if both:
        raise UserError(f"the input has a column {both[0]} already; {remedy}")


def write_records(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], origin: dict | None = None
) -> None:
    """A csv or a jsonl (by the name's ending) with a note of what it was made from, whole or not at all."""
    kind = format_of(path)
    if kind == "jsonl":
        lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows]
        storage.write_text(path, "".join(lines), origin)
        return
    text = io.StringIO()
    # a bare \r would end the row for some readers
    careful = any(isinstance(v, str) and "\r" in v for row in rows for v in row.values())
    writer = csv.DictWriter(
        text,
        columns,
        delimiter="\t" if kind == "tsv" else ",",
        quoting=csv.QUOTE_NONNUMERIC if careful else csv.QUOTE_MINIMAL,
        lineterminator="\n",
    )
    writer.writeheader()
    for row in rows:
        writer.writerow({k: flat(v) for k, v in row.items()})
    storage.write_text(path, text.getvalue(), origin)


def flat(value: Any) -> Any:
    """What stands in a csv for a JSON value."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def check_output(
    path: str | None,
    inputs: Sequence[str | None] = (),
    endings: Sequence[str] = tuple(FORMATS),
    flag: str = "--output",
) -> list[str]:
    """What is wrong with the name of an output: its ending, a folder, one of the files that are read."""
    if path is None:
        return []
    if Path(path).suffix.lower() not in endings:
        return [f"{flag} {path}: the name must end in {', '.join(endings)}"]
    if Path(path).is_dir():
        return [f"{flag} {path}: a folder; give the name of a file"]
    there = [Path(file) for file in inputs if file and file != "-" and Path(file).exists()]
    if Path(path).exists() and any(file.samefile(path) for file in there):
        return [f"{flag} {path}: that is the input; choose another name"]
    return []
