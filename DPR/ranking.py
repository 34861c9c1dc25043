"""How well a retriever ranks, without training it: encoders by inner product or cosine, and BM25 beside them.

The held-out questions and passages are those of DPR.train_dpr (same data, same seed), so that the figures
stand beside what it logs.
"""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

import storage
from advice import makes
from corpora import listener_turns
from DPR.learning import HeldOut, rank_scores, read_entries
from DPR.retriever import Encoders
from options import Paths, UserError, refuse_existing
from session import Session
from settings import CANDIDATES, EncoderOptions


@dataclass(frozen=True)
class RankingOptions:
    """What is ranked by what (DPR/evaluate_retriever.py says what each flag means)."""

    bm25: bool
    similarity: str
    candidates: str
    dataset: str
    valid_queries: int
    seed: int
    name: str | None

    def default_name(self, encoders: EncoderOptions) -> str:
        system = Path(encoders.path or encoders.encoder or "dpr").name
        system += "-cosine" if self.similarity == "cosine" else ""
        rule = "" if self.candidates == "all" else f"-{self.candidates}"
        of = "" if self.dataset == "empd" else f"-of-{self.dataset}"
        return ("bm25" if self.bm25 else system) + rule + of


def bm25(questions: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """Okapi BM25 of each question and passage (Q, P); words as scikit-learn's CountVectorizer finds them.

        sum over the question's words of idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length))

    idf = log(1 + (P - n + 0.5) / (n + 0.5)), n: passages with the word (Robertson and Zaragoza 2009).
    """
    k1, b = 1.2, 0.75
    word = r"(?u)\b\w+\b"
    if not any(re.search(word, passage) for passage in passages):
        return np.zeros((len(questions), len(passages)))
    vectorizer = CountVectorizer(token_pattern=word)
    counts = vectorizer.fit_transform(passages).astype(np.float64)  # (P, W)
    lengths = np.asarray(counts.sum(1)).ravel()
    holding = np.asarray((counts > 0).sum(0)).ravel()
    weights = counts.tocoo()
    norm = k1 * (1 - b + b * lengths / lengths.mean())  # (P,)
    weights.data *= (k1 + 1) / (weights.data + norm[weights.row])
    weights.data *= np.log(1 + (len(passages) - holding + 0.5) / (holding + 0.5))[weights.col]
    return (vectorizer.transform(questions) @ weights.T.tocsr()).toarray()  # (Q, W) @ (W, P) -> (Q, P)


def allowed_by(rule: str, held: HeldOut, dialogues: Path, again: str) -> np.ndarray:
    """(Q, P) bool: passages that were also said in the question's own group, by one of settings.CANDIDATES.

    Raises `UserError`, with the command that makes the questions `again`, for one that is not of `dialogues`.
    """
    group, asked, said = CANDIDATES[rule], {}, defaultdict(set)
    for turn in listener_turns(dialogues):
        asked[" ".join(turn.history), turn.response] = group(turn)
        said[turn.response].add(group(turn))
    allowed = np.zeros((len(held.questions), len(held.passages)), bool)
    for n, (question, place) in enumerate(zip(held.questions, held.positive.tolist(), strict=True)):
        own = asked.get((question, held.passages[place]))
        if own is None:
            raise UserError(
                f"{dialogues}: not what the questions were made from; make these again with: {again}"
            )
        allowed[n] = [own in said[passage] for passage in held.passages]
    return allowed


def measure(options: RankingOptions, asked: EncoderOptions, session: Session, paths: Paths, overwrite: bool):
    """Ranks of the held-out questions' positives; written to results/retrieval/NAME.json and returned."""
    target = paths.results / "retrieval" / f"{options.name or options.default_name(asked)}.json"
    refuse_existing([target], overwrite, "another --name")
    file = paths.dpr_data(options.dataset, "valid")
    held = HeldOut.draw(read_entries(file, drop_without_positive=True), options.valid_queries, options.seed)
    storage.warn_if_stale(file, paths.dpr_sources("valid"))
    rule = options.candidates
    if rule != "all" and options.dataset != "empd":
        raise UserError(f"--candidates {rule}: only the questions of --dataset empd are turns of dialogues")
    began = time.monotonic()
    sources: dict[str, Any] = {"questions": storage.source(file, paths)}
    if options.bm25:
        scores = bm25(held.questions, held.passages)
    else:
        encoders = Encoders(asked, paths)
        encoders.require_fitting()
        sources |= encoders.origin
        encoders.to(session.device)
        questions = encoders.embed("question", held.questions, session, "questions")
        passages = encoders.embed("context", held.passages, session, "passages")
        if options.similarity == "cosine":
            questions, passages = normalize(questions), normalize(passages)
        scores = questions @ passages.T  # (Q, E) @ (E, P) -> (Q, P)
    seconds = time.monotonic() - began
    if rule != "all":
        again = makes(file, "python -m DPR.prepare_dpr_data --overwrite")
        scores = np.where(allowed_by(rule, held, paths.dialogues("valid"), again), scores, -np.inf)
    found: dict[str, Any] = rank_scores(scores, held.positive)
    found |= {"questions": len(held.questions), "passages": float(np.isfinite(scores).sum(1).mean())}
    session.say(
        ", ".join(f"{key} {value:.1f}" for key, value in found.items())
        + f" (by chance an average rank of {(found['passages'] - 1) / 2:.1f})"
    )
    found |= {"seconds": round(seconds, 1), "sources": sources}
    storage.write_json(target, found)
    session.say(f"written: {target}")
    return found
