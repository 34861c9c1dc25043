"""Score systems' replies against the gold ones, beside floors that understand nothing: tables, case studies.

  python evaluate_responses.py saved/t5/lempex saved/t5/plain       runs, or predictions.tsv files of anybody
  python evaluate_responses.py saved/glove-t5/lempex --family glove-t5 --name glove
  python evaluate_responses.py plain=saved/t5/a,saved/t5/b theirs.tsv   two seeds of one system, and a file
  python evaluate_responses.py saved/t5/lempex theirs.tsv --validate-metrics human.csv   columns
  python evaluate_responses.py saved/t5/lempex saved/t5/plain --rating-kit 50     a page for human raters
  python evaluate_responses.py --ratings ratings-*.csv                            what they said

Each table is of one set of items (--items), names it, and has a gold row and floors: one constant reply,
another item's gold reply, the nearest training reply, the best exemplar as it is. What each column is stands
under its table. Matching the gold row, not topping it, is the aim wherever a column says "nearer to gold".
Figures have 95 % bootstrap intervals over conversations; every two systems are tested pairwise on the items
that both have.
Writes metrics.json, table.md, items.csv (every score of every item), pairs.csv (every test), unmatched.csv
(replies that answer no item), case_studies.md and .html, learning_curves.png, and levels.png (the mean levels
that judges see, beside the gold replies') to results/NAME/.
"""

from pathlib import Path

import options
from options import (
    COUNT,
    ITEM_SETS,
    LAYOUTS,
    SPLITS,
    Paths,
    add_common,
    add_device,
    check,
    given,
    make_parser,
    named_places,
    number,
    run_name,
)
from settings import device_flags, pick

#: flags that only tables read
OF_TABLES = (
    *("family", "judges", "nearest", "relevance", "fluency_model", "bertscore_model", "resamples"),
    *("cases", "exemplars", "untuned_exemplars", "validate_metrics"),
)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="SYSTEM",
        help="run folders, or files of predictions; NAME=PLACE,PLACE,... are runs of one system with several "
        "seeds",
    )
    add("--split", choices=SPLITS[1:], default="test", help="which split the predictions are of")
    add(
        "--items",
        choices=ITEM_SETS,
        default="all",
        help="the listener turns that the tables are of: all, each conversation's last, the others, or those "
        "that every system answers",
    )
    add(
        "--format",
        choices=LAYOUTS,
        default="auto",
        help="how files of predictions are laid out (auto: by their names and first lines)",
    )
    add(
        "--references",
        metavar="FILE",
        help="gold replies, one a line, in the order of files that hold nothing but replies, one a line",
    )
    add(
        "--family",
        default="t5",
        help="whose critics judge: saved/empathy/FAMILY-DIM and saved/sentiment/FAMILY; those missing are "
        "left out",
    )
    add("--name", type=run_name, default="evaluation", help="folder under results/")
    add("--cases", type=COUNT, default=12, help="case studies on the page")
    add(
        "--untuned-exemplars",
        metavar="DIR",
        help="folder of the untuned retriever's {split}_dpr.csv (dpr_exemplar_retriever.py, no --path): its "
        "top exemplar stands beside the one of --exemplars in the case studies",
    )
    add(
        "--resamples",
        type=number(int, least=100),
        default=2000,
        help="bootstrap resamples of the conversations",
    )
    add(
        "--judges",
        metavar="NAME,NAME",
        help="judges of empathy that served no loss: tfidf, or families in saved/empathy (minilm, ...), each "
        "also of one half of the seeker posts (tfidf-b, minilm-b), or a folder (saved/lempex-mini); "
        "none for no judge (default: minilm and tfidf, those that can be had; of the other half where the "
        "losses' critics learnt from one)",
    )
    add(
        "--nearest",
        choices=["tfidf", "minilm", "none"],
        default="tfidf",
        help="how the floor of the nearest training reply finds a history like this one: TF-IDF (seconds) or "
        "MiniLM (the first time as long as it takes to read all training histories; then kept in the cache)",
    )
    add(
        "--relevance",
        action="store_true",
        help="the relevance stand-in, MiniLM's cosine of reply and last turn (minutes a system on a CPU)",
    )
    add(
        "--fluency-model",
        metavar="MODEL",
        help="the fluency stand-in: perplexity of the replies under this causal language model (smollm2, a "
        "folder or a hub name)",
    )
    add("--bertscore-model", metavar="DIR", help="BERTScore with the model in this folder (its last layer)")
    add(
        "--exemplars",
        metavar="DIR",
        help="folder of {split}_dpr.csv: shown in the case studies, and looked for in all replies but those "
        "of a run that had exemplars of its own (default: data/empathetic_dialogues)",
    )
    add(
        "--validate-metrics",
        metavar="FILE",
        help="human ratings of texts that stand among the replies: the rank correlation of every column with "
        "them, in validation.md",
    )
    add(
        "--rating-kit",
        type=COUNT,
        default=0,
        metavar="N",
        help="instead of a table: a page on which people rate replies to N items blindly, and its key, in "
        "results/NAME/rating_kit/",
    )
    add(
        "--rating-mode",
        choices=["likert", "ab"],
        default="likert",
        help="likert: 1 to 5 on six scales, for gold replies too; ab: the better one of two, or a tie",
    )
    add(
        "--ratings",
        nargs="+",
        default=[],
        metavar="FILE",
        help="instead of a table, without systems: what the kit's raters saved, as means with intervals, "
        "agreement, wins and losses; to ratings.md beside the kit",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = []
    for text in args.runs:
        places = named_places(text)[1]
        problems += [f"{p}: no such run folder or file" for p in places or [text] if not Path(p).exists()]
    files = [("--references", args.references), ("--validate-metrics", args.validate_metrics)]
    for flag, file in [*files, *(("--ratings", file) for file in args.ratings)]:
        if file and not Path(file).is_file():
            problems.append(f"{flag} {file}: no such file")
    if args.ratings:
        unread = given(
            parser, args, ["rating_kit", "rating_mode", "split", "items", "format", "references", *OF_TABLES]
        )
        problems += [f"{flag}: of systems, and --ratings reads none" for flag in unread]
    elif args.rating_kit:
        unread = given(parser, args, OF_TABLES)
        problems += [f"{flag}: of a table, and --rating-kit makes none; call it twice" for flag in unread]
    elif given(parser, args, ["rating_mode"]):
        problems.append("--rating-mode: of --rating-kit N")
    if bool(args.runs) == bool(args.ratings):
        problems.append("give systems (runs or predictions), or --ratings FILE ..., and not both")
    if args.bertscore_model and not Path(args.bertscore_model).is_dir():
        problems.append(f"--bertscore-model {args.bertscore_model}: no such folder")
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import ratings
    import tables
    from session import Session

    paths = Paths(args.workdir, exemplars=args.exemplars)
    kit = paths.results / args.name / "rating_kit"
    if args.ratings:
        return print(ratings.report(args.ratings, kit, args.overwrite))
    if args.rating_kit:
        examples, systems, about = tables.replies(pick(tables.TableOptions, args), paths)
        return ratings.kit_of(
            kit, examples, systems, args.rating_kit, args.rating_mode, args.seed, args.overwrite, about
        )
    return tables.evaluate(pick(tables.TableOptions, args), paths, Session(**device_flags(args)))


if __name__ == "__main__":
    options.run(main)
