"""Measure a retriever on the held-out questions of its data, without training it.

  python -m DPR.evaluate_retriever --path saved/dpr/empd                     what DPR.train_dpr has trained
  python -m DPR.evaluate_retriever --encoder minilm --similarity cosine       as it is
  python -m DPR.evaluate_retriever --bm25 --candidates same-emotion          words alone, one emotion

Average rank of the reply that was given (0 is best), recall@1, 10, 50 and mean reciprocal rank, in percent,
among all passages of the held-out questions: the very ones that DPR.train_dpr measures on. Writes
results/retrieval/NAME.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python DPR/evaluate_retriever.py too

import options
from options import COUNT, DATASETS, Paths, add_common, add_device, check, make_parser, run_name
from settings import CANDIDATES, EncoderOptions, device_flags, pick
from use_commands import add_pooling, add_reading


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--path", help="folder of a train_dpr run")
    add("--encoder", help="hub name or folder of a BERT for both sides, or minilm (default: facebook/dpr-*)")
    add("--bm25", action="store_true", help="no encoder: BM25 over words")
    add_pooling(add)
    add(
        "--similarity",
        choices=["product", "cosine"],
        default="product",
        help="product is DPR's, and what exemplars are found by; cosine what MiniLM was made for",
    )
    add(
        "--candidates",
        choices=CANDIDATES,
        default="all",
        help="same-emotion: among the passages of the question's own gold emotion",
    )
    add("--dataset", choices=DATASETS, default="empd", help="whose questions")
    add("--valid-queries", type=COUNT, default=1000, help="held-out questions; 0: all")
    add_reading(add, "question", "passage")
    add(
        "--name",
        type=run_name,
        help="of the file (default: from the retriever, --similarity, --candidates and --dataset)",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = []
    if sum(map(bool, (args.path, args.encoder, args.bm25))) > 1:
        problems.append("--path, --encoder, --bm25: each is a retriever; give one of them")
    if args.path and args.pooling:
        problems.append("--path: a trained retriever brings its own pooling; leave --pooling out")
    if args.bm25 and (args.pooling or args.similarity != "product"):
        problems.append("--bm25: has no vectors; leave --pooling and --similarity out")
    if args.bm25 and (args.max_length or args.max_passage_length):
        problems.append("--bm25: reads every word; leave --max-length and --max-passage-length out")
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    from DPR import ranking
    from session import Session

    choices = pick(ranking.RankingOptions, args)
    session = Session(**device_flags(args))
    return ranking.measure(choices, pick(EncoderOptions, args), session, Paths(args.workdir), args.overwrite)


if __name__ == "__main__":
    options.run(main)
