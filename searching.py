"""Exemplars for people's own texts, out of people's own replies: the pool, the questions, what is written or
shown."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import advice
import storage
from corpora import listener_turns
from DPR.retriever import Hit, Pool, Retriever
from hub import folder_given
from options import Paths, UserError
from records import (
    QUESTION_COLUMNS,
    Records,
    format_of,
    of_arguments,
    read_records,
    refuse_same_names,
    write_records,
)
from session import Session


def find_retriever(
    paths: Paths, run: str | None, session: Session, encoder: str | None = None, pooling: str | None = None
) -> Retriever:
    """The retriever of `run`, of the workdir, or pretrained encoders. Raises `UserError` where there is
    none."""
    if encoder:
        return Retriever.from_pretrained(None, session, encoder=encoder, pooling=pooling)
    folder = folder_given("--path", run) if run else paths.saved / "dpr" / "empd"
    if not run and not (folder / "result.json").exists():
        raise UserError(
            f"{folder}: no trained retriever; make it with: {advice.train_retriever(paths.root)}; or name "
            "one with --path, or take a pretrained one: --encoder minilm"
        )
    return Retriever.from_pretrained(folder, session)


def read_replies(file: str, column: str | None = None) -> tuple[list[str], Records]:
    """(texts, rows) of the replies of a file, without those that are empty."""
    records = read_records(file)
    texts = records.texts(records.column(column, "--column"))
    there = [n for n, text in enumerate(texts) if text]
    if not there:
        raise UserError(f"{file}: every reply is empty")
    if len(there) < len(texts):
        line = next(line for line, text in zip(records.lines, texts, strict=True) if not text)
        column = "" if records.plain else f" (column {records.column(column, '--column')})"
        empty = f"{len(texts) - len(there):,} replies are empty, the first in line {line}{column}"
        print(f"note: {file}: {empty}; they are left out", file=sys.stderr)
    rows, lines = [records.rows[n] for n in there], [records.lines[n] for n in there]
    return [texts[n] for n in there], replace(records, rows=rows, lines=lines)


def pool_of(
    retriever: Retriever,
    file: str,
    replies: tuple[list[str], Records],
    overwrite: bool,
    emotion: str | None,
) -> Pool:
    """The replies that `read_replies` has read of a file; their vectors lie beside it. An emotion column is
    known. `emotion`: one that will be asked for."""
    texts, rows = replies
    emotions = None
    if "emotion" in rows.columns and not rows.plain:
        emotions = some_emotions([str(row.get("emotion") or "") for row in rows.rows])
    check_emotion(emotion, emotions)  # before the pool is embedded, which may take long
    index = Path(file).with_name(f"{Path(file).name}.index.npz")
    return retriever.pool(texts, index, emotions=emotions, overwrite=overwrite)


def training_pool(
    retriever: Retriever, paths: Paths, match: str = "reply", emotion: str | None = None
) -> Pool:
    """The listener turns of the training dialogues, with their conversations and emotions; `match`: see
    dpr_exemplar_retriever.py. `emotion`: one that will be asked for."""
    turns = listener_turns(paths.dialogues("train"))
    texts = [t.response for t in turns]
    answering = [" ".join(t.history) for t in turns] if match == "context" else None
    key = storage.fingerprint(str(retriever.encoders.identity), answering or texts)[:16]
    file = paths.cache / f"pool-{key}.npz"
    owners, emotions = [t.conv_id for t in turns], some_emotions([t.emotion for t in turns])
    check_emotion(emotion, emotions)
    return retriever.pool(texts, file, owners, emotions, answering=answering)


def some_emotions(emotions: list[str]) -> list[str] | None:
    """None where nothing has an emotion: own dialogues may come without."""
    return emotions if any(emotions) else None


def check_emotion(emotion: str | None, emotions: Sequence[str] | None) -> None:
    """Raises `UserError` that lists the known ones: those of a pool's replies; None: these have none."""
    if emotion is None:
        return
    if emotions is None:
        raise UserError(
            "--emotion: the replies of this pool have no emotions (a column emotion); leave it out"
        )
    known = sorted(set(emotions) - {""})
    if emotion not in known:
        raise UserError(f"--emotion {emotion}: not known; the known ones are {', '.join(known)}")


def read_questions(texts: Sequence[str], source: str | None, column: str | None) -> tuple[Records, list[str]]:
    """What exemplars are wanted for: the rows, and each one's text."""
    records = read_records(source) if source else of_arguments(texts)
    read = records.column(column, "--question-column", QUESTION_COLUMNS)
    questions = records.texts(read)
    if len(records.columns) > 1 and not column:
        print(
            f"{records.place}: exemplars for what stands in its column {read} (--question-column)",
            file=sys.stderr,
        )
    if empty := [line for line, t in zip(records.lines, questions, strict=True) if not t]:
        raise UserError(f"{records.place}, line {empty[0]}: an empty text has no exemplars; take it out")
    return records, questions


def search(
    retriever: Retriever,
    pool_file: str,
    column: str | None,
    questions: tuple[Records, list[str]],
    *,
    k: int,
    emotion: str | None,
    output: Path | None,
    overwrite: bool,
) -> list[list[Hit]] | None:
    """The best `k` replies of a file for each question; written to `output` or shown."""
    asked, texts = questions
    replies = read_replies(pool_file, column)
    lines = replies[1].lines
    nested = output is not None and format_of(output) == "jsonl"
    added = ["exemplars"] if nested else ["rank", "score", "exemplar", "line"]
    origin: dict[str, Any] = {
        "pool": storage.sha256(Path(pool_file)),
        "encoders": retriever.encoders.identity,
    }
    origin |= {"column": column, "top_k": k, "emotion": emotion}
    origin["questions"] = storage.fingerprint(str(asked.rows), texts)
    if output:  # before the pool is embedded, which may take long
        refuse_same_names(asked.columns, added, "rename it in the input")
        if storage.ready(output, origin, overwrite):
            return None
    pool = pool_of(retriever, pool_file, replies, overwrite, emotion)
    found = retriever.search(texts, pool, k, emotions=[emotion] * len(texts) if emotion else None)
    if output is None:
        for question, hits in zip(texts, found, strict=True):
            print(question)
            for hit in hits:
                print(f"  {hit.score:8.3f}  {hit.text}  (line {lines[hit.place]})")
        return found
    out: list[dict[str, Any]] = []
    for row, hits in zip(asked.rows, found, strict=True):
        each = [
            {"rank": n, "score": round(h.score, 4), "exemplar": h.text, "line": lines[h.place]}
            for n, h in enumerate(hits, 1)
        ]
        out += [row | {"exemplars": each}] if nested else [row | e for e in each]
    write_records(output, [*asked.columns, *added], out, origin)
    print(f"{output}: {len(texts):,} questions, exemplars from {len(pool.texts):,} replies")
    return found
