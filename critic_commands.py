"""The flags of the critics' trainings, and their checks.

As light as options.py, so that `--help` answers at once.
"""

import argparse

from commands import add_init_from
from options import (
    COUNT,
    FAMILIES,
    JOINT,
    NATURAL,
    POSITIVE,
    SHARE,
    Parser,
    check,
    given,
    note_ignored,
    number,
)

#: what `--model glove-t5` uses where a flag is not given: from scratch the paper's recipe stays at chance
GLOVE_CRITIC = {
    "pooling": "reply",
    "layers": 1,
    "context_len": 0,
    "word_dropout": 0.1,
    "head_dropout": 0.4,
    "lr": 5e-4,
}
T5_CRITIC = {"pooling": "first", "context_len": 100, "word_dropout": 0.0, "head_dropout": 0.1}
#: MiniLM was trained as a mean over positions; it is done with these pairs in two epochs. It reads the reply
#: alone: where it was tried (emo) no worse for that, and cheaper. A judge of context AUC must not see the
#: context: what it sees there, even a constant reply would be credited with
MINILM_CRITIC = {
    "pooling": "reply",
    "context_len": 0,
    "word_dropout": 0.0,
    "head_dropout": 0.1,
    "lr": 6e-5,
    "epochs": 2,
    "schedule": "linear",
}

#: what --baselines reads
OF_BASELINES = {"dim", "class_weights", "split_by", "part", "baselines", "workdir", "seed", "overwrite"}


def add_critic_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all four critics share."""
    add = parser.add_argument_group("critic").add_argument
    add(
        "--model",
        default="t5",
        help="t5, glove-t5, minilm (labels and judges, serves as no loss), or a hub name or folder of "
        "any encoder (T5, BERT, RoBERTa ...)",
    )
    add(
        "--size",
        choices=["tiny", "small", "base", "large"],
        default="base",
        help="of --model t5: t5-base and so on, tiny is random weights made by prepare_data.py; "
        "of glove-t5: tiny, small (width 64, 0.9M weights), else width 300",
    )
    add(
        "--pooling",
        choices=["first", "reply"],
        help="first position (the paper's; default but for glove-t5 and minilm), or mean and max over the "
        "reply",
    )
    add("--layers", type=NATURAL, help="depth of a glove-t5 encoder (default 1; the paper's 6)")
    add(
        "--context-len",
        type=COUNT,
        help="latest tokens of the context that are read (default 100; glove-t5 and minilm 0: the reply "
        "alone)",
    )
    add("--reply-len", type=NATURAL, default=64, help="first tokens of the reply that are read")
    add("--dropout", type=SHARE, default=0.1, help="inside the encoder")
    add(
        "--word-dropout",
        type=SHARE,
        help="share of word embeddings set to 0 in training (default 0, glove-t5 0.1)",
    )
    add("--head-dropout", type=SHARE, help="before the linear head (default 0.1, glove-t5 0.4)")
    add(
        "--mixture-share",
        type=number(float, least=0, most=1),
        default=0.0,
        help="share of the training replies whose words are mixed with others and with the mean of all, as "
        "in the soft replies of a generator; their targets are drawn to the mean",
    )
    add_init_from(parser)


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Distillation: a better critic labels what has no labels."""
    add = parser.add_argument_group("teacher").add_argument
    add(
        "--teacher",
        nargs="+",
        metavar="RUN",
        help="a finished critic of the same dimension, of any encoder: its probabilities for the listener "
        "turns of the training dialogues are learnt beside the pairs; of several such critics, their mean",
    )
    add(
        "--turns",
        type=COUNT,
        default=0,
        help="of --teacher: so many turns, drawn by chance, whatever the --seed the same; 0: all",
    )
    add(
        "--pieces",
        type=COUNT,
        default=0,
        help="of --teacher: learn pieces of the training replies, too: each one's sentences, so many runs of "
        "its words, and as many splices of two replies' sentences, whatever the --seed the same; 0: none",
    )
    add("--teacher-w", type=POSITIVE, default=1.0, help="of --teacher: weight of a turn where a pair has 1")


def check_critic(parser: Parser, args: argparse.Namespace, t5_lr: float = 1e-5) -> argparse.Namespace:
    """Fill in what depends on the model, then check."""
    problems = []
    if args.layers is not None and args.model != "glove-t5":
        problems.append("--layers: only a glove-t5 encoder has a choice of depth")
    if given(parser, args, ["size"]) and args.model not in FAMILIES:
        problems.append("--size: of --model t5 and glove-t5; a pretrained encoder has its own")
    if "teacher" in args and not args.teacher:
        problems += [
            f"{f}: only with --teacher" for f in given(parser, args, ("turns", "pieces", "teacher_w"))
        ]
    if getattr(args, "dim", "") == JOINT:
        for flag in ("teacher", "class_weights", "mixture_share", "baselines"):
            if getattr(args, flag):
                problems.append(f"--dim {JOINT}: --{flag.replace('_', '-')} is of one dimension")
    if getattr(args, "baselines", False):
        note_ignored(
            given(parser, args, [k for k in vars(args) if k not in OF_BASELINES]),
            "--baselines trains nothing",
        )
    own = {"glove-t5": GLOVE_CRITIC, "minilm": MINILM_CRITIC}.get(args.model, T5_CRITIC | {"lr": t5_lr})
    for name, value in ({"epochs": 12, "schedule": "constant"} | own).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(parser, args, problems)
    return args
