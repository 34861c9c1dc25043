"""Search for exemplars: the published way against ours on the real dialogues, and how each index grows.

  python benchmarks/retrieval.py --part corpus --queries 4000      training listener turns, embedded once
  python benchmarks/retrieval.py --part growth --rows 100000 1000000                   random unit vectors
  python benchmarks/retrieval.py --part corpus --stand-in          random vectors, real emotions: no encoder

Corpus: the published way takes the best 2,047 of all candidates for each question and drops afterwards, in
Python, those of another emotion or of one's own conversation; ours takes products within the question's
emotion only. Beside both stands the floor: the same grouped products and top-k, bare. All search the same
vectors, without a rule for ties in the floor; the published way by faiss on a processor, and on a GPU by
products there, as ours. "with their ten": the share of questions with as many exemplars as asked for. Then
exact search among all emotions against ivf and hnsw.

Growth: build, memory (of the index), milliseconds a query, recall@10 against exact search, and the number
of queries from which on building the index has paid. Random vectors have no neighbourhoods, so recall is
worse there than on texts. An index whose build would take longer than --build-limit, judged by the size
before, is left out, and so is every one where faiss is not installed.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import COUNT, NATURAL, POSITIVE, Paths, run

APPROXIMATE = ["ivf", "hnsw"]


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=["corpus", "growth"],
        default=["corpus", "growth"],
        help="what is measured",
    )
    add("--encoder", default="minilm", help="of questions and candidates: hub name, folder, or minilm")
    add("--pooling", choices=["cls", "mean"], default="mean", help="the vector of an encoder")
    add("--stand-in", action="store_true", help="corpus: random unit vectors in place of the encoder's")
    add(
        "--queries",
        type=COUNT,
        default=4000,
        help="corpus: questions, drawn from the training turns (0: all)",
    )
    add("--top-k", type=NATURAL, default=10, help="exemplars for each question")
    add("--fetched", type=NATURAL, default=2047, help="corpus: what the published way takes before it drops")
    add("--repeats", type=NATURAL, default=2, help="corpus: turns of each way, of which the fastest counts")
    add("--rows", type=NATURAL, nargs="+", default=[100_000, 1_000_000], help="growth: candidates")
    add("--width", type=NATURAL, default=384, help="growth: dimensions of a random vector")
    add("--index", nargs="+", choices=APPROXIMATE, default=APPROXIMATE, help="beside exact search")
    add("--growth-queries", type=NATURAL, default=100, help="growth: questions")
    add("--build-limit", type=POSITIVE, default=120.0, help="seconds that an index may take to be built")
    return reporting.parsed(parser, argv)


def best_of_all(queries, vectors, k: int, device):
    """(Q, k) places, best first: by faiss, or by products on a GPU."""
    import numpy as np
    import torch

    if device.type != "cuda" and find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors))
        return index.search(np.ascontiguousarray(queries), k)[1]
    table, asked = (torch.from_numpy(x).to(device) for x in (vectors, queries))
    return np.concatenate([(block @ table.T).topk(k).indices.cpu().numpy() for block in asked.split(256)])


def published(queries, vectors, owners, emotions, asked_owners, asked_emotions, k: int, fetched: int, device):
    """The best `fetched` of everything; what is not allowed is dropped afterwards."""
    places = best_of_all(queries, vectors, min(fetched, len(vectors)), device)
    out = []
    for row, owner, emotion in zip(places.tolist(), asked_owners, asked_emotions, strict=True):
        kept = [p for p in row if emotions[p] == emotion and owners[p] != owner]
        out.append(kept[:k])
    return out


def bare(queries, vectors, emotions, asked_emotions, k: int, device):
    """Products within each emotion and their top-k: no rule but the emotion's, no order of ties."""
    import numpy as np
    import torch

    places, asked = np.array(emotions), np.array(asked_emotions)
    for emotion in sorted(set(asked_emotions)):
        candidates = torch.from_numpy(vectors[places == emotion]).to(device)
        mine = torch.from_numpy(queries[asked == emotion]).to(device)
        for start in range(0, len(mine), 256):
            (mine[start : start + 256] @ candidates.T).topk(min(k, len(candidates))).indices.cpu()


def unit_vectors(rows: int, width: int, seed: int, device):
    """(rows, width) float32 of length 1, made in blocks; on a GPU there, and others than on a processor."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    drawn = torch.Generator(device).manual_seed(seed)
    out = np.empty((rows, width), dtype=np.float32)
    for start in range(0, rows, 65536):
        shape = out[start : start + 65536].shape
        if device.type == "cuda":
            numbers = torch.randn(shape, device=device, generator=drawn)
            out[start : start + 65536] = torch.nn.functional.normalize(numbers).cpu().numpy()
        else:
            block = rng.standard_normal(shape, dtype=np.float32)
            out[start : start + 65536] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return out


def corpus_vectors(args, turns, chosen, session, paths: Paths):
    """(P, E) of all replies, (Q, E) of the chosen turns' dialogues; the real ones are kept in the cache."""
    if args.stand_in:
        device = session.device
        candidates = unit_vectors(len(turns), args.width, args.seed, device)
        return candidates, unit_vectors(len(chosen), args.width, args.seed + 1, device)
    import storage
    from DPR.retriever import Retriever
    from searching import training_pool

    retriever = Retriever.from_pretrained(None, session, encoder=args.encoder, pooling=args.pooling)
    candidates = training_pool(retriever, paths).vectors
    asked = [" ".join(turns[n].history) for n in chosen]
    key = storage.fingerprint(str(retriever.encoders.identity), asked)[:16]
    questions = retriever.pool(asked, paths.cache / f"questions-{key}.npz", answering=asked).vectors
    return candidates, questions


def measure_corpus(args, session, paths: Paths) -> dict:
    import numpy as np

    from corpora import listener_turns
    from DPR.index import Index

    turns = listener_turns(paths.dialogues("train"))
    chosen = np.sort(
        np.random.default_rng(args.seed).permutation(len(turns))[: args.queries or None]
    ).tolist()
    reporting.say(f"{len(turns):,} candidates, {len(chosen):,} questions: vectors")
    vectors, queries = corpus_vectors(args, turns, chosen, session, paths)
    owners, emotions = [t.conv_id for t in turns], [t.emotion for t in turns]
    asked_owners, asked_emotions = [owners[n] for n in chosen], [emotions[n] for n in chosen]
    k = args.top_k

    def ours():
        index = Index(vectors, owners, emotions, device=session.device)
        return index.best(queries, k, asked_owners, asked_emotions)[0]

    taken, found = reporting.seconds(
        {
            "published": lambda: published(
                queries,
                vectors,
                owners,
                emotions,
                asked_owners,
                asked_emotions,
                k,
                args.fetched,
                session.device,
            ),
            "ours": ours,
            "bare": lambda: bare(queries, vectors, emotions, asked_emotions, k, session.device),
        },
        args.repeats,
    )
    found["ours"] = [[place for place in row if place >= 0] for row in found["ours"].tolist()]
    full = {way: [len(row) == k for row in found[way]] for way in ("published", "ours")}
    shares = {way: 100 * sum(rows) / len(rows) for way, rows in full.items()}
    texts = [t.response for t in turns]
    same = [
        [texts[p] for p in a] == [texts[p] for p in b]  # copies of one reply have no order
        for a, b in zip(found["published"], found["ours"], strict=True)
        if len(a) == k
    ]
    rows = [
        [way, 1000 * taken[way] / len(chosen), taken[way] / taken["ours"], shares.get(way, "")]
        for way in taken
    ]
    print(f"\n{len(vectors):,} candidates of {len(set(emotions))} emotions, {len(chosen):,} questions")
    print(reporting.table(["way", "ms a question", "times ours", f"with their {k}, %"], rows))
    agree = 100 * sum(same) / len(same) if same else None
    of = f"{agree:.2f} %" if same else "it fills none"
    print(f"same exemplars in the same order, of the rows that the published way fills: {of}")
    all_rows = grow(args, vectors, queries[: args.growth_queries], owners, asked_owners, {}, session)
    return {
        "candidates": len(vectors),
        "questions": len(chosen),
        "seconds": taken,
        "with_their_k": shares,
        "same_order": agree,
        "all_emotions": all_rows,
    }


def grow(args, vectors, queries, owners, asked_owners, before: dict, session) -> list[dict]:
    """Exact search, then each index, on the same vectors. `before`: (candidates, seconds to build) of the
    size before."""
    from DPR.index import Index

    kinds = args.index
    if find_spec("faiss"):
        import faiss  # noqa: F401 (so that its import is no part of a build)
    else:
        reporting.say("faiss is not installed: exact search alone")
        kinds = []

    def search(index: Index) -> tuple[float, list]:
        """Milliseconds a question, and what was found."""
        if session.device.type == "cuda":  # libraries are loaded by the first product
            index.search(queries[:1], args.top_k, asked_owners[:1])
        began = time.perf_counter()
        hits = index.search(queries, args.top_k, asked_owners[: len(queries)])
        return 1000 * (time.perf_counter() - began) / len(queries), hits

    def prepared(index: Index) -> float:
        """Seconds until it can be asked."""
        began = time.perf_counter()
        for group in index.places:
            index.approximately(group) if index.is_approximate(group) else index.table(group)
        reporting.settle()
        return time.perf_counter() - began

    flat = Index(vectors, owners, device=session.device)
    moved = prepared(flat)  # to the device
    plain, exact = search(flat)
    del flat
    size = vectors.nbytes / 2**20
    found = [{"index": "flat", "build": moved, "MiB": size, "ms": plain, "recall": 100.0, "pays": ""}]
    for kind in kinds:
        if kind in before:
            rows, took = before[kind]
            guess = took * (len(vectors) / rows) ** (1.5 if kind == "ivf" else 1.1)
            if guess > args.build_limit:
                reporting.say(
                    f"{kind} of {len(vectors):,}: left out, would take about {guess:.0f} s to build"
                )
                continue
        reporting.say(f"{kind} of {len(vectors):,}")
        index = Index(vectors, owners, kind=kind, device=session.device, approximate_from=1)
        built = prepared(index)
        before[kind] = (len(vectors), built)
        each, hits = search(index)
        kept = [
            len({p for p, _ in a} & {p for p, _ in b}) / len(a) for a, b in zip(exact, hits, strict=True) if a
        ]
        row = {"index": kind, "build": built, "MiB": written_size(index.built[""]) / 2**20, "ms": each}
        row["pays"] = round(1000 * built / (plain - each)) if each < plain else "never"
        found.append(row | {"recall": 100 * sum(kept) / max(1, len(kept))})
        del index
    columns = {
        "index": "index",
        "build": "build, s",
        "MiB": "MiB",
        "ms": "ms a question",
        "recall": "recall@k, %",
    }
    columns["pays"] = "pays from questions"
    print(f"\n{len(vectors):,} candidates of {vectors.shape[1]} dimensions, {len(queries):,} questions")
    print(
        reporting.table(list(columns.values()), [[row[name] for name in columns] for row in found]),
        flush=True,
    )
    return found


def written_size(index) -> int:
    """Bytes of a faiss index."""
    import faiss

    library: Any = faiss  # its stubs lack the writer
    sizes: list[int] = []
    written = faiss.index_gpu_to_cpu(index) if hasattr(index, "getDevice") else index
    library.write_index(written, library.PyCallbackIOWriter(lambda part: sizes.append(len(part))))
    return sum(sizes)


def measure_growth(args, session) -> dict:

    queries = unit_vectors(args.growth_queries, args.width, args.seed + 1, session.device)
    before: dict = {}
    found = {}
    for rows in sorted(args.rows):
        reporting.say(f"{rows:,} random unit vectors")
        owners = [str(n // 4) for n in range(rows)]
        vectors = unit_vectors(rows, args.width, args.seed, session.device)
        found[str(rows)] = grow(args, vectors, queries, owners, [None] * len(queries), before, session)
    return found


def main(argv=None):
    args = parse_args(argv)

    session, paths, file = reporting.begin(args, "retrieval")
    result: dict = {}
    if "corpus" in args.part:
        result["corpus"] = measure_corpus(args, session, paths)
    if "growth" in args.part:
        result["growth"] = measure_growth(args, session)
    reporting.write(file, vars(args), session.device.type, result)
    return result


if __name__ == "__main__":
    run(main)
