"""Train the T5 generator: empathetic replies, guided by exemplars and by frozen critics.

  python train_t5.py --epochs 15 --lr 1e-4                                  LEMPEx on T5-small
  python train_t5.py --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0     plain: the paper's T5-PT
  python train_t5.py --model t5-tiny --epochs 1 --workdir demo              offline, random weights
  python train_t5.py --inference saved/t5/lempex --beams 8 --overwrite      write predictions again

    loss = main_w * nll + empathy_w * (emo + exp + int) + sentiment_w * sentiment        (paper, eq. 14)

nll is averaged over reply tokens; the critics' losses, against the labels of the gold reply, over examples.
Kept: the evaluation with the lowest validation nll. Afterwards the run's predictions.tsv and likelihood.csv
of the test split.
"""

import options
from commands import add_generator_flags, add_training, check_generator
from options import add_common, add_device, make_parser
from settings import generator_command


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--model",
        default="t5-small",
        help="hub name or folder of a T5; t5-tiny: random weights, made by prepare_data.py",
    )
    parser.add_argument("--from-scratch", action="store_true", help="the model's config with random weights")
    add_generator_flags(parser)
    add_training(parser, epochs=15, lr=1e-4, batch_size=8)
    add_device(parser)
    return check_generator(parser, parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    import generators

    command = generator_command(args, "t5")
    return generators.run(
        command, lambda paths: generators.load_t5(args.model, args.from_scratch, args.dropout, paths)
    )


if __name__ == "__main__":
    options.run(main)
