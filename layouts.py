"""Files of replies in the layouts that groups publish: a file -> its systems' replies, each with all that
says which item it answers.

Every reader returns every reply of its file or raises `UserError` naming file and line. Which of the items a
reply answers, matching.py finds out.
"""

import ast
import csv
import dataclasses
import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import storage
import tabular
from options import LAYOUTS, UserError

DELIMITERS = {"tsv": "\t", "csv": ",", "tilde": "~"}
#: layouts of text files with gold replies of their own
LABELLED = ("ref-pred", "blocks", "ref-lines")
#: of our own predictions.tsv
COLUMNS = ("conv_id", "utterance_idx", "response")
ENDINGS = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
#: what columns and labels are called, small and without blanks and marks -> what they hold
NAMES = {
    "conv_id": "convid conversationid dialogid dialogueid",
    "utterance_idx": "utteranceidx utteranceindex turnidx turnindex",
    "history": "history context contexts dialogue dialog dialoguehistory dialoghistory dialoguecontext",
    "reference": "ref reference references gold golden goldreply goldresponse goldenresponse groundtruth "
    "target targettext goldtext",
    "sample": "sample samplenumber sampleindex",
    "reply": "pred prediction predicted greedy predgreedy greedypred beam beamsearch topk topktopp topp hyp "
    "hypothesis generated generation generatedtext generatedresponse generatedreply output textprediction "
    "beamtextprediction predictedresponse modelresponse",
    # the gold replies where a column of the names above stands beside them
    "response": "response reply",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
#: columns that number a file's own rows
NUMBERS = set("id ids idx index".split())
#: what published files say besides, and is no system of a json of columns: names, and last words of names
BESIDES = set("emotion situation prompt speaker split turn label labels topic model".split())
LAST_WORDS = set("id idx index emotion label situation".split())
LABEL = re.compile(r"\s*([A-Za-z][\w /().-]{0,39}?)\s*:")
RULE = re.compile(r"\s*[-=*_#]{4,}\s*")


@dataclass(frozen=True)
class Reply:
    """A reply and what its file says about the item that it answers."""

    line: int  # 1-based, or the number of the object in a json
    text: str
    key: tuple[str, int] | None = None
    history: str | None = None  # all turns, oldest first, a blank between
    reference: str | None = None
    sample: int = 0
    index: int | None = None  # its file's own number, where that says one


@dataclass(frozen=True)
class Output:
    """What one system of a file says."""

    name: str  # the column or label; "" where the file holds one system only
    replies: list[Reply]
    notes: list[str] = field(default_factory=list)
    layout: str = ""  # as which its file was read
    referenced: bool = False  # its gold replies are the lines of a file of references


def read_outputs(path: Path, layout: str = "auto", references: Path | None = None) -> list[Output]:
    """All systems of one file. `references`: the gold replies, one a line, in the order of the replies, for a
    file that holds neither keys nor gold replies.

    Raises `UserError` where a row cannot be read whole, and where a file is of another layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--format {layout}: must be one of {', '.join(LAYOUTS)}")
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    gold = None if references is None else lines_of(_text(references))
    guessed, notes = layout == "auto", []
    if guessed:
        layout = guess(path, text, gold)
    if layout in DELIMITERS:
        found = _table(path, text, DELIMITERS[layout])
    elif layout == "jsonl":
        numbered = [(n, line) for n, line in enumerate(lines_of(text), 1) if line.strip()]
        rows = [records.json_value(line, f"{path}, line {n}") for n, line in numbered]
        found = _objects(path, rows, [n for n, _ in numbered])
    elif layout == "json":
        found = _json(path, text)
    elif layout in ("ref-pred", "blocks"):
        found = _labelled(path, text)
    elif layout == "ref-lines":
        found = _below_references(path, text)
    else:
        found = _lines(path, text)
    if references is not None and gold is not None:
        found = [
            _with_references(path, output, gold, references) if says_nothing(output) else output
            for output in found
        ]
        if guessed and layout in LABELLED:
            notes = [f"read as {layout} by its labels, without --references"]
        elif guessed and layout == "lines" and (other := guess(path, text)) != layout:
            notes = [
                f"read as a reply a line, some of which begin as labels do; --format {other} reads labels"
            ]
    return [dataclasses.replace(output, layout=layout, notes=output.notes + notes) for output in found]


def says_nothing(output: Output) -> bool:
    """Whether its file leaves open which items are answered."""
    return all(reply.key is None and reply.reference is None for reply in output.replies)


def guess(path: Path, text: str, gold: Sequence[str] | None = None) -> str:
    """The layout of a file: by its name's ending, else by the labels at the beginnings of its lines. With a
    line for each of the `gold` replies it holds replies, some of which may begin as labels do."""
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending == ".csv":
        header = text.split("\n", 1)[0]
        return "tilde" if header.count("~") > header.count(",") else "csv"
    if ending in ENDINGS:
        return ENDINGS[ending]
    lines = lines_of(text)
    labels = Counter(squashed(found[1]) for line in lines if (found := LABEL.match(line)))
    known = {label: count for label, count in labels.items() if label in ROLES}
    roles = {ROLES[label] for label in known}
    if "reference" not in roles:
        return "lines"
    if gold is not None and len(lines) == len(gold):
        begins = LABEL.match(next(line for line in lines if line.strip()))
        counts = set(known.values())
        if not begins or len(counts) > 1 or counts == {1}:
            return "lines"
    return "blocks" if "reply" in roles else "ref-lines"


def squashed(name: str) -> str:
    """A column's or label's name without what differs between groups: blanks, marks, capitals."""
    return re.sub(r"[\W_]", "", name).lower()


def lines_of(text: str) -> list[str]:
    """The lines of a text, the empty ones too: an empty line is an empty reply. They end as those of records
    do, at line feeds and carriage returns."""
    lines = re.split(r"\r*\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


def _text(path: Path) -> str:
    records.refuse_other_formats(path, read=(".json", ".gz"))
    return storage.decode(tabular.file_content(Path(path), "save or fetch it again"), path)


def _with_references(path: Path, output: Output, gold: list[str], references: Path) -> Output:
    if len(gold) != len(output.replies):
        raise UserError(
            f"{references}: {len(gold):,} lines for the {len(output.replies):,} replies of {path}; give the "
            "gold replies in the order of the replies, one a line"
        )
    numbers = [reply.index for reply in output.replies if reply.index is not None]
    if numbers != sorted(numbers):
        raise UserError(
            f"{path}: its rows are not in the order of their numbers (a column id or index), and the lines "
            f"of {references} have none; sort it, or leave that column out"
        )
    replies = [
        dataclasses.replace(reply, reference=line) for reply, line in zip(output.replies, gold, strict=True)
    ]
    return dataclasses.replace(output, replies=replies, referenced=True)


# ----------------------------------------------------------------------------------------------------- tables


def _known(path: Path, columns: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({role: all columns of such names}, {role: its column}) of a table, without those of replies; under ""
    stand the columns of no known name."""
    of_role: dict[str, list[str]] = {}
    for column in columns:
        name = squashed(column)
        role = ROLES.get(name) or ROLES.get(name.rstrip("0123456789"), "")
        of_role.setdefault("index" if name in NUMBERS else role, []).append(column)
    order = {name: place for place, name in enumerate(ROLES)}
    roles = {}
    for role in ("conv_id", "utterance_idx", "history", "reference", "sample", "index"):
        found = sorted(of_role.get(role, []), key=lambda column: order.get(squashed(column), len(order)))
        if role == "reference" and len(found) > 1:
            raise UserError(f"{path}, line 1: {' and '.join(found)} both may be the gold reply; leave one")
        if found:
            roles[role] = found[0]
    if "reply" in of_role and "response" in of_role and "reference" not in roles:
        roles["reference"] = of_role["response"].pop(0)  # the gold reply, beside a generated one
    return of_role, roles


def _roles(path: Path, columns: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({role: its column}, {system: its columns}) of a table; the columns of one system are its samples."""
    of_role, roles = _known(path, columns)
    systems: dict[str, list[str]] = {}
    # where the gold reply stands elsewhere, a response beside a generated one is another system
    for column in (*of_role.get("reply", []), *of_role.get("response", [])):
        systems.setdefault(squashed(column).rstrip("0123456789"), []).append(column)
    if not systems:
        raise UserError(
            f"{path}, line 1: no column of replies (found: {', '.join(columns)[:200]}); call it response, or "
            "generated"
        )
    return roles, systems


def _table(path: Path, text: str, delimiter: str) -> list[Output]:
    """The systems of a file with a header and a separator."""
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        others = _otherwise_separated(text)
    except csv.Error as error:
        raise UserError(f"{path}, line 1: cannot be read ({error})") from error
    # so that a file of one column is told what it lacks, or how its columns are separated
    told = len(others) > 1 and any(squashed(name) in ROLES for name in others)  # and is no prose
    columns = others if told else list(COLUMNS)
    roles: dict[str, str] = {}
    systems: dict[str, list[str]] = {}
    if text.startswith(f"sep={delimiter}"):
        raise UserError(
            f"{path}, line 1: is Excel's, to say its separator; take it out: tail -n +2 "
            f"{shlex.quote(str(path))} > {shlex.quote(str(path.with_stem(path.stem + '-without')))}"
        )
    if len(header) > 1 or squashed("".join(header)) in ROLES:
        roles, systems = _roles(path, header)
        columns = [*roles.values(), *(c for group in systems.values() for c in group)]
    unquoted = _not_a_prediction if delimiter == "\t" and "utterance_idx" in header else None
    table = tabular.read_rows(path, columns, made_by=None, delimiter=delimiter, unquoted=unquoted)
    lines = table.pop("line").tolist()
    found = _systems(path, table.to_dict("records"), lines, roles, systems)
    return _noted(found, header if systems else [], roles, systems)


def _otherwise_separated(text: str) -> list[str]:
    """The columns of a header by the separator that makes the most of them."""
    line = text.splitlines()[: 2 if text.startswith("sep=") else 1][-1]  # Excel may say its separator
    return max(
        (next(csv.reader([line], delimiter=sign), []) for sign in tabular.SEPARATORS.values()), key=len
    )


def _not_a_prediction(header: list[str], rows: list[list[str]]) -> Callable[[list[str]], str | None]:
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


def _noted(
    found: list[Output], columns: Iterable[str], roles: dict[str, str], systems: dict[str, list[str]]
) -> list[Output]:
    """With a note of the columns that are neither a reply nor anything known: another system may be meant."""
    read = {*(column for role, column in roles.items() if role != "index")}
    read |= {column for group in systems.values() for column in group}
    notes = []
    if left := [column for column in columns if column not in read]:
        notes.append(
            f"columns not read: {', '.join(left)[:200]} (a system's is called response, generated or "
            "predicted)"
        )
    for output, group in zip(found, systems.values(), strict=True):
        several = [f"columns {', '.join(group)[:200]}: read as {len(group)} samples of one system"] * (
            len(group) > 1
        )
        output.notes.extend([*notes, *several])
        notes = []
    return found


def _systems(
    path: Path,
    rows: Sequence[dict[str, Any]],
    lines: Sequence[int],
    roles: dict[str, str],
    systems: dict[str, list[str]],
) -> list[Output]:
    """The replies of each system of a table; a cell that is a list holds several samples."""
    outputs = []
    for name, columns in systems.items():
        replies = []
        for row, line in zip(rows, lines, strict=True):
            texts = [text for column in columns for text in _texts(path, line, column, row.get(column))]
            if not texts:
                raise UserError(f"{path}, line {line}: no reply ({', '.join(columns)})")
            known = _item(path, line, row, roles)
            first = known.sample
            if len(texts) > 1 and "sample" in roles:
                raise UserError(f"{path}, line {line}: {len(texts)} replies and a sample number; give one")
            for n, text in enumerate(texts):
                replies.append(dataclasses.replace(known, text=text, sample=first + n))
        outputs.append(Output(name if len(systems) > 1 else "", replies))
    return outputs


def _texts(path: Path, line: int, column: str, value: object) -> list[str]:
    """The replies of one cell."""
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            shown = "null" if text is None else repr(str(text)[:40])
            raise UserError(f'{path}, line {line}: {column} is {shown}, expected a text (empty: "")')
        texts.append(text)
    return texts


def _item(path: Path, line: int, row: dict[str, Any], roles: dict[str, str]) -> Reply:
    """What a row says about its item."""
    values = {role: row.get(column) for role, column in roles.items()}
    key, history, reference = None, values.get("history"), values.get("reference")
    if "conv_id" in roles and "utterance_idx" in roles:
        index = _whole(path, line, roles["utterance_idx"], values["utterance_idx"])
        key = (str(values["conv_id"]), index)
    if isinstance(reference, list) and len(reference) == 1:
        reference = reference[0]
    if reference is not None and not isinstance(reference, str):
        raise UserError(f"{path}, line {line}: {roles['reference']} is {str(reference)[:40]!r}, not a text")
    sample = _whole(path, line, roles["sample"], values["sample"]) if "sample" in roles else 0
    turns = None if history is None else joined_turns(history)
    own = str(values.get("index"))
    number = int(own) if own.isdecimal() and len(own) < 20 else None
    return Reply(line, "", key, turns, reference, sample, number)


def _whole(path: Path, line: int, column: str, value: object) -> int:
    text = str(value)
    if not tabular.WHOLE_OR_FLOAT.fullmatch(text) or len(text) > 20:
        raise UserError(f"{path}, line {line}: {column} is {text[:40]!r}, expected a whole number")
    return int(text.split(".")[0])


def joined_turns(history: object) -> str:
    """The turns of a history with blanks between: a text, a list of them in Python's spelling, or a list of
    texts or of objects with a text."""
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = ast.literal_eval(history.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return str(history)
    if not isinstance(history, list | tuple):
        return str(history)
    turns = []
    for turn in history:
        if isinstance(turn, dict):
            turn = next((turn[k] for k in ("text", "content", "utterance", "value") if k in turn), turn)
        turns.append(str(turn))
    return " ".join(turns)


def _json(path: Path, text: str) -> list[Output]:
    """A list of objects, or an object of equally long lists: the columns, each unknown one a system."""
    value = records.json_value(text, str(path))
    if isinstance(value, dict) and len(value) == 1:
        (only,) = value.values()
        if isinstance(only, list) and all(isinstance(row, dict) for row in only):
            value = only  # {"data": [{...}, ...]}
    if isinstance(value, list):
        return _objects(path, value, range(1, len(value) + 1))
    if not isinstance(value, dict) or not all(isinstance(v, list) for v in value.values()):
        raise UserError(f"{path}: expected a list of objects, or an object of lists, one for each column")
    lengths = {name: len(column) for name, column in value.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"{path}: its columns have unequal lengths: {str(lengths)[:200]}; give each an entry an item"
        )
    of_role, roles = _known(path, list(value))
    named = [c for role in ("reply", "response", "") for c in of_role.get(role, [])]
    systems = {
        column: [column]
        for column, cells in value.items()
        if column in named and not _besides(column) and any(isinstance(cell, str | list) for cell in cells)
    }
    rows = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not rows or not systems:
        raise UserError(f"{path}: holds no replies")
    return _noted(_systems(path, rows, range(1, len(rows) + 1), roles, systems), value, roles, systems)


def _besides(column: str) -> bool:
    last = re.split(r"[\W_]+", column.lower())[-1]
    return squashed(column) in BESIDES or last in LAST_WORDS


def _objects(path: Path, rows: Sequence[Any], lines: Sequence[int]) -> list[Output]:
    columns: dict[str, None] = {}
    for row, line in zip(rows, lines, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: expected an object with named values")
        columns |= dict.fromkeys(row)
    roles, systems = _roles(path, list(columns))
    return _noted(_systems(path, rows, lines, roles, systems), columns, roles, systems)


# ------------------------------------------------------------------------------------------------ plain texts


def _lines(path: Path, text: str) -> list[Output]:
    lines = lines_of(text)
    if squashed(lines[0]) in ROLES:
        raise UserError(
            f"{path}, line 1: {lines[0].strip()} is the name of a column, and the file is read as one reply "
            "a line; take that line out, or call the file .csv"
        )
    for number, line in enumerate(lines, 1):
        if "\t" in line:
            raise UserError(
                f"{path}, line {number}: a tab, but the file is read as one reply a line; a table is called "
                ".tsv and has a header, or say --format tsv"
            )
    notes = [] if lines[-1].strip() else ["its last line is empty: read as an empty reply"]
    return [Output("", [Reply(number, line.strip()) for number, line in enumerate(lines, 1)], notes)]


def _labelled(path: Path, text: str) -> list[Output]:
    """Blocks of `Label: value` lines, one of them the reference, one or more of them replies.

    A block ends at a rule or where one of its labels comes again; all blocks have the same labels.
    """
    lines = lines_of(text)
    labels = _labels(lines)
    blocks: list[dict[str, tuple[int, str]]] = [{}]
    head, open_label = 0, None
    for number, line in enumerate(lines, 1):
        if RULE.fullmatch(line) or not line.strip():
            if line.strip() and blocks[-1]:
                blocks.append({})
            continue
        found = LABEL.match(line)
        label = squashed(found[1]) if found else ""
        if found and label in labels:
            if label in blocks[-1]:
                blocks.append({})
            value = line[found.end() :].strip()
            blocks[-1][label] = (number, value)
            open_label = label if value == "" else None  # its value may stand on the next line
        elif open_label and open_label in blocks[-1]:
            blocks[-1][open_label] = (number, line.strip())
            open_label = None
        elif len(blocks) == 1 and not blocks[0]:
            head += 1
        else:
            raise UserError(
                f"{path}, line {number}: stands under no label such as Pred: or Ref: ({line[:40]!r}); a "
                "reply with a line break in it goes on one line"
            )
    blocks = [block for block in blocks if block]
    if not blocks:
        raise UserError(f"{path}: no line begins with a label such as Pred: or Ref:")
    _require_same_labels(path, blocks)
    by_role: dict[str | None, list[str]] = {}
    for label in blocks[0]:
        by_role.setdefault(ROLES.get(label), []).append(label)
    replies = by_role.get("reply", []) or by_role.get("response", [])
    if not replies or len(by_role.get("reference", [])) != 1:
        raise UserError(
            f"{path}: its blocks have the labels {', '.join(blocks[0])}; expected one Ref: and at least one "
            "of Pred:, Greedy:, Beam:, Topk:"
        )
    notes = [f"lines before the first block, not read: {head}"] if head else []
    read = {*replies, *by_role["reference"], *by_role.get("history", [])}
    if unread := [label for label in blocks[0] if label not in read]:
        notes.append(f"labels not read: {', '.join(unread)}")
    outputs = []
    for label in replies:
        rows = []
        for block in blocks:
            histories = [joined_turns(block[h][1]) for h in by_role.get("history", [])]
            reference = block[by_role["reference"][0]][1]
            place, value = block[label]
            rows.append(Reply(place, value, None, histories[0] if histories else None, reference))
        outputs.append(Output(label if len(replies) > 1 else "", rows, notes))
    return outputs


def _labels(lines: Sequence[str]) -> set[str]:
    """The labels of a file of blocks: the known ones, and what stands before a colon as often as the
    reference does. What stands there less often is text."""
    counts = Counter(squashed(found[1]) for line in lines if (found := LABEL.match(line)))
    blocks = max((count for label, count in counts.items() if ROLES.get(label) == "reference"), default=0)
    return {label for label, count in counts.items() if ROLES.get(label) or count == blocks}


def _require_same_labels(path: Path, blocks: list[dict[str, tuple[int, str]]]) -> None:
    """Blocks with other labels than the first: a line is missing, or a text was taken for a label."""
    first = list(blocks[0])
    for block in blocks:
        if list(block) != first:
            line = next(iter(block.values()))[0]
            raise UserError(
                f"{path}, line {line}: the block has the labels {', '.join(block)[:120]}, the first one "
                f"{', '.join(first)[:120]}; a line is missing there, or a reply goes over two lines"
            )


def _below_references(path: Path, text: str) -> list[Output]:
    """`ref: ...` and below it a line for each system, with its name and a colon in all blocks or in none."""
    blocks: list[list[tuple[int, str]]] = []
    head = 0
    for number, line in enumerate(lines_of(text), 1):
        found = LABEL.match(line)
        if found and ROLES.get(squashed(found[1])) == "reference":
            blocks.append([(number, line[found.end() :].strip())])
        elif not blocks:
            head += bool(line.strip())
        else:
            blocks[-1].append((number, line.strip()))
    if not blocks:
        raise UserError(f"{path}: no line begins with ref:")
    for block in blocks:
        while len(block) > 1 and (not block[-1][1] or RULE.fullmatch(block[-1][1])):
            block.pop()
        if len(block) != len(blocks[0]) or len(block) < 2:
            raise UserError(
                f"{path}, line {block[0][0]}: {len(block) - 1} lines under this reference, "
                f"{len(blocks[0]) - 1} under the first; each system has one line there"
            )
    notes = [f"lines before the first reference, not read: {head}"] if head else []
    outputs = []
    for nth in range(1, len(blocks[0])):
        labels = {found[1] if (found := LABEL.match(b[nth][1])) else "" for b in blocks}
        name = labels.pop() if len(labels) == 1 else ""
        rows = []
        for block in blocks:
            place, value = block[nth]
            if name:
                value = value[LABEL.match(value).end() :].strip()  # type: ignore[union-attr]
            rows.append(Reply(place, value, None, None, block[0][1]))
        only = len(blocks[0]) == 2
        outputs.append(Output("" if only else name or f"system {nth}", rows, notes))
    return outputs
