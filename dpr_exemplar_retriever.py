"""Find exemplary replies for every listener turn: dense retrieval over the training set's listener turns.

  python dpr_exemplar_retriever.py --path saved/dpr/empd                      the fine-tuned encoders
  python dpr_exemplar_retriever.py                                            as pretrained (facebook/dpr-*)
  python dpr_exemplar_retriever.py --path saved/dpr/empd --candidates all     without the gold emotion

Query: all earlier turns. Candidates: training listener turns of the same emotion (the paper's rule; it uses
the gold emotion, also of the test dialogues) or all of them; never one of the same conversation. Inner
product, exact without --index, always min(top-k, available) exemplars. Writes
data/empathetic_dialogues/{split}_dpr.csv and a note of what made it.
"""

import options
from options import NATURAL, SPLITS, Paths, add_common, add_device, check, given, make_parser, note_ignored
from settings import CANDIDATES, SearchOptions, device_flags, pick
from use_commands import add_pooling, add_reading


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--path", help="folder of a train_dpr run (default: the encoders as pretrained)")
    add(
        "--encoder",
        help="without --path: hub name or folder of a BERT for both encoders, or minilm (default: "
        "facebook/dpr-*)",
    )
    add_pooling(add)
    add(
        "--candidates",
        choices=CANDIDATES,
        default="same-emotion",
        help="same-emotion is the paper's and uses the gold emotion; all is the honest setting",
    )
    add(
        "--match",
        choices=["reply", "context", "random"],
        default="reply",
        help="compare the dialogue with the replies themselves (the paper's), or with the dialogues that "
        "they answer; random: no comparison, a control",
    )
    add(
        "--index",
        choices=["flat", "ivf", "hnsw"],
        default="flat",
        help="flat is exact; ivf and hnsw (faiss) miss some, in groups of 10,000 candidates or more "
        "(benchmarks/retrieval.py measures when that pays)",
    )
    add("--top-k", type=NATURAL, default=10, help="exemplars for each listener turn")
    add(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which listener turns get exemplars"
    )
    add_reading(add, "query", "candidate")
    add("--output", metavar="DIR", help="where the csvs go (default: data/empathetic_dialogues)")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = []
    if args.path and (args.encoder or args.pooling):
        problems.append(
            "--path: a trained retriever brings its own encoders and pooling; leave --encoder and "
            "--pooling out"
        )
    compared = ("index", "path", "encoder", "pooling", "max_length", "max_passage_length")
    if args.match == "random" and (unread := given(parser, args, compared)):
        problems.append(f"{', '.join(unread)}: --match random compares nothing; leave it out")
    check(parser, args, problems)
    if args.match == "context" and args.max_passage_length:
        note_ignored(["--max-passage-length"], "--match context reads no reply")
    return args


def main(argv=None):
    args = parse_args(argv)
    from DPR import retriever
    from session import Session

    paths = Paths(args.workdir, exemplars=args.output)
    session = Session(**device_flags(args))
    retriever.find(pick(SearchOptions, args), session, paths, args.overwrite)


if __name__ == "__main__":
    options.run(main)
