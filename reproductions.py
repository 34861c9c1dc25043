"""A table's rows trained and measured, and one row made again and compared with what is recorded of it.

Rows, steps and columns stand in results/results.yaml (results.py); rows.py runs them, recording.py writes
figures there.
"""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import advice
import storage
from corpora import listener_turns
from gathering import LIMIT, gather
from options import HERE, Paths, UserError
from recipes import PREPARED, lacks_data, lines_of
from recording import bounds, over_seeds, record
from results import FILE, Column, Figure, Results, Row, Table, figures_of, not_run
from rows import FIRST_SEED, Measured, Request, recipe_of, run_rows, where


def make_table(results: Results, name: str, request: Request) -> bool:
    """Runs what is missing of a table; writes results/tables/NAME.md and prints it: the paper's figures and
    those of this workdir. Of `request.rows` alone, where some are named: on the page the others stay.

    True where each of these rows that has commands has figures now (or nothing was to be run).
    """
    table = results.tables[name]
    rows = [row_of(results, key, "--rows") for key in request.rows] or results.of(name)
    beside = [row for row in results.of(name) if row not in rows]
    if strange := [row.row for row in rows if row.table != name]:
        raise UserError(f"--rows {' '.join(strange)}: of another table than {name}")
    if request.record and request.record not in results.hardware:
        known = ", ".join(results.hardware)
        raise UserError(f"--record {request.record}: {FILE} names no such hardware; known: {known}")
    if other := other_data(results, rows, request):
        if request.record:
            raise UserError(f"--record: {other}; results.yaml has figures of its own data alone")
        warn_of(other)
    boxed = request.box.seconds and not request.dry_run
    if boxed:
        box = replace(request.box, gather=lambda: gather_places(table, rows, request))
        request = replace(request, box=box)
    try:
        found = run_rows(results, table, rows, request, beside)
        if not request.dry_run:
            show_table(results, table, rows, found, request)
    finally:  # at the end of the time, too, where the call ends here
        if boxed:
            print("\n".join(gather_places(table, rows, request)))
    if request.record and not request.dry_run:
        if other := other_data(results, rows, request):
            raise UserError(f"--record: {other}; nothing is recorded")
        asked = {row.row: found[row.row] for row in rows}
        record(results, HERE / FILE, asked, request, request.record)
    return request.dry_run or all(found.get(row.row) for row in rows if row.commands)


def other_data(results: Results, rows: Sequence[Row], request: Request) -> str:
    """What rows are measured on where that is not what the recorded ones were; empty where it is, or where
    nothing is prepared yet."""
    said = {"sample": "are the bundled sample, invented and small", "own": "are own dialogues"}
    for place in dict.fromkeys(where(request, row, results.tables[row.table], FIRST_SEED) for row in rows):
        paths = Paths(place)
        if other := said.get(advice.prepared_from(paths.root) or ""):
            return f"the data in {place} {other}"
        first, test = results.first_test_conversation, paths.dialogues("test")
        if first and test.exists() and listener_turns(test)[0].conv_id != first:
            made = prepare_data_of(results, rows[0])
            return f"the test split in {place} has other dialogues (theirs, from the official files: {made})"
    return ""


def prepare_data_of(results: Results, row: Row) -> str:
    """The command that makes the data of a row."""
    data = lines_of(recipe_of(results, [row], "SOURCE"))
    return next(
        (line for line in data if "prepare_data.py" in line), "python prepare_data.py --source SOURCE"
    )


def warn_of(other: str) -> None:
    print(f"warning: {other}; what is printed is not to be read beside the other rows", flush=True)


def show_table(
    results: Results, table: Table, asked: Sequence[Row], found: dict[str, Measured], request: Request
) -> None:
    """The page has all rows of the table; printed are those that were asked for."""
    rows, shown = [], []
    for row in results.of(table.name):
        reason = "not in this workdir" if row in asked else "not among --rows"
        rows.append(as_measured(row, [*found.get(row.row, {}).values()], reason))
        shown += [rows[-1]] * (row in asked)
    target = Paths(request.workdir).results / "tables" / f"{table.name}.md"
    if target.exists() and not any(found.get(row.row) for row in asked):
        raise UserError(f"nothing was measured; {target} stays as it was")
    storage.write_text(target, page_of(table, rows))
    print(f"\n{page_of(table, shown)}\nwritten: {target}. {not_run(shown)}")


def as_measured(row: Row, runs: Sequence[dict], reason: str) -> Row:
    """The row with what was measured now in place of what is recorded. `reason`: for nothing, where the row
    names none."""
    if runs:
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        return replace(row, state="run", figures=over_seeds(runs), name=row.name + seeds)
    return replace(row, state="not run", figures={}, reason=row.reason or reason)


def page_of(table: Table, rows: Sequence[Row]) -> str:
    lines = [f"# {table.title}", "", table.about, "", *figures_of(table, rows, table.columns), ""]
    lines += [f"- {row.name}: `{'; '.join(row.commands)}`" for row in rows if row.commands]
    return "\n".join(lines) + "\n"


def gather_places(table: Table, rows: Sequence[Row], request: Request) -> list[str]:
    """What is worth carrying away, of each workdir that the rows have, in results/tables/gathered; returns
    what there is to say of it."""
    seeds = range(FIRST_SEED, FIRST_SEED + request.seeds)
    places = dict.fromkeys(where(request, row, table, seed) for seed in seeds for row in rows)
    there = [p for p in map(Path, places) if Paths(p).saved.exists() or Paths(p).results.exists()]
    target = Paths(request.workdir).results / "tables" / "gathered"
    said = []
    for place in there:
        name = "-".join(place.relative_to(request.workdir).parts) or "workdir"
        left = gather(Paths(place), target / name, LIMIT // len(there))
        said += [f"gathered: {target / name}", *(f"  left out: {x}" for x in left)]
    return said


# ---------------------------------------------------------------------------------------------- one row again


def row_to_check(results: Results, key: str) -> Row:
    row = row_of(results, key, "--check")
    if not row.commands:
        of = f"; --table {row.table} measures it beside the others" if row.in_table else ""
        raise UserError(f"--check {key}: the row has no commands of its own{of}")
    return row


def row_of(results: Results, key: str, flag: str) -> Row:
    if key not in results.rows:
        near = ", ".join(difflib.get_close_matches(key, results.rows, n=3, cutoff=0.4))
        meant = f"did you mean {near}?" if near else "docs/results.md names them all"
        raise UserError(f"{flag} {key}: no such row; {meant}")
    return results.rows[key]


def check_row(results: Results, key: str, request: Request) -> bool:
    """Run a row's commands in a fresh workdir and say of each recorded figure: equal, close, off.

    True where none is off or missing. A check that was stopped goes on in the same workdir.
    """
    row = row_to_check(results, key)
    table = results.tables[row.table]
    workdir = where(request, row, table, FIRST_SEED)
    mark = Paths(workdir).results / "tables" / "check.txt"
    if not request.dry_run:
        there = Path(workdir).iterdir() if Path(workdir).exists() else []
        fresh = {place.name for place in there} <= {"data"}
        if not fresh and not (mark.exists() and mark.read_text(encoding="utf-8") == key):
            raise UserError(
                f"--workdir {request.workdir}: --check {key} takes a folder that is new or empty, or holds "
                f"prepared data alone{f' ({workdir})' * (workdir != request.workdir)}"
            )
        if lacks_data(request.source, workdir):
            first = f"{prepare_data_of(results, row)} --workdir {shlex.quote(workdir)}"
            missing = f"--source {PREPARED}: {workdir} has no data/prepared.json"
            raise UserError(f"{missing}; leave the flag out, or first: {first}")
        storage.write_text(mark, key)
    found = [*run_rows(results, table, [row], request)[key].values()]
    if request.dry_run:
        return True
    if not found:
        raise UserError(f"{key}: its commands have left no figures; their logs: {mark.parent}")
    if other := other_data(results, [row], request):
        warn_of(other)
    now, good = over_seeds(found), True
    for name, recorded in row.figures.items():
        column = table.columns[name]
        if column.retired and name not in now:
            print(f"{column.title}: recorded {column.show(recorded)}, not compared: {column.retired}")
            continue
        verdict = compare(column, recorded, now.get(name))
        good = good and verdict.startswith(("equal", "close"))
        print(
            f"{column.title}: recorded {column.show(recorded)}, now {column.show(now.get(name))}: {verdict}"
        )
    if row.note:
        print(f"recorded with the note: {row.note}")
    return good


def compare(column: Column, recorded: Figure, now: Figure | None) -> str:
    """`equal` to the digits shown; `close`: within the interval, or one standard deviation; else `off`."""
    if now is None:
        return "not measured"
    value, low, high = bounds(recorded)
    measured = bounds(now)[0]
    if f"{value:.{column.digits}f}" == f"{measured:.{column.digits}f}":
        return "equal"
    if low <= measured <= high:
        return "close"
    away = f"off by {measured - value:+.{column.digits}f}"
    return away if low < high else f"{away} (no interval is recorded)"
