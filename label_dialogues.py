"""Label every listener turn, given its context, with the three trained empathy classifiers and VADER.

  python label_dialogues.py                          the critics in saved/empathy/t5-{emo,exp,int}
  python label_dialogues.py --family glove-t5
  python label_dialogues.py --emo saved/empathy/roberta-emo       any trained critic may label

Writes data/empathetic_dialogues/{split}_labels.csv and, beside it, a note of the critics that made it.
"""

from pathlib import Path

import options
from options import DIMENSIONS, SPLITS, Paths, add_common, add_device, check, make_parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--family", default="t5", help="whose classifiers by default: saved/empathy/FAMILY-DIM"
    )
    for dim in DIMENSIONS:
        parser.add_argument(
            f"--{dim}", metavar="RUN", help=f"run folder of the {DIMENSIONS[dim][0]} classifier"
        )
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which files to label"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="listener turns in one forward pass")
    parser.add_argument(
        "--output", metavar="DIR", help="where the csvs go (default: data/empathetic_dialogues)"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def main(argv=None):
    args = parse_args(argv)
    import shutil

    import pandas as pd

    import storage
    from dataloaders import LABEL_COLUMNS, critic_data, fingerprint, listener_turns, read_vader
    from inference import critic_scores, load_critics
    from models import load_tokenizer
    from session import Session

    paths = Paths(args.workdir)
    session = Session(args)
    folders = {dim: Path(getattr(args, dim) or paths.critic(dim, args.family)) for dim in DIMENSIONS}
    critics = load_critics(folders, args.family, session.device)
    tokenizers = {dim: load_tokenizer(folder) for dim, folder in folders.items()}
    made_by = {
        dim: {"critic": str(folder), "sha256": storage.sha256(folder / "model.safetensors")}
        for dim, folder in folders.items()
    }

    for split in args.splits:
        target = paths.labels(split, args.output)
        origin = {
            **made_by,
            "dialogues": storage.sha256(paths.dialogues(split)),
            "vader": storage.sha256(paths.vader(split)),
        }
        if storage.ready(target, origin, args.overwrite):
            continue
        examples = listener_turns(paths.dialogues(split))
        columns = {
            "conv_id": [e.conv_id for e in examples],
            "utterance_idx": [e.utterance_idx for e in examples],
        }
        kept: list[Path] = []
        columns |= {
            "sentiment": read_vader(paths.vader(split), examples),
            "utterance": [e.response for e in examples],
        }
        for dim, critic in critics.items():
            data = critic_data(
                [e.history for e in examples],
                columns["utterance"],
                None,
                tokenizers[dim],
                critic.settings,
                paths.cache,
            )
            keep = (
                paths.cache
                / f"labels-{fingerprint(str(origin), split, dim, session.precision, args.batch_size)[:16]}"
            )  # an interrupted stage goes on there
            columns[dim] = critic_scores(
                critic, data, session, f"{split}, {dim}", args.batch_size, keep
            ).argmax(1)
            kept.append(keep)
        table = pd.DataFrame(columns)[list(LABEL_COLUMNS)]
        storage.write_csv(target, table, origin=origin)
        for folder in kept:
            shutil.rmtree(folder, ignore_errors=True)
        shares = {
            d: {k: f"{v:.1%}" for k, v in table[d].value_counts(normalize=True).sort_index().items()}
            for d in DIMENSIONS
        }
        print(
            f"{target}: {len(table):,} listener turns; labels {shares}; mean sentiment {table['sentiment'].mean():.3f}"
        )


if __name__ == "__main__":
    options.run(main)
