"""Train the GloVe-T5 generator: a T5 from scratch over GloVe's words, with exemplars and frozen critics.

  python train_glove_t5.py --epochs 50 --lr 1e-4 --add-exemplars "glove-t5"   the paper's fusion, 27.6M plain
  python train_glove_t5.py --size mini --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0   on a CPU
  python train_glove_t5.py --size tiny --epochs 1 --workdir demo              seconds, on the bundled sample
  python train_glove_t5.py --inference saved/glove-t5/pool-glove-critics --predict-split valid

Losses, exemplars, decoding and outputs are train_t5.py's; here stand the backbone and its defaults. Those of
--size mini are a recipe of its own: no dropout, --lr 1e-3 that falls to 0 over 6 epochs, large updates.
"""

import sys

import options
from commands import add_generator_flags, add_training, check_generator, drop_default_bound
from options import NATURAL, add_common, add_device, make_parser
from settings import generator_command

#: what learnt fastest from scratch (LOG.md); a model that underfits for epochs has no use for dropout
MINI = {
    "dropout": 0.0,
    "epochs": 6,
    "lr": 1e-3,
    "schedule": "linear",
    "warmup_steps": 400,
    "batch_size": 96,
    "effective_batch": 96,
    "batch_tokens": 4000,
}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument_group("GloVe-T5").add_argument
    add(
        "--size",
        choices=["paper", "mini", "tiny"],
        default="paper",
        help="paper: 300 wide, 6 + 6 layers; mini: 256, 4 + 4, its own recipe; tiny: 64, 2 + 2",
    )
    add("--d-model", type=NATURAL, help="width (default: the size's)")
    add("--d-kv", type=NATURAL, help="width of an attention head (default: the size's)")
    add("--heads", type=NATURAL, help="attention heads (default: the size's)")
    add("--d-ff", type=NATURAL, help="width of the feed-forward layers (default: the size's)")
    add("--layers", type=NATURAL, help="layers of encoder and of decoder (default: the size's)")
    add_generator_flags(parser)
    add_training(parser, epochs=50, lr=1e-4, batch_size=32)
    add_device(parser)
    asked = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    if parser.parse_known_args(asked)[0].size == "mini":
        parser.set_defaults(**MINI)  # what is given as a flag still wins
    args = parser.parse_args(argv)
    drop_default_bound(parser, args)
    return check_generator(parser, args)


def main(argv=None):
    args = parse_args(argv)
    import generators

    changes = {
        "d_model": args.d_model,
        "d_kv": args.d_kv,
        "num_heads": args.heads,
        "d_ff": args.d_ff,
        "num_layers": args.layers,
    }
    command = generator_command(args, "glove-t5")
    return generators.run(
        command, lambda paths: generators.load_glove_t5(args.size, args.dropout, args.seed, paths, **changes)
    )


if __name__ == "__main__":
    options.run(main)
