"""Label every listener turn, given its context, with the three trained empathy classifiers and VADER.

  python label_dialogues.py                          the critics in saved/empathy/t5-{emo,exp,int}
  python label_dialogues.py --family glove-t5
  python label_dialogues.py --emo saved/empathy/roberta-emo       any trained critic may label

Writes data/empathetic_dialogues/{split}_labels.csv and, beside it, a note of the critics that made it.
"""

import options
from options import (
    COUNT,
    DIMENSIONS,
    SPLITS,
    Paths,
    add_common,
    add_device,
    check,
    make_parser,
    note_void_family,
)
from settings import critic_folder, device_flags


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--family", default="t5", help="whose classifiers by default: saved/empathy/FAMILY-DIM, or FAMILY-all"
    )
    for dim in DIMENSIONS:
        parser.add_argument(
            f"--{dim}", metavar="RUN", help=f"run folder of the {DIMENSIONS[dim].name} classifier"
        )
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which files to label"
    )
    parser.add_argument(
        "--batch-size",
        type=COUNT,
        default=0,
        help="listener turns in one forward pass; 0: as many as suit the device, of like length",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where the csvs go (default: data/empathetic_dialogues)"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    check(parser, args)
    note_void_family(parser, args, DIMENSIONS)
    return args


def main(argv=None):
    args = parse_args(argv)
    import labelling

    paths = Paths(args.workdir, labels=args.output)
    folders = {dim: critic_folder(args, dim, args.family) for dim in DIMENSIONS}
    labelling.label(
        folders, args.family, args.splits, args.batch_size, paths, args.overwrite, device_flags(args)
    )


if __name__ == "__main__":
    options.run(main)
