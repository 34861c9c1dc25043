"""What a system has to beat: replies that take no understanding, and levels without a reply.

A column in which one of these beats a system says little about that system.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mode

import numpy as np
from sklearn.preprocessing import normalize

import caches
import storage
from corpora import Example
from DPR.index import Index
from DPR.retriever import Retriever
from metrics import tfidf_rows
from options import Paths
from session import Session

ZERO_LEVEL, MEAN_LEVEL, MAJORITY_LEVEL = "floor: level 0", "floor: mean level", "floor: majority level"
CONSTANT = "floor: constant reply"
OTHER_GOLD = "floor: another item's gold"
NEAREST = "floor: nearest training reply"
TOP_EXEMPLAR = "floor: top exemplar"  # as it is: what the retriever says without a generator


def derangement(conversations: Sequence[str], seed: int) -> list[int]:
    """For each item the place of another item, of another conversation, each place once.

    Items in random order, sorted by conversation, turned by the size of the largest conversation: no one
    meets their own. Where one conversation holds more than half of the items, the fewest possible meet
    another item of their own conversation; only where there is a single item, it meets itself.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(conversations))
    rank = dict(zip(names, rng.permutation(len(names)), strict=True))
    order = sorted(rng.permutation(len(conversations)), key=lambda i: rank[conversations[i]])
    largest = max(Counter(conversations).values(), default=0)
    turned = np.roll(order, max(1, min(largest, len(order) - 1)))
    out = [0] * len(conversations)
    for place, other in zip(order, turned, strict=True):
        out[place] = int(other)
    return out


def nearest_by_tfidf(
    asked: Sequence[str], known: Sequence[str], owners: Sequence[str | None], held: Sequence[str]
) -> list[int]:
    """For each history asked the place of the most alike known one (TF-IDF cosine) of another conversation.

    `owners`: the conversation of `held` that a history belongs to, None for none.
    """
    rows = tfidf_rows(known, [*known, *asked], dtype=np.float32)  # (P + N, V), of length 1
    table, queries = rows[: len(known)], rows[len(known) :]
    names = np.array(held, dtype=object)
    out = []
    for start in range(0, len(asked), 256):
        scores = (queries[start : start + 256] @ table.T).toarray()  # (256, P)
        for row, owner in zip(scores, owners[start : start + 256], strict=True):
            if owner is not None:
                row[names == owner] = -1.0
            out.append(int(row.argmax()))
    return out


def nearest_by_minilm(
    asked: Sequence[str],
    known: Sequence[str],
    owners: Sequence[str | None],
    held: Sequence[str],
    paths: Paths,
    session: Session,
) -> list[int]:
    """The same by MiniLM's cosine; the known histories' vectors stay in the cache."""
    retriever = Retriever.from_pretrained(encoder="minilm", session=session)
    encoders = retriever.encoders
    key = storage.fingerprint(str(encoders.identity), list(known), session.precision)[:16]

    def make(parts: Path | None) -> dict[str, np.ndarray]:
        return {"vectors": encoders.embed("question", list(known), session, "training", parts)}

    vectors = caches.kept(paths.cache / f"histories-{key}.npz", make)["vectors"]
    queries = encoders.embed("question", list(asked), session, "histories")
    index = Index(normalize(vectors), held)
    return [row[0][0] for row in index.search(normalize(queries), 1, owners)]


def replies(
    examples: Sequence[Example],
    training: Sequence[Example],
    seed: int,
    nearest: Callable[[list[str], list[str]], list[int]] | None,
) -> dict[str, list[str]]:
    """{name: the reply to each of `examples`}. `nearest(histories asked, known)` gives places in
    `training`."""
    usual = mode(t.response for t in training)  # of equally frequent ones the first
    found = {CONSTANT: [usual] * len(examples)}
    if len(examples) > 1:
        others = derangement([e.conv_id for e in examples], seed)
        found[OTHER_GOLD] = [examples[i].response for i in others]
    if nearest:
        places = nearest([" ".join(e.history) for e in examples], [" ".join(t.history) for t in training])
        found[NEAREST] = [training[i].response for i in places]
    return found


def levels(gold: np.ndarray) -> dict[str, np.ndarray]:
    """{name: a level for each item} of judges' floors, given the gold replies' levels (N,): constants that
    know how the gold levels are spread, and nothing of any item."""
    counts = np.bincount(gold.astype(int))
    return {
        ZERO_LEVEL: np.zeros(len(gold)),
        MEAN_LEVEL: np.full(len(gold), gold.mean() if len(gold) else 0.0),
        MAJORITY_LEVEL: np.full(len(gold), float(counts.argmax()) if len(gold) else 0.0),
    }
