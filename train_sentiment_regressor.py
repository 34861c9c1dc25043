"""Train the fourth critic: VADER's sentiment of an utterance, from -1 to 1.

  python train_sentiment_regressor.py --epochs 12 --model "t5" --lr 3e-5
  python train_sentiment_regressor.py --epochs 15 --model "glove-t5" --lr 2e-5
  python train_sentiment_regressor.py --model t5 --size tiny --epochs 1                 (offline, seconds)

Loss: squared error of tanh(score). Reads every utterance after the turns before it, in the layout of all critics.
Kept: the epoch with the lowest error on the validation side; beside it stands the error of always saying the mean.
"""

import options
from options import Paths, add_common, add_device, add_training, make_parser
from train_empathy_classifier import add_critic_flags, settle, train_critic


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add_critic_flags(parser)
    add_training(parser, epochs=12, lr=None, batch_size=16)
    add_device(parser)
    return settle(parser, parser.parse_args(argv), t5_lr=3e-5)


def utterances(path) -> tuple[list[tuple], list[str], list[float]]:
    """(the turns before; the utterance; its sentiment) of every row."""
    from dataloaders import read_vader

    table = read_vader(path)
    contexts: list[tuple] = []
    for _, turns in table.groupby("conv_id", sort=False)["utterance"]:
        contexts += [tuple(turns.iloc[:n]) for n in range(len(turns))]
    return contexts, table["utterance"].tolist(), table["sentiment"].tolist()


def main(argv=None):
    args = parse_args(argv)
    import metrics

    files = [Paths(args.workdir).vader(split) for split in ("train", "valid")]
    train, valid = (utterances(f) for f in files)
    mean = sum(train[2]) / len(train[2])
    baselines = {"mean": metrics.regression(valid[2], [mean] * len(valid[2]))}

    def measure(gold, scores):
        return metrics.regression(gold, [row[0] for row in scores])

    train_critic(args, "sentiment", train, valid, 1, files, measure, "mse", "min", baselines)


if __name__ == "__main__":
    options.run(main)
