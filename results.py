"""The figures that this project reports, as data: results/results.yaml, and the tables rendered from it.

A row is one system in one table: its commands, what they were measured on, and its figures, beside the
paper's where the paper has them. results/README.md explains every key.
"""

import html
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

import markup
import storage
from options import UserError, named_places

FILE = Path("results") / "results.yaml"
HEADER = (
    "# What this project reports, as data; README.md and docs/results.md are rendered from it with\n"
    "# python reproduce.py --render. Every key: results/README.md. Written in this layout by results.py.\n"
)
BEGIN = "<!-- rendered from results/results.yaml by: python reproduce.py --render -->"
END = "<!-- end of what is rendered -->"
STATES = ("run", "not run")

#: a figure: a value; [value, low, high] with the bounds of its 95 % interval; or mean and std over seeds
Figure = float | list[float] | dict[str, float]


@dataclass(frozen=True)
class Column:
    title: str
    digits: int
    read: list[str] = field(default_factory=list)  # keys that lead to it in a result; default: its own name
    scale: float = 1.0  # of what stands there
    page_only: bool = False  # not in the README
    retired: str = ""  # why no command writes it any more; older rows keep it, and --check leaves it out

    def show(self, figure: Figure | None) -> str:
        """As it stands in a table."""
        if figure is None:
            return ""
        if isinstance(figure, dict):
            return f"{figure['mean']:.{self.digits}f} ± {figure['std']:.{self.digits}f}"
        if isinstance(figure, list):
            value, low, high = (f"{number:.{self.digits}f}" for number in figure)
            return f"{value} [{low}, {high}]"
        return f"{figure:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    about: str
    label: str  # what a row is
    columns: dict[str, Column]
    says: str = ""  # below the table
    brief: str = ""  # the same for the README, where that is long
    evaluate: str = ""  # one command over the runs of all rows: RUNS stands for their folders
    place: str = ""  # folder below the workdir
    plot: str = ""  # what its picture shows, in words, where it has one: docs/NAME.svg of `picture`
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # {name: (updates, value) of each}
    unit: str = ""  # of the curves' values

    @property
    def picture(self) -> str:
        """Of its curves, where it has some, else of its rows' levels."""
        return f"{'curves' if self.curves else 'levels'}-{self.name}.svg"


@dataclass(frozen=True)
class Row:
    table: str
    row: str  # its key
    name: str
    state: str
    reason: str = ""  # why it was not run
    note: str = ""
    place: str = ""
    after: list[str] = field(default_factory=list)  # steps that its commands build on
    commands: list[str] = field(default_factory=list)
    run: str = ""  # folder of a run that the table's `evaluate` scores, or NAME=folder,folder of its seeds
    system: str = ""  # its row there; default: NAME, or the last two parts of the folder
    result: list[str] = field(default_factory=list)  # or: a JSON file, and keys within it
    commit: str = ""
    hardware: str = ""
    seconds: float = 0
    seeds: list[int] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)  # source, figures
    readme: bool = True

    def place_in(self, table: Table) -> str:
        """The folder below the workdir in which it is made."""
        return self.place or table.place

    @property
    def in_table(self) -> str:
        """The name of this row in what the table's `evaluate` writes; empty where it has none there."""
        name, folders = named_places(self.run)
        return self.system or name or "/".join(Path(folders[0]).parts[-2:])


@dataclass(frozen=True)
class Step:
    commands: list[str]
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    hardware: dict[str, str]
    steps: dict[str, Step]
    tables: dict[str, Table]
    rows: dict[str, Row]
    places: dict[str, str] = field(default_factory=dict)  # flags of prepare_data.py for the data of a place
    first_test_conversation: str = ""  # of the test split that the rows were measured on

    def of(self, table: str) -> list[Row]:
        return [row for row in self.rows.values() if row.table == table]


# ---------------------------------------------------------------------------------------- reading and writing


def load(text: str, name: str = str(FILE)) -> dict[str, Any]:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not readable as YAML: {error}") from error


def parse(data: Mapping[str, Any], name: str = str(FILE)) -> Results:
    """Checked; raises `UserError` with the row and what is wrong with it."""
    if lacks := [key for key in ("hardware", "steps", "tables", "rows") if key not in (data or {})]:
        raise UserError(f"{name}: lacks {', '.join(lacks)}; results/README.md explains every key")
    steps = {key: made(Step, value, f"{name}, step {key}") for key, value in data["steps"].items()}
    tables = {}
    for key, value in data["tables"].items():
        columns = {c: made(Column, v, f"{name}, column {c} of {key}") for c, v in value["columns"].items()}
        tables[key] = made(Table, {**value, "name": key, "columns": columns}, f"{name}, table {key}")
        points = [point for curve in tables[key].curves.values() for point in curve]
        if wrong := [p for p in points if not isinstance(p, list) or len(p) != 2]:
            raise UserError(f"{name}, table {key}: curves: {wrong[0]} is no [updates, value]")
        if points and not tables[key].plot:
            raise UserError(f"{name}, table {key}: curves are drawn where `plot` says what they show")
    rows: dict[str, Row] = {}
    for value in data["rows"]:
        row = made(Row, value, f"{name}, row {value.get('row')}")
        problem = "stands twice" if row.row in rows else fault(row, data["hardware"], steps, tables)
        if problem:
            raise UserError(f"{name}, row {row.row}: {problem}")
        rows[row.row] = row
    more = {key: data[key] for key in ("places", "first_test_conversation") if key in data}
    return Results(data["hardware"], steps, tables, rows, **more)


def made(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    """One dataclass of the file; raises `UserError` for a key that is too much or missing."""
    known = {f.name for f in fields(kind)}
    if surplus := sorted(set(value) - known):
        raise UserError(f"{where}: unknown key {', '.join(surplus)}; known: {', '.join(sorted(known))}")
    texts = [f.name for f in fields(kind) if f.type is str]
    if numbers := [key for key in texts if not isinstance(value.get(key, ""), str)]:
        raise UserError(f"{where}: {numbers[0]}: {value[numbers[0]]} is no text; put it in quotation marks")
    try:
        return kind(**value)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).split(') ', 1)[-1]}") from error


def fault(row: Row, hardware: Mapping, steps: Mapping, tables: Mapping[str, Table]) -> str:
    """What is wrong with a row; empty where nothing is."""
    if row.table not in tables:
        return f"table {row.table}: must be one of {', '.join(tables)}"
    if row.state not in STATES:
        return f"state {row.state}: must be one of {', '.join(STATES)}"
    measured = {"figures": row.figures, "commit": row.commit, "hardware": row.hardware, "seeds": row.seeds}
    if row.state == "run" and (missing := [key for key, value in measured.items() if not value]):
        return f"a row that was run needs {', '.join(missing)}"
    if row.state == "not run" and (row.figures or not row.reason):
        return "a row that was not run has no figures, and a reason"
    if row.hardware and row.hardware not in hardware:
        return f"hardware {row.hardware}: must be one of {', '.join(hardware)}"
    if strange := sorted({*row.figures, *row.paper.get("figures", {})} - set(tables[row.table].columns)):
        known = ", ".join(tables[row.table].columns)
        return f"no such column in its table: {', '.join(strange)}; its columns: {known}"
    if wrong := [key for key, figure in row.figures.items() if not is_figure(figure)]:
        forms = "a number, [value, low, high] or {mean: , std: }"
        return f"{wrong[0]}: {row.figures[wrong[0]]} is no figure; one is {forms}"
    if strange := sorted(set(row.after) - set(steps)):
        return f"no such step: {', '.join(strange)}"
    return ""


def is_figure(value: Any) -> bool:
    if isinstance(value, dict):
        value = [value.get("mean"), value.get("std"), 0.0]
    parts = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(isinstance(part, int | float) for part in parts)


def content(file: Path) -> dict[str, Any]:
    storage.require_file(file, "git checkout results/results.yaml")
    return load(file.read_text(encoding="utf-8"), str(file))


def read(file: Path) -> Results:
    return parse(content(file), str(file))


class Layout(yaml.SafeDumper):
    """Short lists and objects of plain values on one line; no references, which people do not read."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_sequence(self, tag, sequence, flow_style=None):
        return super().represent_sequence(tag, sequence, fits_a_line(list(sequence)))

    def represent_mapping(self, tag, mapping, flow_style=None):
        return super().represent_mapping(tag, mapping, fits_a_line(list(mapping.values())))


def fits_a_line(values: list) -> bool:
    return all(not isinstance(v, dict | list) for v in values) and sum(len(str(v)) for v in values) < 60


def dump(data: Mapping[str, Any]) -> str:
    """The file's own layout: written again, nothing changes but what was changed."""
    return HEADER + yaml.dump(data, Dumper=Layout, sort_keys=False, allow_unicode=True, width=110)


def write(file: Path, data: Mapping[str, Any]) -> None:
    parse(data, str(file))
    storage.write_text(file, dump(data))


# -------------------------------------------------------------------------------------------------- rendering


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return markup.table(header, [[text.replace("|", "\\|") for text in line] for line in lines]).split("\n")


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False), ""]


def figures_of(
    table: Table, rows: Sequence[Row], columns: Mapping[str, Column], all_rows: bool = True
) -> list[str]:
    """The table's lines: of each row the paper's figures and ours, in the columns that have any.

    `all_rows`: also those that have none.
    """
    lines = []
    for row in rows:
        theirs = row.paper.get("figures", {})
        if theirs:  # to the digits that the paper gives
            shown = (replace(c, digits=max(c.digits, 2)).show(theirs.get(k)) for k, c in columns.items())
            lines.append([row.name, "paper", *shown])
        if row.state == "run":
            lines.append([row.name, "ours", *(c.show(row.figures.get(k)) for k, c in columns.items())])
        elif all_rows and (row.commands or not theirs):  # else nobody means to run it here
            lines.append([row.name, f"not run: {row.reason}", *[""] * len(columns)])
    header = [table.label, "figures", *(c.title for c in columns.values())]
    used = [n for n in range(len(header)) if n < 2 or any(line[n] for line in lines)]
    return markdown([header[n] for n in used], [[line[n] for n in used] for line in lines])


def readme_part(results: Results) -> str:
    """What stands between the two marks of the README: of each table the rows that it should show; rows
    without figures are only named below it."""
    lines = []
    for table in results.tables.values():
        rows = results.of(table.name)
        shown = [row for row in rows if row.readme]
        columns = {k: c for k, c in table.columns.items() if not c.page_only}
        lines += [f"### {table.title}", "", *paragraph(table.about)]
        lines += [*figures_of(table, shown, columns, all_rows=False), ""]
        lines += [f"![{table.plot}](docs/{table.picture})", ""] * bool(table.plot)
        said = [table.brief or table.says, not_run(shown), everything(table, rows)]
        lines += paragraph(" ".join(filter(None, said)))
    return "\n".join(lines)


def unreached(rows: Sequence[Row]) -> list[Row]:
    """Those that somebody means to run here, and nobody has; not what only the paper has."""
    return [row for row in rows if row.state == "not run" and (row.commands or not row.paper)]


def not_run(rows: Sequence[Row]) -> str:
    """Which of these rows have no figures of ours, and why."""
    reasons: dict[str, list[str]] = {}
    for row in unreached(rows):
        reasons.setdefault(row.reason, []).append(row.name)
    said = "; ".join(f"{'; '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"Not run: {said}." if said else ""


def everything(table: Table, rows: Sequence[Row]) -> str:
    """Where all rows of a table stand, and how many of them have no figures of ours."""
    missing = len(unreached(rows))
    but = f" ({missing} not run)" if missing else ""
    return f"All {len(rows)} rows{but}, with their commands: [docs/results.md](docs/results.md#{table.name})."


def page(results: Results) -> str:
    """docs/results.md."""
    lines = ["# Results: figures, commands, times, commits", ""]
    lines += paragraph(
        "Rendered from [results/results.yaml](../results/README.md) by `python reproduce.py --render`. Every "
        "experiment, the failed ones too: [LOG.md](../LOG.md). `python reproduce.py --table NAME` runs what "
        "of a table has not finished in the workdir, `--check KEY` runs one row again in a fresh folder and "
        "compares."
    )
    for table in results.tables.values():
        rows = results.of(table.name)
        lines += [f"## {table.name}", "", *paragraph(f"{table.title}. {table.about}")]
        lines += [*figures_of(table, rows, table.columns), ""]
        lines += [f"![{table.plot}]({table.picture})", ""] * bool(table.plot)
        lines += paragraph(table.says)
        lines += [*commands_of(results, rows), ""]
        lines += [f"The table: `{table.evaluate}`", ""] * bool(table.evaluate)
    lines += ["## What the rows build on", ""]
    steps = [[name, "; ".join(step.after), shown(step.commands)] for name, step in results.steps.items()]
    lines += [*markdown(["step", "after", "commands"], steps), "", "## Places", ""]
    lines += paragraph(
        "A row whose key is followed by a place is made in that folder below the workdir, which has data of "
        "its own: the flags here are added to the commands of step data."
    )
    lines += [f"- {place}: `{flags}`" for place, flags in results.places.items()]
    lines += ["", "## Hardware", ""]
    lines += [f"- {key}: {text}" for key, text in results.hardware.items()]
    return "\n".join(lines) + "\n"


def commands_of(results: Results, rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if not row.commands and not row.commit:
            continue
        seconds = f"{row.seconds:,.0f} s" if row.seconds else ""
        seeds = ", ".join(map(str, row.seeds))
        after, place = "; ".join(row.after), row.place_in(results.tables[row.table])
        key = f"`{row.row}`" + (f" in {place}" if place else "")
        lines.append([row.name, key, after, shown(row.commands), seconds, row.hardware, row.commit, seeds])
        lines[-1].append(row.note)
    return markdown(["row", "key", "after", "commands", "time", "hardware", "commit", "seeds", "note"], lines)


def shown(commands: Sequence[str]) -> str:
    return "<br>".join(f"`{command}`" for command in commands)


def with_part(readme: str, part: str) -> str:
    """The README with what is rendered between its two marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UserError(f"README.md: needs each of these lines once: {BEGIN} {END}")
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{part}\n{END}",
        readme,
        flags=re.DOTALL,
    )


def drawn(results: Results, table: Table) -> dict[str, Any]:
    """What `plots.plot_curves` draws of a table's curves, or `plots.plot_levels` of its rows of the README
    with their levels."""
    if table.curves:
        return {"curves": table.curves, "unit": table.unit}
    titles = {key: column.title for key, column in table.columns.items() if key.endswith("_level")}
    titles = {key: t if ", by " in t else f"{t}, by {key.partition('_')[0]}" for key, t in titles.items()}
    rows: list[tuple[str, dict[str, list[float]]]] = []
    gold: list[int] = []
    for row in results.of(table.name):
        known = {key: row.figures[key] for key in titles if key in row.figures}
        if row.readme and known:
            gold += [len(rows)] * (row.system == "gold")
            rows.append((row.name, {key: bounds(figure) for key, figure in known.items()}))
    return {"rows": rows, "titles": titles, "gold": gold}


def bounds(figure: Figure) -> list[float]:
    if isinstance(figure, dict):
        return [figure["mean"]]
    return figure if isinstance(figure, list) else [figure]


def pictures(root: Path, results: Results) -> dict[Path, tuple[dict[str, Any], str]]:
    """{svg: what it is drawn of, and what the file then says of itself}."""
    found = {}
    for table in results.tables.values():
        if table.plot:
            asked = drawn(results, table)
            found[root / "docs" / table.picture] = asked, json.dumps(asked)
    return found


def is_of(picture: Path, about: str) -> bool:
    """Whether an svg was drawn of just these figures."""
    return picture.exists() and html.escape(about, quote=False) in picture.read_text(encoding="utf-8")


def rendered(root: Path, data: Mapping[str, Any], results: Results) -> dict[Path, str]:
    """{file: what it should be}, of the project at `root` and the `data` of its file."""
    file, readme = root / FILE, root / "README.md"
    text = with_part(readme.read_text(encoding="utf-8"), readme_part(results))
    return {file: dump(data), readme: text, root / "docs" / "results.md": page(results)}


def render(root: Path) -> None:
    data = content(root / FILE)
    results = parse(data, str(root / FILE))
    for file, text in rendered(root, data, results).items():
        storage.write_text(file, text)
        print(f"written: {file}")
    for file, (asked, about) in pictures(root, results).items():
        if not is_of(file, about):  # another matplotlib would draw the same figures in other bytes
            from plots import plot_curves, plot_levels

            (plot_curves if "curves" in asked else plot_levels)(**asked, target=file, about=about)
            print(f"written: {file}")
