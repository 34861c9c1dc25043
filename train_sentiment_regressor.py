"""Train the fourth critic: VADER's sentiment of an utterance, from -1 to 1.

  python train_sentiment_regressor.py --epochs 12 --model "t5" --lr 3e-5
  python train_sentiment_regressor.py --epochs 15 --model "glove-t5" --lr 2e-5          (the paper's rate)
  python train_sentiment_regressor.py --model t5 --size tiny --epochs 1                 (offline, seconds)

Loss: squared error of tanh(score). Reads every utterance in the layout of all critics, after --context-len
tokens of the turns before it (0 for glove-t5 and minilm, else 100). Kept: the epoch with the lowest error on
the validation side; beside it stands the error of always saying the mean.
"""

import options
from commands import add_training
from critic_commands import add_critic_flags, check_critic
from options import add_common, add_device, make_parser
from settings import critic_command


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add_critic_flags(parser)
    add_training(parser, epochs=None, lr=None, batch_size=16, schedule=None)
    add_device(parser)
    return check_critic(parser, parser.parse_args(argv), t5_lr=3e-5)


def main(argv=None):
    args = parse_args(argv)
    import critic_training

    command = critic_command(args)
    return critic_training.run(command, critic_training.sentiment_task(command.paths))


if __name__ == "__main__":
    options.run(main)
