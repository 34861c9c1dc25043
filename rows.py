"""The rows of results/results.yaml as a recipe: their commands run, and what they have left read.

The commands are run by stages.py, those of all rows of one place and seed together, in its workdir.
"""

import contextlib
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import stages
import storage
from options import SENTIMENT, Paths, named_places
from recipes import Changes, Group, Recipe, Stage, lacks_data, lines_of, plan
from results import Figure, Results, Row, Table

FIRST_SEED = 42  # of every command that is given none


#: {seed: {column: value}} of one row, of the seeds of which there are figures
Measured = dict[int, dict[str, Figure]]


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


# ------------------------------------------------------------------------------------------- rows as a recipe


def recipe_of(results: Results, rows: Sequence[Row], source: str) -> Recipe:
    """The commands of the rows and of the steps that they build on, each command once, under its own name.

    What a command builds on is what the first of all rows of its place says, whichever rows are asked for: a
    finished command is so in every call, of whatever table.
    """
    known: Recipe = {}

    def add(command: str, after: tuple[str, ...], flags: str = "") -> tuple[str, ...]:
        line = command.replace("--source SOURCE", f"--source {shlex.quote(source)}{flags and f' {flags}'}")
        known.setdefault(line, Group([line], after))
        return (line,)

    def step(name: str, flags: str) -> tuple[str, ...]:
        before = tuple(line for other in results.steps[name].after for line in step(other, flags))
        return tuple(line for command in results.steps[name].commands for line in add(command, before, flags))

    def lines(row: Row) -> tuple[str, ...]:
        flags = results.places.get(place_of(row), "")
        steps = tuple(line for name in row.after for line in step(name, flags))
        found = after = steps
        # one after the other, but for the seeds of one training; each after all that the row builds on
        for _, seeds in itertools.groupby(row.commands, key=without_seed):
            own = tuple(line for command in seeds for line in add(command, tuple(dict.fromkeys(after))))
            found, after = (*found, *own), (*steps, *own)
        return found

    def place_of(row: Row) -> str:
        return row.place_in(results.tables[row.table])

    places = {place_of(row) for row in rows}
    every = results.rows | {row.row: row for row in rows}
    of = {key: lines(row) for key, row in every.items() if place_of(row) in places}
    asked = [line for row in rows for line in of[row.row]]
    for line in asked:  # grows: with what each builds on
        asked += [before for before in known[line].after if before not in asked]
    return {line: group for line, group in known.items() if line in asked}


def without_seed(command: str) -> str:
    """What the seeds of one training have in common."""
    return re.sub(r" --(seed|name) \S+", "", command)


def where(request: Request, row: Row, table: Table, seed: int) -> str:
    """The workdir of a row: places have data of their own, further seeds everything."""
    folder = Path(request.workdir)
    if seed != FIRST_SEED:
        folder /= f"seed-{seed}"
    return str(folder / row.place_in(table))


def own_seeds(row: Row) -> list[int | None]:
    """The seed that each training of a row names; None: that of the call."""
    commands = [shlex.split(command) for command in row.commands]
    trainings = [c for c in commands if "train_" in " ".join(c[1:3]) and "--inference" not in c]
    return [int(c[c.index("--seed") + 1]) if "--seed" in c else None for c in trainings]


def names_its_seed(row: Row) -> bool:
    """Whether another seed of the call would be no other run of a row."""
    return own_seeds(row)[-1:] not in ([], [None])


# ---------------------------------------------------------------------------------------------------- running


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
    beside: Sequence[Row],
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
    others = [Path(place) for text in request.systems for place in named_places(text)[1]]
    parts = [stage.identity, *(s.identity for s in built_on)]
    parts += [*(digest for place in others for digest in storage.digests(place)), *judges_in(workdir)]
    # a run that was trained again under the same command is to be measured again
    ends = [folder / "result.json" for run in runs for folder in folders_of(run, workdir)]
    reads = tuple(storage.sha256(file)[:16] for file in ends if file.exists())
    command = [*stage.command, "--overwrite"]
    return replace(stage, command=command, identity="-".join(parts), reads=reads)


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


def absolute(text: str) -> str:
    """A file of replies, or NAME=PLACE,PLACE of several seeds, seen from anywhere."""
    name, places = named_places(text)
    return f"{name}=" * bool(name) + ",".join(str(Path(place).resolve()) for place in places)


# -------------------------------------------------------------------------------------------------- measuring


def read_figures(table: Table, row: Row, workdir: Path) -> dict[str, Figure]:
    """A row's figures as its commands have left them in a workdir, with their intervals where there are any;
    empty where they are not there."""
    file, *keys = row.result or [evaluated(table)]
    if not file or not (workdir / file).exists():
        return {}
    whole = storage.read_json(workdir / file)
    if not row.result:
        keys = ["systems" if row.in_table in whole["systems"] else "floors", row.in_table]
    found: dict[str, Figure] = {}
    weights = storage.weights_file((workdir / file).parent)
    for name, column in table.columns.items():
        value = follow(whole, [*keys, *(column.read or [name])])
        if value is None and name == "parameters" and weights.exists():  # what no result says of itself
            value = storage.parameters_in(weights)
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
