"""Find exemplary replies for every listener turn: dense retrieval over the listener turns of the training set.

  python dpr_exemplar_retriever.py --path saved/dpr/empd                      the fine-tuned encoders
  python dpr_exemplar_retriever.py                                            the encoders as pretrained (facebook/dpr-*)
  python dpr_exemplar_retriever.py --path saved/dpr/empd --candidates all     without the gold emotion

Query: all earlier turns. Candidates: training listener turns of the same emotion (the paper's rule; it uses the gold
emotion, also of the test dialogues) or all of them; never one of the same conversation. Exact inner product, always
min(top-k, available) exemplars. Writes data/empathetic_dialogues/{split}_dpr.csv and a note of what made it.
"""

import json
from pathlib import Path

import options
from options import SPLITS, Paths, add_common, add_device, check, make_parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument("--path", help="folder of a train_dpr run (default: the encoders as pretrained)")
    parser.add_argument(
        "--encoder",
        help="without --path: hub name or folder of a BERT for both encoders, or minilm (default: facebook/dpr-*)",
    )
    parser.add_argument(
        "--pooling",
        choices=["cls", "mean"],
        default="cls",
        help="without --path: the vector of an encoder; mean for MiniLM",
    )
    parser.add_argument(
        "--candidates",
        choices=["same-emotion", "all"],
        default="same-emotion",
        help="same-emotion is the paper's and uses the gold emotion; all is the honest setting",
    )
    parser.add_argument("--top-k", type=int, default=10, help="exemplars for each listener turn")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which listener turns get exemplars"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a query; the latest are kept")
    parser.add_argument("--max-passage-length", type=int, default=64, help="tokens of a candidate")
    parser.add_argument("--batch-size", type=int, default=128, help="texts in one forward pass")
    parser.add_argument(
        "--output", metavar="DIR", help="where the csvs go (default: data/empathetic_dialogues)"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = []
    if args.path and (args.encoder or args.pooling != "cls"):
        problems.append(
            "--path: a trained retriever brings its own encoders and pooling; leave --encoder and --pooling out"
        )
    check(parser, args, problems, top_k=1)
    return args


def nearest(
    queries, candidates, query_conv: list[str], candidate_conv: list[str], k: int
) -> list[list[tuple[int, float]]]:
    """For each query (Q, E) its best k of `candidates` (P, E) from other conversations: [(place, score)], best first.

    Exact. Equal scores go by place. Fewer than k only where fewer are allowed.
    """
    import faiss
    import numpy as np

    index = faiss.IndexFlatIP(candidates.shape[1])
    index.add(np.ascontiguousarray(candidates))
    sizes: dict[str, int] = {}
    for conv in candidate_conv:
        sizes[conv] = sizes.get(conv, 0) + 1
    out: list = [None] * len(queries)
    todo = np.arange(len(queries))
    # k + 1 shows whether a tie crosses the k-th place; one's own conversation may take the best places besides
    fetch = min(len(candidates), k + 1 + max((sizes.get(c, 0) for c in query_conv), default=0))
    while len(todo):
        scores, places = index.search(np.ascontiguousarray(queries[todo]), fetch)
        again = []
        for q, row_scores, row_places in zip(todo, scores, places, strict=True):
            allowed = [
                (int(p), float(s))
                for p, s in zip(row_places, row_scores, strict=True)
                if p >= 0 and candidate_conv[p] != query_conv[q]
            ]
            if fetch < len(candidates) and len(allowed) > k and allowed[-1][1] == allowed[k - 1][1]:
                again.append(q)  # a tie goes on beyond what was fetched
                continue
            out[q] = sorted(allowed, key=lambda hit: (-hit[1], hit[0]))[:k]
        todo = np.array(again, dtype=int)
        fetch = min(len(candidates), 2 * fetch)
    return out


def retrieve(
    queries, candidates, examples: list, corpus: list, rule: str, k: int
) -> list[list[tuple[int, float]]]:
    """`nearest` inside each query's allowed candidates: places refer to `corpus`."""
    from tqdm import tqdm

    if rule == "all":
        return nearest(queries, candidates, [e.conv_id for e in examples], [c.conv_id for c in corpus], k)
    out: list = [[] for _ in examples]
    for emotion in tqdm(sorted({e.emotion for e in examples}), desc="emotions", disable=None, leave=False):
        asked = [i for i, e in enumerate(examples) if e.emotion == emotion]
        held = [i for i, c in enumerate(corpus) if c.emotion == emotion]
        if not held:
            continue
        hits = nearest(
            queries[asked],
            candidates[held],
            [examples[i].conv_id for i in asked],
            [corpus[i].conv_id for i in held],
            k,
        )
        for i, row in zip(asked, hits, strict=True):
            out[i] = [(held[p], s) for p, s in row]
    return out


def main(argv=None):
    args = parse_args(argv)
    import shutil

    import pandas as pd

    import storage
    from dataloaders import EXEMPLAR_COLUMNS, fingerprint, listener_turns
    from DPR.biencoder import SIDES, embed, load_saved, load_side, load_tokenizer, resolve
    from DPR.train_dpr import HUB
    from session import Session

    session = Session(args)
    paths = Paths(args.workdir)
    if args.path:
        encoders = load_saved(Path(args.path))
        made_by = {
            side: storage.sha256(Path(args.path) / f"{side}_encoder" / "model.safetensors") for side in SIDES
        }
    else:
        names = {side: args.encoder or HUB[side] for side in SIDES}
        encoders = {
            side: (load_side(name, side, args.pooling), load_tokenizer(name)) for side, name in names.items()
        }
        local = {f"{side} weights": Path(resolve(name)) / "model.safetensors" for side, name in names.items()}
        made_by = (
            names | {"pooling": args.pooling} | {k: storage.sha256(f) for k, f in local.items() if f.exists()}
        )
    made_by |= {
        "candidates": args.candidates,
        "top_k": args.top_k,
        "corpus": storage.sha256(paths.dialogues("train")),
    }
    made_by |= {"max_length": args.max_length, "max_passage_length": args.max_passage_length}
    todo = {}
    for split in args.splits:
        origin = {**made_by, "dialogues": storage.sha256(paths.dialogues(split))}
        if not storage.ready(paths.exemplars(split, args.output), origin, args.overwrite):
            todo[split] = origin
    if not todo:
        return
    for model, _ in encoders.values():
        model.to(session.device)
    corpus = listener_turns(paths.dialogues("train"))
    # an interrupted stage goes on there; outputs of all splits share the candidates' vectors
    keep = paths.cache / f"vectors-{fingerprint(str(made_by), session.precision, args.batch_size)[:16]}"

    def embedded(side: str, texts: list[str], max_length: int, title: str):
        return embed(
            *encoders[side],
            texts,
            session,
            max_length,
            side == "question",
            title,
            args.batch_size,
            keep / title,
        )

    candidates = embedded("context", [c.response for c in corpus], args.max_passage_length, "candidates")
    for split, origin in todo.items():
        examples = listener_turns(paths.dialogues(split))
        queries = embedded("question", [" ".join(e.history) for e in examples], args.max_length, split)
        hits = retrieve(queries, candidates, examples, corpus, args.candidates, args.top_k)
        rows = [
            (
                e.conv_id,
                e.utterance_idx,
                e.emotion,
                json.dumps(e.history, ensure_ascii=False),
                e.response,
                json.dumps([corpus[p].response for p, _ in row], ensure_ascii=False),
                json.dumps([corpus[p].key for p, _ in row]),
                json.dumps([round(s, 4) for _, s in row]),
            )
            for e, row in zip(examples, hits, strict=True)
        ]
        storage.write_csv(
            paths.exemplars(split, args.output),
            pd.DataFrame(rows, columns=list(EXEMPLAR_COLUMNS)),
            origin=origin,
        )
        fewest = min(len(row) for row in hits)
        print(
            f"{paths.exemplars(split, args.output)}: {len(rows):,} listener turns, {fewest} to {max(len(r) for r in hits)} exemplars each, "
            f"mean score of the first {sum(r[0][1] for r in hits if r) / max(sum(bool(r) for r in hits), 1):.3f}"
        )
    shutil.rmtree(keep, ignore_errors=True)


if __name__ == "__main__":
    options.run(main)
