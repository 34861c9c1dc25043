"""Score runs' predictions against the gold replies: one table, and a page of case studies.

  python evaluate_responses.py saved/t5/lempex saved/t5/plain       runs, or predictions.tsv files of anybody
  python evaluate_responses.py saved/glove-t5/lempex --family glove-t5 --name glove
  python evaluate_responses.py saved/t5/lempex saved/t5/plain --rating-kit 50    a page for human raters
  python evaluate_responses.py --ratings ratings-*.csv                           what they said

Columns: perplexity of the gold replies per model token and per word (13a words and one end a reply; the same
unit for every model, though a GloVe model pays for an unknown word as for one known word, and not for
capitals), BLEU-1..4 on raw strings (white space, case kept: the paper's), sacreBLEU (13a, lower-cased),
Distinct-1/2 (13a, lower-cased), mean length, and the critics' mean scores (expected label, with two labels
the probability of empathy; sentiment from -1 to 1). Matching the gold row's scores, not topping them, is the
aim; a run that was trained against these very critics is named. Writes metrics.json, table.md,
case_studies.md and .html, and learning_curves.png to results/NAME/.
"""

from pathlib import Path

import options
from commands import device_flags, pick
from options import COUNT, SPLITS, Paths, add_common, add_device, check, make_parser, run_name


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "runs", nargs="*", help="run folders, or tab-separated files with conv_id, utterance_idx, response"
    )
    parser.add_argument(
        "--split", choices=SPLITS[1:], default="test", help="which split the predictions are of"
    )
    parser.add_argument(
        "--family",
        default="t5",
        help="whose critics judge: saved/empathy/FAMILY-DIM and saved/sentiment/FAMILY; those missing are "
        "left out",
    )
    parser.add_argument("--name", type=run_name, default="evaluation", help="folder under results/")
    parser.add_argument("--cases", type=COUNT, default=12, help="case studies on the page")
    parser.add_argument(
        "--exemplars",
        metavar="DIR",
        help="folder of {split}_dpr.csv, shown in the case studies (default: data/empathetic_dialogues)",
    )
    parser.add_argument(
        "--rating-kit",
        type=COUNT,
        default=0,
        metavar="N",
        help="instead of a table: a page on which people rate replies to N items blindly, and its key, in "
        "results/NAME/rating_kit/",
    )
    parser.add_argument(
        "--rating-mode",
        choices=["likert", "ab"],
        default="likert",
        help="likert: 1 to 5 on six scales, for gold replies too; ab: the better one of two, or a tie",
    )
    parser.add_argument(
        "--ratings",
        nargs="+",
        default=[],
        metavar="FILE",
        help="instead of a table, without systems: what the kit's raters saved, as means with intervals, "
        "agreement, wins and losses; to ratings.md beside the kit",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [f"{r}: no such run folder or file" for r in args.runs if not Path(r).exists()]
    problems += [f"--ratings {f}: no such file" for f in args.ratings if not Path(f).is_file()]
    if bool(args.runs) == bool(args.ratings):
        problems.append("give systems (runs or predictions), or --ratings FILE ..., and not both")
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import ratings
    import tables

    paths = Paths(args.workdir, exemplars=args.exemplars)
    kit = paths.results / args.name / "rating_kit"
    if args.ratings:
        return print(ratings.report(args.ratings, kit, args.overwrite))
    if args.rating_kit:
        examples, systems = tables.replies(pick(tables.TableOptions, args), paths)
        return ratings.kit_of(
            kit, examples, systems, args.rating_kit, args.rating_mode, args.seed, args.overwrite
        )
    return tables.evaluate(pick(tables.TableOptions, args), paths, tables.Session(**device_flags(args)))


if __name__ == "__main__":
    options.run(main)
