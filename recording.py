"""What was measured, into results/results.yaml: figures over seeds, the commit and the time of their runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import stages
import storage
from options import named_places
from recipes import stage_key
from results import Figure, Results, Row, Table, load, write
from rows import FIRST_SEED, Measured, Request, own_seeds, where


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
    if noted and not before:
        return noted[0]
    return storage.read_if_there(folder_of(row, folder) / "environment.json").get("commit", "unknown")


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


def seconds_of(row: Row, table: Table, request: Request) -> float:
    """How long the row's own commands took, of the first seed."""
    folder = Path(where(request, row, table, FIRST_SEED))
    entries = stages.Record(folder / "results" / "tables" / "stages.json").entries
    took = seconds_of_stages(row, entries, request)
    return round(max(took, trained_before(row, folder, took)), 1)


def seconds_of_stages(row: Row, entries: dict[str, dict], request: Request) -> float:
    keys = [stage_key(command, request.changes) for command in row.commands]
    return sum(entries.get(key, {}).get("seconds", 0.0) for key in keys)


def rounded(figure: Figure, digits: int) -> Figure:
    if isinstance(figure, dict):
        return {key: round(value, digits) for key, value in figure.items()}
    if isinstance(figure, list):
        return [round(value, digits) for value in figure]
    return round(figure, digits)


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


def bounds(figure: Figure) -> tuple[float, float, float]:
    """(value, low, high) of a figure."""
    if isinstance(figure, dict):
        return figure["mean"], figure["mean"] - figure["std"], figure["mean"] + figure["std"]
    if isinstance(figure, list):
        return figure[0], figure[1], figure[2]
    return figure, figure, figure
