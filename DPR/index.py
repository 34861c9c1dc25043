"""Nearest candidates by inner product: exact, or by an approximate index that never returns what is excluded.

Letters in shapes: Q queries, P candidates, E dimensions, B queries of a block, k of the best. Owners are
numbers there, -1 for nobody.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from options import UserError

#: groups of fewer candidates are searched exactly whatever the index: as fast there, and nothing is missed
APPROXIMATE_FROM = 10_000
SPARE = 8  # candidates beside the best k, whose scores may be equal to theirs


class Index:
    """Candidates' vectors (P, E), built once, asked often; equal scores in the candidates' order.

    `owners`: the conversation of each candidate. `groups`: where given, a query sees only candidates of its
    own group. `kind`: flat is exact; ivf and hnsw (faiss) are approximate in groups of `approximate_from`
    candidates or more. `device`: where products are taken, and where an ivf index lies.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        owners: Sequence[str],
        groups: Sequence[str] | None = None,
        kind: str = "flat",
        device: torch.device | str = "cpu",
        approximate_from: int = APPROXIMATE_FROM,
    ):
        require_finite(vectors, "candidate")
        self.vectors, self.kind, self.device = vectors, kind, torch.device(device)
        self.numbers = {owner: n for n, owner in enumerate(dict.fromkeys(owners))}
        self.owners = np.array([self.numbers[owner] for owner in owners], dtype=np.int64)  # (P,)
        self.places = by_value(groups if groups is not None else [""] * len(vectors))
        self.grouped, self.approximate_from = groups is not None, approximate_from
        self.built: dict[str, Any] = {}  # faiss indices, of the groups that were asked for
        self.tables: dict[str, Table] = {}  # likewise, of the groups that products were taken with

    @property
    def approximate(self) -> bool:
        """Whether any group is searched approximately."""
        return any(map(self.is_approximate, self.places))

    def is_approximate(self, group: str) -> bool:
        return self.kind != "flat" and len(self.places[group]) >= self.approximate_from

    def approximately(self, group: str) -> Any:
        """The faiss index of one group."""
        if group not in self.built:
            self.built[group] = build(self.kind, self.candidates(group), self.device)
        return self.built[group]

    def table(self, group: str) -> "Table":
        """One group where products with it are taken."""
        if group not in self.tables:
            self.tables[group] = Table.of(self.candidates(group), self.device)
        return self.tables[group]

    def candidates(self, group: str) -> np.ndarray:
        """(P, E) of one group."""
        places = self.places[group]
        return self.vectors if len(places) == len(self.vectors) else self.vectors[places]

    def search(
        self, queries: np.ndarray, k: int, owners: Sequence[str | None], groups: Sequence[str] | None = None
    ) -> list[list[tuple[int, float]]]:
        """For each query the places of its best candidates with their scores, best first, as `best` finds
        them; as long as are allowed."""
        places, scores = self.best(queries, k, owners, groups)
        counts = (places >= 0).sum(1).tolist()
        found = zip(places.tolist(), scores.tolist(), counts, strict=True)
        return [list(zip(row[:n], values[:n], strict=True)) for row, values, n in found]

    def best(
        self, queries: np.ndarray, k: int, owners: Sequence[str | None], groups: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each query (Q, E) the places of its best candidates, best first, and their scores, each (Q, k),
        or as wide as the largest group where that is smaller.

        `owners`: the conversation whose candidates a query must not get, None where it may have all. Fewer
        only where fewer are allowed, whatever the kind: -1 and -inf behind them.
        """
        require_finite(queries, "query")
        k = min(k, max(map(len, self.places.values()), default=0))
        asked = np.array([self.numbers.get(owner, -1) for owner in owners], dtype=np.int64)  # type: ignore
        places = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), -np.inf)
        members = by_value(groups if self.grouped and groups is not None else [""] * len(queries))
        for group in tqdm(sorted(members), desc="searching", disable=None, leave=False):
            if group not in self.places:
                continue
            rows, among = members[group], self.places[group]
            best, values = self.nearest(group, queries[rows], asked[rows], k)
            places[rows, : best.shape[1]] = np.where(best < 0, -1, among[best])
            scores[rows, : best.shape[1]] = values
        return places, scores

    def nearest(
        self, group: str, queries: np.ndarray, asked: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places among the candidates of one group and their scores, as `exact` gives them."""
        held = self.owners[self.places[group]]
        if not self.is_approximate(group):
            return exact(queries, self.table(group), asked, held, k)
        return approximate(self.approximately(group), queries, lambda: self.table(group), asked, held, k)


def by_value(values: Sequence[str]) -> dict[str, np.ndarray]:
    """{value: its places}"""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        places[value].append(place)
    return {value: np.array(found) for value, found in places.items()}


def require_finite(vectors: np.ndarray, side: str) -> None:
    """Raises `UserError` where a vector (N, E) has no place in any order, or where its products may have
    none."""
    largest = np.sqrt(np.finfo(np.float32).max / max(1, vectors.shape[1]))
    widest = np.maximum(vectors.max(axis=1, initial=0), -vectors.min(axis=1, initial=0))
    bad = np.flatnonzero(~(widest < largest))  # not <: NaN, too
    if len(bad):
        raise UserError(
            f"the vector of {side} {bad[0]} (from 0) is not finite, or too large for an inner product "
            f"({len(bad):,} of {len(vectors):,} are); the weights of its encoder are damaged"
        )


class Own:
    """Where each query's own conversation stands among the candidates."""

    def __init__(self, asked: np.ndarray, held: np.ndarray):
        self.order = held.argsort(kind="stable")
        self.begins = np.searchsorted(held[self.order], asked)
        self.counts = np.searchsorted(held[self.order], asked, side="right") - self.begins  # (Q,)

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (from `start`) and candidates that do not go together."""
        counts = self.counts[start:stop]
        before = counts.cumsum() - counts
        columns = np.arange(counts.sum()) + np.repeat(self.begins[start:stop] - before, counts)
        return np.repeat(np.arange(len(counts)), counts), self.order[columns]


# ------------------------------------------------------------------------------------------------------ exact


@dataclass(frozen=True)
class Table:
    """Candidates (P, E), also where products with them are taken, and the length of the longest."""

    vectors: np.ndarray
    there: torch.Tensor
    longest: float

    @classmethod
    def of(cls, vectors: np.ndarray, device: torch.device) -> "Table":
        there = torch.as_tensor(vectors, device=device).float()
        return cls(
            vectors, there, float(torch.linalg.vector_norm(there, dim=1).max()) if len(vectors) else 0.0
        )


def exact(
    queries: np.ndarray, table: Table, asked: np.ndarray, held: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each query (Q, E) its best candidates of other owners: (Q, k) places, best first, and scores; -1
    and -inf where no more are allowed.

    asked (Q,), held (P,): owners. Equal scores go by place. k is at most P.
    """
    candidates, device = table.vectors, table.there.device
    count, width = candidates.shape
    k, more = min(k, count), min(k + SPARE, count)
    own = Own(asked, held)
    # equal vectors can differ in the last bits of a matrix product, by their place in it
    slack = width * float(np.finfo(np.float32).eps) * table.longest * np.linalg.norm(queries, axis=1)  # (Q,)
    places = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf)
    size = max(16, min(256, 2**26 // count))
    for start in range(0, len(queries), size):
        block, near = queries[start : start + size], slack[start : start + size]
        products = torch.as_tensor(block, device=device).float() @ table.there.T  # (B, E) @ (E, P) -> (B, P)
        products[own.places(start, start + size)] = -torch.inf
        best = products.topk(more)
        found, values = best.indices.cpu().numpy(), best.values.cpu().numpy().astype(np.float64)
        with np.errstate(invalid="ignore"):  # between two that are left out
            gaps = values[:, :-1] - values[:, 1:]
        close = (gaps[:, :k] <= near[:, None]).any(1)  # their order hangs on the product's last bits
        least = values[:, k - 1] - near
        beyond = close & (values[:, -1] >= least) & (more < count)
        rows = np.flatnonzero(close & ~beyond)
        found[rows], values[rows] = in_order(block[rows], candidates, found[rows], values[rows])
        places[start : start + size] = np.where(values[:, :k] > -np.inf, found[:, :k], -1)
        scores[start : start + size] = values[:, :k]
        for row in np.flatnonzero(beyond):  # many equal ones
            allowed = (products[row] >= least[row]) & (products[row] > -torch.inf)
            likely = allowed.nonzero()[:, 0].cpu().numpy()[None]
            first, best_values = in_order(block[row][None], candidates, likely, np.zeros(likely.shape))
            most = min(k, likely.shape[1])
            places[start + row, :most], scores[start + row, :most] = first[0, :most], best_values[0, :most]
    return places, scores


def in_order(
    queries: np.ndarray, candidates: np.ndarray, places: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places (B, N) and their scores by products in double precision, best first, equal ones by place.

    A score of -inf stays.
    """
    among = candidates[places].astype(np.float64)  # (B, N, E)
    products = np.einsum("bne,be->bn", among, queries.astype(np.float64))
    products = np.where(scores == -np.inf, -np.inf, products)
    order = np.lexsort((places, -products), axis=1)
    return np.take_along_axis(places, order, 1), np.take_along_axis(products, order, 1)


# ------------------------------------------------------------------------------------------------ approximate


def build(kind: str, candidates: np.ndarray, device: torch.device | str) -> Any:
    """A faiss index over candidates (P, E), by inner product.

    ivf: 2 sqrt(P) cells, of which a query sees an eighth (on a GPU where faiss has one). hnsw: a graph of 32
    neighbours, 128 followed at a time (always on the processor).
    """
    import faiss  # late: most who import this module never search so

    vectors = np.ascontiguousarray(candidates, dtype=np.float32)
    count, width = vectors.shape
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = 128
        graph.add(vectors)
        return graph
    cells = max(1, min(count, round(2 * math.sqrt(count))))
    index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid, index.cp.niter = 64, 1, 10
    index.nprobe = -(-cells // 8)
    if torch.device(device).type == "cuda" and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.device(device).index or 0, index)
    index.train(vectors)
    index.add(vectors)
    return index


def approximate(
    index: Any, queries: np.ndarray, table: Callable[[], Table], asked: np.ndarray, held: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`exact` by an approximate index over the candidates (`build`), and exact for each query that it gives
    too few."""
    k, count = min(k, len(held)), len(held)
    own = Own(asked, held).counts
    # one's own conversation may take the best places; on a GPU faiss gives no more than 2048
    fetch = min(count, k + int(own.max(initial=0)), 2048)
    scores, places = index.search(np.ascontiguousarray(queries, dtype=np.float32), fetch)
    excluded = (places < 0) | (held[places] == asked[:, None])
    scores = np.where(excluded, -np.inf, scores.astype(np.float64))
    order = np.lexsort((places, -scores), axis=1)[:, :k]
    places, scores = np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)
    few = np.flatnonzero((scores > -np.inf).sum(1) < np.minimum(k, count - own))
    out = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
    out[0][:, : places.shape[1]] = np.where(scores > -np.inf, places, -1)
    out[1][:, : places.shape[1]] = scores
    if len(few):
        out[0][few], out[1][few] = exact(queries[few], table(), asked[few], held, k)
    return out
