"""A table's rows trained and measured, and one row made again and compared with what is recorded of it.

Rows, steps and columns stand in results/results.yaml (results.py); the commands are run by stages.py.
"""

import contextlib
import difflib
import itertools
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import advice
import stages
import storage
from corpora import listener_turns
from gathering import LIMIT, gather
from options import SENTIMENT, Paths, UserError, named_places
from recipes import PREPARED, Changes, Group, Recipe, Stage, lacks_data, lines_of, plan, stage_key
from results import FILE, Column, Figure, Results, Row, Table, figures_of, load, not_run, write

HERE = Path(__file__).resolve().parent
FIRST_SEED = 42  # of every command that is given none


@dataclass(frozen=True)
class Request:
    """What reproduce.py was asked for (its --help says what each flag means)."""

    workdir: str
    source: str
    changes: Changes
    box: stages.Box
    seeds: int = 1
    systems: tuple[str, ...] = ()
    dry_run: bool = False
    record: str = ""  # the hardware's name in results.yaml
    rows: tuple[str, ...] = ()  # of a table; all where none is named


# ---------------------------------------------------------------------------------------- rows as a recipe


def recipe_of(results: Results, rows: Sequence[Row], source: str) -> Recipe:
    """The commands of the rows and of the steps that they build on, each command once, under its own name."""
    recipe: Recipe = {}

    def add(command: str, after: tuple[str, ...], flags: str = "") -> tuple[str, ...]:
        line = command.replace("--source SOURCE", f"--source {shlex.quote(source)}{flags and f' {flags}'}")
        recipe.setdefault(line, Group([line], after))
        return (line,)

    def step(name: str, flags: str) -> tuple[str, ...]:
        before = tuple(line for other in results.steps[name].after for line in step(other, flags))
        return tuple(line for command in results.steps[name].commands for line in add(command, before, flags))

    for row in rows:
        flags = results.places.get(row.place_in(results.tables[row.table]), "")
        after = tuple(line for name in row.after for line in step(name, flags))
        # one after the other, but for the seeds of one training
        for _, seeds in itertools.groupby(row.commands, key=without_seed):
            after = tuple(line for command in seeds for line in add(command, after))
    return recipe


def without_seed(command: str) -> str:
    """What the seeds of one training have in common."""
    return re.sub(r" --(seed|name) \S+", "", command)


def where(request: Request, row: Row, table: Table, seed: int) -> str:
    """The workdir of a row: places have data of their own, further seeds everything."""
    folder = Path(request.workdir)
    if seed != FIRST_SEED:
        folder /= f"seed-{seed}"
    return str(folder / row.place_in(table))


# ---------------------------------------------------------------------------------------------------- running


#: {seed: {column: value}} of one row, of the seeds of which there are figures
Measured = dict[int, dict[str, Figure]]


def run_rows(
    results: Results, table: Table, rows: Sequence[Row], request: Request, beside: Sequence[Row] = ()
) -> dict[str, Measured]:
    """Trains and measures the rows; {row: its figures}. A row whose commands have not all finished has none,
    whatever lies where they would be.

    `beside`: rows of which nothing is run, and what earlier calls have made of them is kept.
    """
    found: dict[str, Measured] = {row.row: {} for row in (*rows, *beside)}
    named = [row.row for row in rows if names_its_seed(row)]
    if named and (request.seeds > 1 or request.changes.seed is not None):
        print(f"note: their commands name their seeds, which stay: {', '.join(named)}")
    for seed in range(FIRST_SEED, FIRST_SEED + request.seeds):
        own = request.changes if seed == FIRST_SEED else replace(request.changes, seed=seed)
        at_place: dict[str, list[Row]] = {}
        for row in (*rows, *beside):
            if seed != FIRST_SEED and names_its_seed(row):
                continue
            at_place.setdefault(where(request, row, table, seed), []).append(row)
        for workdir, here in at_place.items():
            asked, others = [r for r in here if r in rows], [r for r in here if r not in rows]
            runs = asked and not request.dry_run and not lacks_data(request.source, workdir)
            place = Paths(Path(workdir).resolve()).results / "tables"
            with storage.locked(place, stages.BUSY) if runs else contextlib.nullcontext():
                left = run_at(results, table, asked, workdir, replace(request, changes=own), others)
            for row in here:
                done = left.isdisjoint(lines_of(recipe_of(results, [row], request.source)))
                if done and (values := read_figures(table, row, Path(workdir))):
                    found[row.row][seed if own.seed is None else own.seed] = values
    return found


def run_at(
    results: Results,
    table: Table,
    rows: Sequence[Row],
    workdir: str,
    request: Request,
    beside: Sequence[Row] = (),
) -> set[str]:
    """The commands of rows that share a workdir, and the one that scores their runs, with those of the rows
    `beside` that have finished before; returns the commands of all that have not finished."""
    settings = (workdir, request.source, request.changes)
    todo = plan(recipe_of(results, rows, request.source), *settings)
    known = plan(recipe_of(results, [*rows, *beside], request.source), *settings)
    folder = Paths(Path(workdir).resolve()).results / "tables"
    record = stages.Record(folder / "stages.json")

    def unfinished() -> set[str]:
        return {stage.line for stage in known if not record.finished(stage)}

    def scores(left: set[str]) -> Stage | None:
        done = [r for r in beside if left.isdisjoint(lines_of(recipe_of(results, [r], request.source)))]
        scored = [row for row in results.of(table.name) if row in rows or row in done]
        return evaluation(table, scored, workdir, request, [s for s in known if s.line not in left])

    if not rows:
        return unfinished()
    if request.dry_run:
        print("\n" + "\n\n".join(stages.title(todo, n) for n in range(len(todo))))
        if last := scores(unfinished()):
            print("\n" + shlex.join(["python", *last.command]))
        return set()
    if lacks_data(request.source, workdir):
        print(f"\n{workdir}: no data/prepared.json; its rows stay: {', '.join(r.row for r in rows)}")
        return {stage.line for stage in known}
    Path(workdir).mkdir(parents=True, exist_ok=True)
    outcome = stages.run(todo, record, folder / "logs", replace(request.box, keep_going=True))
    if outcome.stopped:
        stages.settle_outcome(outcome, todo)
    for failure in outcome.failed.values():
        print(f"\n{failure}; the rows that build on it stay without figures", flush=True)
    left = unfinished()
    last = scores(left)
    if last:
        outcome = stages.run([last], record, folder / "logs", replace(request.box, keep_going=False))
        stages.settle_outcome(outcome, [last])
    return left


def evaluation(
    table: Table, rows: Sequence[Row], workdir: str, request: Request, built_on: Sequence[Stage]
) -> Stage | None:
    """What scores the runs of all rows that have finished, with other people's replies beside them."""
    if not table.evaluate:
        return None
    runs = [row.run for row in rows if row.run]
    if not request.dry_run:
        runs = [run for run in runs if all((f / "result.json").exists() for f in folders_of(run, workdir))]
    if not runs and not request.systems:
        return None
    files = [shlex.quote(absolute(text)) for text in request.systems]
    placed = [shlex.quote(seeds_at(run, workdir)) for run in runs]
    line = table.evaluate.replace("RUNS", " ".join([*placed, *files]))
    stage = plan({"table": Group([line])}, workdir, request.source, request.changes)[0]
    # the table of fewer runs that an earlier call has left is replaced
    parts = [stage.identity, *(s.identity for s in built_on), *digests(request.systems), *judges_in(workdir)]
    return replace(stage, command=[*stage.command, "--overwrite"], identity="-".join(parts))


def folders_of(run: str, workdir: str) -> list[Path]:
    """The folders of a row's `run`, one for each seed."""
    return [Path(workdir) / place for place in named_places(run)[1]]


def seeds_at(run: str, workdir: str) -> str:
    """A row's `run` for the command line: of several seeds, each in the workdir, as `settle` does it."""
    name, places = named_places(run)
    return f"{name}={','.join(str(Path(workdir) / place) for place in places)}" if name else run


def judges_in(workdir: str) -> list[str]:
    """Which critics could judge the runs: with another one it is another table."""
    found = sorted(Paths(workdir).saved.glob("*/*/result.json"))
    return [storage.sha256(file)[:16] for file in found if file.parent.parent.name in ("empathy", SENTIMENT)]


def digests(systems: Sequence[str]) -> list[str]:
    """What stands in other people's files: under the same name another day's are another table."""
    found = []
    for text in systems:
        for place in map(Path, named_places(text)[1]):
            files = sorted(place.iterdir()) if place.is_dir() else [place]
            found += [storage.sha256(file)[:16] for file in files if file.is_file()]
    return found


def absolute(text: str) -> str:
    """A file of replies, or NAME=PLACE,PLACE of several seeds, seen from anywhere."""
    name, places = named_places(text)
    return f"{name}=" * bool(name) + ",".join(str(Path(place).resolve()) for place in places)


# ------------------------------------------------------------------------------------------------- measuring


def read_figures(table: Table, row: Row, workdir: Path) -> dict[str, Figure]:
    """A row's figures as its commands have left them in a workdir, with their intervals where there are any;
    empty where they are not there."""
    file, *keys = row.result or [evaluated(table), "systems", row.in_table]
    if not file or not (workdir / file).exists():
        return {}
    whole = storage.read_json(workdir / file)
    found: dict[str, Figure] = {}
    for name, column in table.columns.items():
        value = follow(whole, [*keys, *(column.read or [name])])
        if not isinstance(value, int | float):
            continue
        found[name] = value * column.scale
        span = None if row.result else follow(whole, ["intervals", row.in_table, name])
        if span:
            found[name] = [value * column.scale, *(bound * column.scale for bound in span)]
    return found


def evaluated(table: Table) -> str:
    """What the table's command writes."""
    words = shlex.split(table.evaluate)
    return f"results/{words[words.index('--name') + 1]}/metrics.json" if "--name" in words else ""


def follow(content: Any, keys: Sequence[str]) -> Any:
    """What lies below these keys; None where nothing does."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def over_seeds(runs: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """Of one seed the values, of several their mean and standard deviation."""
    if len(runs) == 1:
        return dict(runs[0])
    common = [name for name in runs[0] if all(name in run for run in runs)]
    out: dict[str, Figure] = {}
    for name in common:
        values = [bounds(run[name])[0] for run in runs]
        out[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    return out


# ---------------------------------------------------------------------------------------------------- a table


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
    print(f"\n{page_of(table, shown)}\nwritten: {target}. {not_run(table, shown)}")


def page_of(table: Table, rows: Sequence[Row]) -> str:
    lines = [f"# {table.title}", "", table.about, "", *figures_of(table, rows, table.columns), ""]
    lines += [f"- {row.name}: `{'; '.join(row.commands)}`" for row in rows if row.commands]
    return "\n".join(lines) + "\n"


def gather_places(table: Table, rows: Sequence[Row], request: Request) -> list[str]:
    """What is worth carrying away, of each workdir that the rows have, in results/tables/gathered; returns
    what there is to say of it."""
    seeds = range(FIRST_SEED, FIRST_SEED + request.seeds)
    places = dict.fromkeys(where(request, row, table, seed) for seed in seeds for row in rows)
    there = [Path(place) for place in places if Paths(place).saved.exists()]
    target = Paths(request.workdir).results / "tables" / "gathered"
    said = []
    for place in there:
        name = "-".join(place.relative_to(request.workdir).parts) or "workdir"
        left = gather(Paths(place), target / name, LIMIT // len(there))
        said += [f"gathered: {target / name}", *(f"  too large: {x}" for x in left)]
    return said


def record(results: Results, file: Path, found: dict[str, Measured], request: Request, hardware: str) -> None:
    """Write what was measured into results.yaml; rows that have figures already are left and named."""
    data = load(file.read_text(encoding="utf-8"))
    left, written = [], []
    for entry in data["rows"]:
        runs, row = found.get(entry["row"], {}), results.rows[entry["row"]]
        if runs and row.state == "run":
            left.append(row.row)
        elif runs:
            table = results.tables[row.table]
            commit = commit_of(row, table, request)
            if " " in commit or commit == "unknown":
                print(f"not recorded: {row.row}: figures belong to a commit, and it was run at {commit}")
                continue
            figures = over_seeds([*runs.values()])
            figures = {k: rounded(v, table.columns[k].digits + 2) for k, v in figures.items()}
            entry.pop("reason", None)
            entry |= {"state": "run", "commit": commit[:7], "hardware": hardware, "figures": figures}
            entry |= {"seconds": seconds_of(row, table, request), "seeds": seeds_of(row, list(runs))}
            written.append(row.row)
    write(file, data)
    print(f"recorded: {', '.join(written) or 'nothing'}; left as they stood: {', '.join(left) or 'none'}")


def own_seeds(row: Row) -> list[int | None]:
    """The seed that each training of a row names; None: that of the call."""
    commands = [shlex.split(command) for command in row.commands]
    trainings = [c for c in commands if "train_" in " ".join(c[1:3]) and "--inference" not in c]
    return [int(c[c.index("--seed") + 1]) if "--seed" in c else None for c in trainings]


def names_its_seed(row: Row) -> bool:
    """Whether another seed of the call would be no other run of a row."""
    return own_seeds(row)[-1:] not in ([], [None])


def seeds_of(row: Row, seeds: list[int]) -> list[int]:
    """Of a row that was run with `seeds`: where its trainings name seeds of their own, those stand for the
    first. Of several runs that are one row's all count, else the last one's."""
    own = [seeds[0] if seed is None else seed for seed in own_seeds(row)]
    if not own:
        return seeds
    named = dict.fromkeys(own) if named_places(row.run)[0] else own[-1:]
    return [*named, *seeds[1:]]


def commit_of(row: Row, table: Table, request: Request) -> str:
    """The commit at which a row was measured, of the first seed: that of its last command, or of the table's
    where it has none of its own. Older runs note it in their folder alone; unknown where nothing does."""
    folder = Path(where(request, row, table, FIRST_SEED))
    entries = stages.Record(folder / "results" / "tables" / "stages.json").entries
    keys = [stage_key(command, request.changes) for command in row.commands[-1:]]
    ending = table.evaluate.partition("RUNS")[2]
    if not keys and ending:
        keys = [key for key, entry in entries.items() if entry.get("line", "").endswith(ending)]
    noted = [entries[key]["commit"] for key in reversed(keys) if entries.get(key, {}).get("commit")]
    before = trained_before(row, folder, seconds_of_stages(row, entries, request))
    place = folder_of(row, folder) / "environment.json"
    if noted and not before:
        return noted[0]
    return storage.read_json(place).get("commit", "unknown") if place.exists() else "unknown"


def folder_of(row: Row, workdir: Path) -> Path:
    """Of what the row measures: its run, or where its figures stand."""
    run = named_places(row.run)[1][0]
    return workdir / (run or Path(*row.result[:1]).parent)


def trained_before(row: Row, workdir: Path, seconds: float) -> float:
    """The seconds of the row's one training, where its stage took fewer: the run was finished when the stage
    began, which loaded it and noted its own short time; else 0."""
    file = folder_of(row, workdir) / "result.json"
    if len(row.commands) != 1 or not file.exists():
        return 0.0
    own = storage.read_json(file).get("seconds", 0.0)
    return own if own > seconds else 0.0


def rounded(figure: Figure, digits: int) -> Figure:
    if isinstance(figure, dict):
        return {key: round(value, digits) for key, value in figure.items()}
    if isinstance(figure, list):
        return [round(value, digits) for value in figure]
    return round(figure, digits)


def seconds_of(row: Row, table: Table, request: Request) -> float:
    """How long the row's own commands took, of the first seed."""
    folder = Path(where(request, row, table, FIRST_SEED))
    entries = stages.Record(folder / "results" / "tables" / "stages.json").entries
    took = seconds_of_stages(row, entries, request)
    return round(max(took, trained_before(row, folder, took)), 1)


def seconds_of_stages(row: Row, entries: dict[str, dict], request: Request) -> float:
    keys = [stage_key(command, request.changes) for command in row.commands]
    return sum(entries.get(key, {}).get("seconds", 0.0) for key in keys)


def as_measured(row: Row, runs: Sequence[dict], reason: str) -> Row:
    """The row with what was measured now in place of what is recorded. `reason`: for nothing, where the row
    names none."""
    if runs:
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        return replace(row, state="run", figures=over_seeds(runs), name=row.name + seeds)
    return replace(row, state="not run", figures={}, reason=row.reason or reason)


# ---------------------------------------------------------------------------------------------- one row again


def row_of(results: Results, key: str, flag: str = "--check") -> Row:
    if key not in results.rows:
        near = difflib.get_close_matches(key, results.rows, n=3, cutoff=0.4)
        raise UserError(f"{flag} {key}: no such row; {', '.join(near) or 'docs/results.md names them all'}")
    return results.rows[key]


def check_row(results: Results, key: str, request: Request) -> bool:
    """Run a row's commands in a fresh workdir and say of each recorded figure: equal, close, off.

    True where none is off or missing. A check that was stopped goes on in the same workdir.
    """
    row = row_of(results, key)
    table = results.tables[row.table]
    if not row.commands and not row.in_table:
        raise UserError(f"--check {key}: the row has no commands; nothing here runs it")
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


def bounds(figure: Figure) -> tuple[float, float, float]:
    """(value, low, high) of a figure."""
    if isinstance(figure, dict):
        return figure["mean"], figure["mean"] - figure["std"], figure["mean"] + figure["std"]
    if isinstance(figure, list):
        return figure[0], figure[1], figure[2]
    return figure, figure, figure
