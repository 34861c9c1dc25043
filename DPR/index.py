"""Nearest candidates by inner product: exact, or by an approximate index that never returns what is excluded.

Letters in shapes: Q queries, P candidates, E dimensions, B queries of a block, k exemplars.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from options import UserError

KINDS = ("flat", "ivf", "hnsw")
#: groups of fewer candidates are searched exactly whatever the index: as fast there, and nothing is missed
APPROXIMATE_FROM = 10_000
Hits = list[tuple[int, float]]  # places with their scores, best first


class Index:
    """Candidates' vectors (P, E), built once, asked often; equal scores in the candidates' order.

    `owners`: the conversation of each candidate. `groups`: where given, a query sees only candidates of its
    own group. `kind`: flat is exact; ivf and hnsw (faiss) are approximate in groups of `APPROXIMATE_FROM`
    candidates or more. `device`: where products are taken, and where an ivf index lies.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        owners: Sequence[str],
        groups: Sequence[str] | None = None,
        kind: str = "flat",
        device: torch.device | str = "cpu",
    ):
        require_finite(vectors, "candidate")
        self.vectors, self.owners, self.kind, self.device = vectors, owners, kind, torch.device(device)
        places: dict[str, list[int]] = {}
        for place, group in enumerate(groups if groups is not None else [""] * len(vectors)):
            places.setdefault(group, []).append(place)
        self.places = {group: np.array(numbers) for group, numbers in places.items()}
        self.grouped = groups is not None
        self.built: dict[str, Any] = {}  # faiss indices, of the groups that were asked for

    @property
    def approximate(self) -> bool:
        """Whether any group is searched approximately."""
        return self.kind != "flat" and max(map(len, self.places.values()), default=0) >= APPROXIMATE_FROM

    def search(
        self, queries: np.ndarray, k: int, owners: Sequence[str | None], groups: Sequence[str] | None = None
    ) -> list[Hits]:
        """For each query (Q, E) the places of its best `k` candidates with their scores, best first.

        `owners`: the conversation whose candidates a query must not get, None where it may have all. Fewer
        than `k` only where fewer are allowed, whatever the kind.
        """
        require_finite(queries, "query")
        asked = groups if self.grouped and groups is not None else [""] * len(queries)
        out: list[Hits] = [[] for _ in range(len(queries))]
        for group in tqdm(sorted(set(asked)), desc="searching", disable=None, leave=False):
            places = self.places.get(group)
            numbers = [i for i, g in enumerate(asked) if g == group]
            if places is None:
                continue
            held = [self.owners[p] for p in places]
            found = self.nearest(group, queries[numbers], [owners[i] for i in numbers], held, k)
            for i, row in zip(numbers, found, strict=True):
                out[i] = [(int(places[p]), score) for p, score in row]
        return out

    def nearest(
        self,
        group: str,
        queries: np.ndarray,
        owners: Sequence[str | None],
        held: Sequence[str],
        k: int,
    ) -> list[Hits]:
        """`nearest` among the candidates of one group, whose owners are `held`."""
        places = self.places[group]
        whole = len(places) == len(self.vectors)
        candidates = self.vectors if whole else self.vectors[places]
        if self.kind == "flat" or len(places) < APPROXIMATE_FROM:
            return nearest(queries, candidates, owners, held, k, self.device)
        if group not in self.built:
            self.built[group] = build(self.kind, candidates, self.device)
        return nearest_by_faiss(self.built[group], queries, candidates, owners, held, k, self.device)


def require_finite(vectors: np.ndarray, side: str) -> None:
    """Raises `UserError` where a vector (N, E) has no place in any order, or where its products may have
    none."""
    largest = np.sqrt(np.finfo(np.float32).max / max(1, vectors.shape[1]))
    bad = np.flatnonzero(~(np.abs(vectors) < largest).all(axis=1))  # not <: NaN, too
    if len(bad):
        raise UserError(
            f"the vector of {side} {bad[0]} (from 0) is not finite, or too large for an inner product "
            f"({len(bad):,} of {len(vectors):,} are); the weights of its encoder are damaged"
        )


class Own:
    """Where each query's own conversation stands among the candidates."""

    def __init__(self, asked: Sequence[str | None], held: Sequence[str]):
        self.places: dict[str | None, list[int]] = {}
        for place, owner in enumerate(held):
            self.places.setdefault(owner, []).append(place)
        self.asked = asked

    def of(self, query: int) -> list[int]:
        owner = self.asked[query]
        return [] if owner is None else self.places.get(owner, [])


# ------------------------------------------------------------------------------------------------------ exact


def nearest(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_owners: Sequence[str | None],
    candidate_owners: Sequence[str],
    k: int,
    device: torch.device | str = "cpu",
) -> list[Hits]:
    """For each query (Q, E) its best k of `candidates` (P, E) of other owners: [(place, score)], best first.

    Exact. Equal scores go by place. Fewer than k only where fewer are allowed.
    """
    own = Own(query_owners, candidate_owners)
    count, width = candidates.shape
    table = torch.as_tensor(candidates, device=device).float()
    # equal vectors can differ in the last bits of a matrix product, by their place in it
    longest = float(np.linalg.norm(candidates, axis=1).max(initial=0.0))
    slack = width * float(np.finfo(np.float32).eps) * longest * np.linalg.norm(queries, axis=1)  # (Q,)
    size = max(16, min(256, 2**26 // max(1, count)))
    out: list[Hits] = []
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        scores = torch.as_tensor(block, device=device).float() @ table.T  # (B, E) @ (E, P) -> (B, P)
        mine = [own.of(start + row) for row in range(len(block))]
        rows = [row for row, places in enumerate(mine) for _ in places]
        scores[rows, [place for places in mine for place in places]] = -torch.inf
        best = scores.topk(min(k + 1, count))
        gaps = (best.values[:, :-1] - best.values[:, 1:]).cpu().numpy()  # nan: among what is left out
        near = (gaps <= slack[start : start + size, None]).any(1)
        values, places = best.values[:, :k].tolist(), best.indices[:, :k].tolist()
        for row in range(len(block)):
            if near[row]:  # the order of some hangs on the product's last bits
                least = values[row][-1] - slack[start + row]
                likely = (scores[row] >= least) & (scores[row] > -torch.inf)
                out.append(in_order(block[row], candidates, likely.nonzero()[:, 0].cpu().numpy(), k))
                continue
            hits = zip(places[row], values[row], strict=True)
            out.append([(place, score) for place, score in hits if score > -math.inf])
    return out


def in_order(query: np.ndarray, candidates: np.ndarray, places: np.ndarray, k: int) -> Hits:
    """The best k of some candidates, by products in double precision; equal ones by place."""
    exact = (candidates[places].astype(np.float64) * query).sum(1)
    order = np.lexsort((places, -exact))[:k]
    return list(zip(places[order].tolist(), exact[order].tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ approximate


def build(kind: str, candidates: np.ndarray, device: torch.device | str = "cpu") -> Any:
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
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
    index.nprobe = -(-cells // 8)
    if torch.device(device).type == "cuda" and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.device(device).index or 0, index)
    index.train(vectors)
    index.add(vectors)
    return index


def nearest_by_faiss(
    index: Any,
    queries: np.ndarray,
    candidates: np.ndarray,
    query_owners: Sequence[str | None],
    candidate_owners: Sequence[str],
    k: int,
    device: torch.device | str = "cpu",
) -> list[Hits]:
    """`nearest` by an approximate index over `candidates` (`build`); exact for each query that it gives too
    few."""
    own = Own(query_owners, candidate_owners)
    mine = [set(own.of(query)) for query in range(len(queries))]
    # one's own conversation may take the best places; on a GPU faiss gives no more than 2048
    fetch = min(len(candidates), k + max(map(len, mine), default=0), 2048)
    out: list[Hits] = []
    scores, places = index.search(np.ascontiguousarray(queries, dtype=np.float32), fetch)
    for row_scores, row_places, left_out in zip(scores.tolist(), places.tolist(), mine, strict=True):
        hits = [
            (place, score)
            for place, score in zip(row_places, row_scores, strict=True)
            if place >= 0 and place not in left_out
        ]
        out.append(sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:k])
    few = [i for i, hits in enumerate(out) if len(hits) < min(k, len(candidates) - len(mine[i]))]
    asked = [query_owners[i] for i in few]
    exact = nearest(queries[few], candidates, asked, candidate_owners, k, device) if few else []
    for i, hits in zip(few, exact, strict=True):
        out[i] = hits
    return out
