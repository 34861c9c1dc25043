"""Measure control: how far a target moves the judged level of the replies, and what that costs.

  python control.py saved/smollm2-empathetic --ranker glove-t5 --judge minilm tfidf --contexts 100
  python control.py saved/smollm2-empathetic --ranker tfidf --judge minilm --empathy-w 5 1 20 --name sweep
  python control.py saved/causal-lm/plain-marks --ways ranking marks both --name marks

For each context of the split so many candidates are sampled once, and kept: another ranker, judge or weight
samples nothing again. Of the first N the best is taken for each target: a level, 0 or 1, of one dimension,
and for no target. The judges, which must have ranked nothing, give each of these replies its level of all
three dimensions. Control is the difference between target 1 and target 0 (95 % intervals by a bootstrap over
conversations), of the mean level and of the share of replies that show it. Beside it stands the cost: mean
over replies of their mean log-probability of a token by the model without a target, BLEU-4 (normalised),
Distinct-2, words, and seconds to sample N candidates for one context.
Rankers and judges: tfidf, the critics saved/empathy/FAMILY-DIM, or the folder of a critic of all dimensions
(saved/empathy/FAMILY-all). Writes table.md, control.png, control.csv, candidates.csv and metrics.json to
results/NAME/.
"""

import argparse
from pathlib import Path

from options import (
    COUNT,
    NATURAL,
    SPLITS,
    WEIGHT,
    Paths,
    Wrong,
    add_common,
    add_device,
    check,
    given,
    make_parser,
    run,
    run_name,
)
from settings import IN_USE, Weights, device_flags, pick
from use_commands import add_base, add_sampling


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a generator")
    add_base(parser)
    add("--split", choices=SPLITS[1:], default="valid", help="whose contexts")
    add("--contexts", type=NATURAL, default=100, help="listener turns, drawn by --seed")
    add(
        "--candidates",
        type=NATURAL,
        nargs="+",
        default=[1, 4, 16, 64],
        help="among how many the best is taken; the most of these are sampled",
    )
    add("--name", type=run_name, default="control", help="folder under results/")
    add(
        "--exemplars",
        metavar="DIR",
        help="folder of {split}_dpr.csv (default: those that RUN was trained with)",
    )
    add = parser.add_argument_group("choice").add_argument
    add("--ranker", default="glove-t5", help="whose levels choose: tfidf, or a family of critics")
    add("--judge", nargs="+", default=["minilm", "tfidf"], help="who judges: tfidf, or families of critics")
    usual = Weights()
    add("--likelihood-w", type=WEIGHT, default=usual.likelihood, help="weight of the mean log-probability")
    add("--empathy-w", type=WEIGHT, nargs="+", default=[usual.empathy], help="weights of the distance")
    add(
        "--ways",
        nargs="+",
        choices=["ranking", "marks", "both"],
        default=["ranking"],
        help="ranking: one pool of candidates for all targets; marks (of a generator of --control marks): "
        "the likeliest of those written under the target's marks; both",
    )
    add = add_sampling(parser, most=IN_USE.max_new_tokens)
    add("--timed", type=COUNT, default=3, help="contexts on which the sampling is timed; 0: none")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [f"--candidates {v.problem}" for v in args.candidates if isinstance(v, Wrong)]
    problems += [f"--empathy-w {v.problem}" for v in args.empathy_w if isinstance(v, Wrong)]
    if args.ranker in args.judge:
        problems.append(
            f"--judge {args.ranker}: it is the ranker; a judge must not have ranked what it judges"
        )
    if set(args.ways) == {"marks"}:
        unread = given(parser, args, ["empathy_w"])
        problems += [f"{flag}: of ranking; --ways marks takes the likeliest" for flag in unread]
    check(parser, args, problems)
    for name in ("candidates", "judge", "empathy_w", "ways"):  # what is named twice is measured once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


def places(args: argparse.Namespace) -> Paths:
    """With the exemplars that the run was trained with, where no others are named."""
    import runs

    paths = Paths(args.workdir, exemplars=args.exemplars)
    return paths if args.exemplars else runs.with_own_exemplars(paths, Path(args.run))


def main(argv=None):
    args = parse_args(argv)
    import steering
    from session import Session

    options = pick(steering.ControlOptions, args)
    return steering.run(options, places(args), Session(**device_flags(args)))


if __name__ == "__main__":
    run(main)
