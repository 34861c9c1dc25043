"""How much likelier one model finds the gold replies than another: every two of them, paired over items.

  python train_causal_lm.py --inference RUN --no-predict --output results/RUN        minutes, no replies
  python benchmarks/likelihood.py plain=results/plain exemplars=results/one,results/two --split test

A system is a folder in which a likelihood.csv lies, or such a file, or several of either, its seeds. All are
put on the items that every one of them has. Intervals and tests as in the tables of evaluate_responses.py,
which has these columns too, but asks for replies, and these take hours; a p stands for itself here, not
corrected for the number of pairs. Writes results/benchmarks/likelihood.json.
"""

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import NATURAL, Paths, UserError, add_common, check, make_parser, named_places, run

WRITTEN = "written by --inference RUN --no-predict --output FOLDER"
COLUMNS = {"ppl_token": "PPL/token", "ppl_word": "PPL/word"}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add(
        "systems", nargs="+", metavar="[NAME=]PLACE[,PLACE...]", help="where a likelihood.csv lies; its seeds"
    )
    add("--split", choices=["valid", "test"], default="test", help="whose gold replies")
    add("--resamples", type=NATURAL, default=2000, help="of the conversations")
    args = parser.parse_args(argv)
    args.systems = [named(word) for word in args.systems]
    names = [name for name, _ in args.systems]
    problems = [
        f"two systems named {n}; name them: NAME=PLACE" for n in sorted(set(names)) if names.count(n) > 1
    ]
    for name, places in args.systems:
        problems += [] if places else [f"{name}=: names no place; NAME=PLACE"]
        problems += [
            f"{name}: {p} stands twice, which is no second seed" for p in {*places} if places.count(p) > 1
        ]
    check(parser, args, problems)
    return args


def named(word: str) -> tuple[str, list[str]]:
    """(name, places) of a system as the tables name it; without a name the place's."""
    name, places = named_places(word)
    if not places:
        return name, places
    place = Path(places[0])
    return name or (place.parent if place.is_file() else place).resolve().name, places


def known(place: str, split: str, examples) -> dict[int, tuple[float, ...]]:
    """{number of a listener turn: systems.LIKELIHOOD of its gold reply}"""
    from predicting import prediction_files
    from systems import likelihoods_of

    file = prediction_files(Path(place), split)[1] if Path(place).is_dir() else Path(place)
    found = likelihoods_of(file, examples)
    if not found:
        lacks = "no gold reply of this split" if file.exists() else "no such file"
        raise UserError(f"{file}: {lacks}; it is {WRITTEN}")
    if any(math.isnan(value) for row in found.values() for value in row[:3]):
        raise UserError(f"{file}: has gold replies without nll, tokens or words; a whole one is {WRITTEN}")
    return found


def main(argv=None):
    args = parse_args(argv)
    file = reporting.target(Paths(args.workdir), "likelihood", args.overwrite)
    import intervals
    from corpora import listener_turns
    from measuring import Standard

    examples = listener_turns(Paths(args.workdir).dialogues(args.split))
    systems = {
        name: [known(place, args.split, examples) for place in places] for name, places in args.systems
    }
    seeds = list(itertools.chain.from_iterable(systems.values()))
    numbers = tuple(sorted(set(seeds[0]).intersection(*seeds[1:])))
    groups = [examples[n].conv_id for n in numbers]
    if few := intervals.too_few(groups):
        enough = f"{intervals.FEWEST} of {intervals.FEWEST_DRAWN}"
        raise UserError(f"the gold replies in every file are {few}; a test needs {enough}")
    drawn = intervals.resamples(groups, args.resamples, args.seed)
    figures = {}
    for name, each in systems.items():
        found = [intervals.bootstrap(Standard.likelihoods(one, numbers), drawn) for one in each]
        figures[name] = {key: intervals.joined([one[key] for one in found]) for key in COLUMNS}
    print(f"{len(numbers):,} gold replies, {args.split} split, 95 % intervals over conversations")
    rows = []
    for name, found in figures.items():
        rows.append([name, str(len(systems[name])), *(shown(found[key]) for key in COLUMNS)])
    print(reporting.table(["system", "seeds", *COLUMNS.values()], rows))
    tests, rows = [], []
    for (one, left), (other, right) in itertools.combinations(figures.items(), 2):
        row = {"one": one, "other": other}
        for key in COLUMNS:
            less = intervals.difference(left[key], right[key])
            share = 100 * less.point / right[key].point
            row |= {key: {"less": less.point, "interval": less.interval(), "percent": share}}
            row[key]["p"] = intervals.paired_p(left[key], right[key])
        word = row["ppl_word"]
        rows.append([f"{one} less {other}", shown(less), f"{word['percent']:+.2f}", f"{word['p']:.3f}"])
        tests.append(row)
    if rows:
        print(reporting.table(["PPL/word", "difference", "%", "p, uncorrected"], rows))
    content = {
        name: {key: {"point": found[key].point, "interval": found[key].interval()} for key in COLUMNS}
        for name, found in figures.items()
    }
    reporting.write(file, vars(args), "cpu", {"items": len(numbers), "systems": content, "tests": tests})
    return content


def shown(estimate) -> str:
    low, high = estimate.interval()
    return f"{estimate.point:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    run(main)
