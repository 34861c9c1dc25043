"""Find the replies of your own pool that answer a text best: any text file with a reply a line, csv or jsonl.

  python retrieve.py --pool replies.txt "My dog died last week."              the retriever in saved/dpr/empd
  python retrieve.py --pool replies.csv --column response --input posts.txt --output found.csv
  python retrieve.py --pool replies.jsonl --encoder minilm "I got the job!"

Dense retrieval, exact inner product, equal scores in the pool's order. The pool's vectors are kept beside it
(POOL.index.npz with a note of what made them) and used again while pool and encoders are the same.
"""

from pathlib import Path

import options
from options import NATURAL, Paths, add_common, add_device, check, make_parser
from records import QUESTION_COLUMNS, check_output
from settings import device_flags
from use_commands import add_pool, pool_problems


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what exemplars are wanted for")
    add(
        "--input",
        metavar="FILE",
        help="the same from a csv, tsv, jsonl, or a text file with one a line; - is standard input",
    )
    add(
        "--question-column",
        metavar="NAME",
        help=f"of --input: the text's column (default: the first of {', '.join(QUESTION_COLUMNS)})",
    )
    add("--emotion", help="only replies of this emotion (of a pool with a column emotion)")
    add_pool(parser)
    add("--top-k", type=NATURAL, default=5, help="exemplars for each text")
    add(
        "--output",
        metavar="FILE",
        help="csv, tsv (an exemplar a row) or jsonl (a question a row); default: the terminal",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [*check_output(args.output, [args.input, args.pool]), *pool_problems(args)]
    if bool(args.texts) == bool(args.input):
        problems.append("give either texts as arguments or a file with --input (- is standard input)")
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import searching
    from session import Session

    session = Session(**device_flags(args))
    retriever = searching.find_retriever(Paths(args.workdir), args.path, session, args.encoder, args.pooling)
    return searching.search(
        retriever,
        args.pool,
        args.column,
        searching.read_questions(args.texts, args.input, args.question_column),
        k=args.top_k,
        emotion=args.emotion,
        output=args.output and Path(args.output),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    options.run(main)
