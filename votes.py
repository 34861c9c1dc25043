"""Votes between two replies that were shown side by side without their runs' names, in one SQLite file.

A row is complete in itself: what was shown, in which order, from which weights and seeds.
"""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

import advice
import storage
from options import UserError, refuse_existing

CHOICES = ("A", "B", "tie", "both bad")
VERSION = 1  # of the table, as the file's user_version
TABLE = """
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    visit TEXT NOT NULL,
    turns TEXT NOT NULL,
    run_a TEXT NOT NULL, run_b TEXT NOT NULL,
    weights_a TEXT NOT NULL, weights_b TEXT NOT NULL,
    seed_a INTEGER NOT NULL, seed_b INTEGER NOT NULL,
    reply_a TEXT NOT NULL, reply_b TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'tie', 'both bad'))
)
"""


@dataclass(frozen=True)
class Shown:
    """One of the two replies, and what it came from."""

    run: str
    weights: str  # storage.identity of the run
    seed: int
    reply: str


class Votes:
    """The votes of one file. Each call opens it anew, so several threads and programs can share it."""

    def __init__(self, file: Path):
        self.file = Path(file)

    @contextlib.contextmanager
    def opened(self, looking: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction. Raises `UserError` where the file is none of ours or cannot be written. `looking`
        makes no file: where there is none, there are no votes."""
        place: Path | str = self.file
        if looking:  # it may lie where nothing can be written
            there = self.file.exists() and self.file.stat().st_size > 0
            place = f"{self.file.absolute().as_uri()}?mode=ro" if there else ":memory:"
        try:
            if place == self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            with (
                contextlib.closing(sqlite3.connect(place, timeout=30, uri=looking)) as connection,
                connection,
            ):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version not in (0, VERSION):
                    raise UserError(f"{self.file}: votes of another version of this program; move it away")
                if version == 0:
                    connection.execute(TABLE)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"{self.file}: the votes cannot be kept there ({error}); move the file away, or free space "
                "or rights there"
            ) from error

    def add(self, visit: str, turns: Sequence[str], a: Shown, b: Shown, choice: str) -> int:
        """Keep a vote; its number. `visit`: one opening of the page. `turns`: what both replied to."""
        if choice not in CHOICES:
            raise ValueError(f"{choice}: none of {', '.join(CHOICES)}")
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "visit": visit,
            "turns": json.dumps(list(turns), ensure_ascii=False),
            **{
                f"{field}_{side}": value
                for side, of in (("a", a), ("b", b))
                for field, value in vars(of).items()
            },
            "choice": choice,
        }
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        with self.opened() as connection:
            added = connection.execute(f"INSERT INTO votes ({names}) VALUES ({marks})", list(row.values()))
        assert added.lastrowid is not None
        return added.lastrowid

    def table(self) -> pd.DataFrame:
        """All votes, oldest first."""
        with self.opened(looking=True) as connection:
            return pd.read_sql_query("SELECT * FROM votes ORDER BY id", connection)

    def tally(self) -> dict[tuple[str, str], Counter]:
        """{(run, run), by name: how often each of the two was preferred, tie, both bad}"""
        found: dict[tuple[str, str], Counter] = {}
        for row in self.table().itertuples():
            first, second = sorted((str(row.run_a), str(row.run_b)))
            winner = {"A": row.run_a, "B": row.run_b}.get(str(row.choice), row.choice)
            found.setdefault((first, second), Counter())[str(winner)] += 1
        return found

    def export(self, file: Path, overwrite: bool) -> None:
        """All votes as csv. Raises `UserError` where there are none, or the file is there."""
        table = self.table()
        if table.empty:
            collect = advice.command("app.py", workdir=self.file.parent.parent, other="RUN")
            raise UserError(f"{self.file}: no votes yet; collect some with: {collect}")
        refuse_existing([file], overwrite, "another file")
        storage.write_csv(file, table)
        print(f"{file}: {len(table):,} votes")
