"""Score runs' predictions against the gold replies: one table, and a page of case studies.

  python evaluate_responses.py saved/t5/lempex saved/t5/plain       runs, or predictions.tsv files of anybody
  python evaluate_responses.py saved/glove-t5/lempex --family glove-t5 --name glove

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
        "runs", nargs="+", help="run folders, or tab-separated files with conv_id, utterance_idx, response"
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
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [f"{r}: no such run folder or file" for r in args.runs if not Path(r).exists()]
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import tables

    paths = Paths(args.workdir, exemplars=args.exemplars)
    return tables.evaluate(pick(tables.TableOptions, args), paths, tables.Session(**device_flags(args)))


if __name__ == "__main__":
    options.run(main)
