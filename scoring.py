"""People's own texts, scored by the critics: what is asked, the columns that come of it, the file or the
table."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import storage
from critics import Critics, Score, doubts, scores, unread, wholes
from options import UserError
from records import Records, of_arguments, read_records, refuse_same_names, require_utf8, write_records


@dataclass(frozen=True)
class Asked:
    """Replies with the turns before each, in the rows that they came in."""

    records: Records
    replies: list[str]
    contexts: list[tuple[str, ...]]


def read(
    texts: Sequence[str], source: str | None, kind: str | None, column: str | None, context: str | None
) -> Asked:
    """What score.py was asked for: replies by themselves, or a file's rows.

    `context`: the column of what came before; of replies without columns the context itself.
    """
    require_utf8([context or ""])
    records = read_records(source, kind) if source else of_arguments(texts)
    replies = records.texts(records.column(column, "--column"))
    if context is None:
        contexts: list[tuple[str, ...]] = [()] * len(replies)
    elif records.plain:
        contexts = [(context,) if context.strip() else ()] * len(replies)
    else:
        contexts = records.turns(records.column(context, "--context"))
    return Asked(records, replies, contexts)


def columns_of(kind: str, labels: int, prefix: str) -> list[str]:
    """The columns that one critic adds."""
    if labels == 1:
        return [f"{prefix}{kind}"]
    chances = [f"{prefix}{kind}_p{level}" for level in range(labels)]
    return [f"{prefix}{kind}", f"{prefix}{kind}_meaning", *chances, f"{prefix}{kind}_expected"]


def values_of(score: Score) -> list[Any]:
    """Their values, in the same order."""
    if score.level is None:
        return [round(score.value, 4)]
    chances = [round(p, 4) for p in score.probabilities]
    return [score.level, score.meaning, *chances, round(score.value, 4)]


def score(
    critics: Critics, asked: Asked, *, output: Path | None, prefix: str, batch_size: int, overwrite: bool
) -> list[dict[str, Any]] | None:
    """The rows with the critics' columns, written to `output`, or shown; None where they were there
    already."""
    added = {k: columns_of(k, j.critic.settings.outputs, prefix) for k, j in critics.items()}
    refuse_same_names(
        asked.records.columns, [c for names in added.values() for c in names], "choose another --prefix"
    )
    origin: dict[str, Any] = {"prefix": prefix, "batch_size": batch_size}
    origin["precision"] = next(iter(critics.values())).session.precision
    origin["input"] = storage.fingerprint([str(asked.records.rows), str(asked.replies), str(asked.contexts)])
    for kind, scorer in critics.items():
        origin[kind] = {
            "critic": str(scorer.folder),
            "sha256": storage.sha256(scorer.folder / "model.safetensors"),
        }
    if output and storage.ready(output, origin, overwrite):
        return None
    said = [n for n, reply in enumerate(asked.replies) if reply]
    if not said:
        raise UserError(f"{asked.records.place}: every reply is empty")
    if len(said) < len(asked.replies):
        line = asked.records.lines[next(n for n, reply in enumerate(asked.replies) if not reply)]
        print(
            f"note: {len(asked.replies) - len(said)} replies are empty (the first in line {line}); "
            "their scores are left out",
            file=sys.stderr,
        )
    replies, contexts = [asked.replies[n] for n in said], [asked.contexts[n] for n in said]
    rows = [dict(row) | {c: None for names in added.values() for c in names} for row in asked.records.rows]
    for doubt in doubts(critics, replies):
        print(f"warning: {doubt}", file=sys.stderr)
    cut, how = unread(critics, replies)
    if cut:
        print(f"note: {how} (the first in line {asked.records.lines[said[cut[0]]]})", file=sys.stderr)
    blind = [kind for kind, scorer in critics.items() if not scorer.critic.settings.context_len]
    if blind and any(contexts):
        print(f"note: {', '.join(blind)}: read replies alone; no context changes them", file=sys.stderr)
    keep = {}
    if output:
        for scorer in wholes(critics):
            key = storage.fingerprint(str(origin), scorer.kind, scorer.folder)[:16]
            keep[scorer] = output.parent / f".scores-{key}"
    by_kind = scores(critics, replies, contexts, batch_size, keep)
    for kind, of_kind in by_kind.items():
        for n, found in zip(said, of_kind, strict=True):
            rows[n].update(zip(added[kind], values_of(found), strict=True))
    if output:
        columns = [*asked.records.columns, *(c for names in added.values() for c in names)]
        write_records(output, columns, rows, origin)
        for folder in keep.values():
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{output}: {len(said):,} replies scored by {', '.join(critics)}")
    else:
        print(terminal_table(replies, by_kind))
    return rows


def terminal_table(replies: Sequence[str], scores: dict[str, list[Score]]) -> str:
    """Each reply, and beneath it a line for each critic."""
    lines = []
    for n, reply in enumerate(replies):
        lines.append(reply)
        lines += [described(kind, found[n]) for kind, found in scores.items()]
    return "\n".join(lines)


def described(kind: str, score: Score) -> str:
    """One critic's view on one line."""
    if score.level is None:
        return f"  {kind:<9} {score.value:+.2f}  {score.meaning}"
    chances = " ".join(f"{level}: {p:.2f}" for level, p in enumerate(score.probabilities))
    return f"  {kind:<9} {score.level:>5}  {score.meaning} (probability of {chances})"


def as_json(score: Score) -> dict[str, Any]:
    """A score as plain values, rounded to what they are worth."""
    found = {k: v for k, v in asdict(score).items() if v not in (None, ())}
    found["value"] = round(score.value, 4)
    if score.probabilities:
        found["probabilities"] = [round(p, 4) for p in score.probabilities]
    return found
