"""Are critics fit to be a loss? Their loss on replies that say nothing and on a generator's soft replies,
beside a guess by the labels' frequencies.

  python label_dialogues.py --family glove-t5 --splits valid
  python probe_critics.py saved/glove-t5/plain
  python probe_critics.py saved/glove-t5/plain --emo saved/empathy/small-emo --labels other-labels

A critic far above the guess is confidently wrong there: a generator that it leads is led by its errors.
"""

from pathlib import Path

import options
from options import CRITICS, NATURAL, SPLITS, Paths, add_common, add_device, check, make_parser
from settings import critic_folder, device_flags
from use_commands import add_base, add_critic_runs


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument("generator", metavar="RUN", help="a finished generator of the critics' words")
    add_critic_runs(parser, "--family's")
    add_base(parser, adapters=False)
    parser.add_argument("--family", default="glove-t5", help="whose critics by default")
    parser.add_argument("--kinds", nargs="+", choices=CRITICS, default=list(CRITICS), help="which critics")
    parser.add_argument("--split", choices=SPLITS, default="valid", help="whose listener turns")
    parser.add_argument("--examples", type=NATURAL, default=512, help="so many of them, evenly spaced")
    parser.add_argument("--labels", metavar="DIR", help="folder of {split}_labels.csv (default: the data's)")
    parser.add_argument("--output", metavar="FILE", help="write the figures there too, as JSON")
    add_device(parser)
    args = parser.parse_args(argv)
    unread = [kind for kind in CRITICS if getattr(args, kind) and kind not in args.kinds]
    check(parser, args, [f"--{kind}: not among --kinds {' '.join(args.kinds)}" for kind in unread])
    return args


def main(argv=None):
    args = parse_args(argv)
    import probing

    paths = Paths(args.workdir, labels=args.labels)
    folders = {kind: critic_folder(args, kind, args.family) for kind in args.kinds}
    return probing.run(
        Path(args.generator),
        folders,
        args.split,
        args.examples,
        paths,
        Path(args.output) if args.output else None,
        args.overwrite,
        device_flags(args),
        args.base,
    )


if __name__ == "__main__":
    options.run(main)
