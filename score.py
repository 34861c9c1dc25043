"""Score any reply, alone or with what came before it: emotional reaction, exploration, interpretation,
sentiment.

  python score.py "That must hurt so much." "Cheer up."                      the critics in saved/
  python score.py --context "My dog died last week." "I am so sorry."
  python score.py --input replies.csv --output scored.csv --column response --context post
  python score.py --input replies.jsonl --output scored.jsonl --family glove-t5
  python score.py --input - --emo saved/empathy/roberta-emo        a reply a line, from standard input

All columns of the input are kept; each critic adds its level with what it means, the probability of each
level and the expected level; sentiment is one number from -1 to 1. A critic is the folder of a run, or its
name on the hub (--emo user/name). An interrupted call goes on where it stopped.
"""

from pathlib import Path

import options
from options import FAMILIES, NATURAL, Paths, add_common, add_device, check, make_parser
from records import REPLY_COLUMNS, check_output
from settings import device_flags
from use_commands import add_critic_runs, critic_runs


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("texts", nargs="*", metavar="REPLY", help="replies to score")
    add(
        "--input",
        metavar="FILE",
        help="csv, tsv, jsonl, or a text file with a reply a line; - is standard input",
    )
    add(
        "--format",
        choices=["csv", "tsv", "jsonl", "text"],
        help="of the input (default: by its name; - is text)",
    )
    add("--column", help=f"the reply's column (default: the first of {', '.join(REPLY_COLUMNS)})")
    add(
        "--context",
        help="what came before the reply: its column (in a jsonl also a list of turns), "
        "or, for replies given by themselves, the context of all of them",
    )
    add("--output", metavar="FILE", help="csv, tsv or jsonl (default: a table on the terminal)")
    add("--prefix", default="critic_", help="what the names of the added columns begin with")
    add(
        "--family",
        help="whose critics: saved/empathy/FAMILY-DIM and so on (default: t5, glove-t5, or the bundled ones)",
    )
    add_critic_runs(parser)
    add("--batch-size", type=NATURAL, default=64, help="replies in one forward pass")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = check_output(args.output, [args.input])
    if bool(args.texts) == bool(args.input):
        problems.append("give either replies as arguments or a file with --input (- is standard input)")
    if args.texts and args.format:
        problems.append("--format: of --input")
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import scoring
    from critics import find_critics
    from session import Session

    paths = Paths(args.workdir)
    given = critic_runs(args)
    families = [args.family] if args.family else list(FAMILIES)
    session = Session(**device_flags(args))
    bundled_too = args.family is None
    critics = find_critics(paths, families, given, session, needed=True, bundled_too=bundled_too)
    return scoring.score(
        critics,
        scoring.read(args.texts, args.input, args.format, args.column, args.context),
        output=args.output and Path(args.output),
        prefix=args.prefix,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    options.run(main)
