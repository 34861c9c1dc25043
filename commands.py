"""The flags of trainings and generators, and their checks; the settings they become stand in settings.py.

As light as options.py, so that `--help` answers at once.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from options import (
    COUNT,
    CRITICS,
    DIMENSIONS,
    NATURAL,
    POSITIVE,
    SHARE,
    WEIGHT,
    Parser,
    batch_count,
    check,
    given,
    note_ignored,
    note_void_family,
    number,
    run_name,
)
from settings import EXEMPLAR_WAYS, PARAPHRASER
from use_commands import add_critic_runs, add_sampling


def add_training(
    parser: argparse.ArgumentParser,
    *,
    epochs: int | None,
    lr: float | None,
    batch_size: int,
    schedule: str | None = "constant",
    clip: float = 1.0,
    untrained: bool = False,
) -> None:
    """The flags of the training loop; the keyword arguments are the stage's own defaults (None: by model).

    `untrained`: no epoch at all is of use too.
    """
    group = parser.add_argument_group("training loop")
    add = group.add_argument
    add("--name", type=run_name, help="name of the run's folder (default: from the stage and the model)")
    add(
        "--epochs",
        type=COUNT if untrained else NATURAL,
        default=epochs,
        help="passes over the training data"
        + ("" if epochs else "; default: 12, minilm 2")
        + ("; 0: none, the pretrained model as it stands (zero-shot)" if untrained else ""),
    )
    add("--max-steps", type=COUNT, default=0, help="stop after so many updates; 0: no limit")
    add(
        "--lr",
        type=POSITIVE,
        default=lr,
        help="peak learning rate (AdamW)" + ("" if lr else "; default: by model"),
    )
    add(
        "--batch-size",
        type=batch_count,
        default=batch_size,
        metavar="{N,auto}",
        help="examples in one forward pass and process; auto: the most that fits, and by --accumulate the "
        "default's number in an update",
    )
    parser.set_defaults(effective_batch=batch_size)
    add(
        "--batch-tokens",
        type=COUNT,
        default=0,
        help="also close an update at so many tokens for each forward pass and process of it, which share "
        "them about evenly: examples times the longest one's, source and reply counted together (padded each "
        "to its own longest they may take more); 0: no such limit",
    )
    add("--accumulate", type=NATURAL, default=1, help="forward passes per update")
    add(
        "--schedule",
        choices=["constant", "linear", "cosine"],
        default=schedule,
        help="course of the learning rate after warm-up (constant: the paper's)"
        + ("" if schedule else "; default: constant, minilm linear"),
    )
    add("--warmup-steps", type=COUNT, default=0, help="updates over which the rate rises from 0")
    add("--weight-decay", type=WEIGHT, default=0.0, help="AdamW's, not on norms and biases")
    add("--clip", type=WEIGHT, default=clip, help="largest gradient norm; 0: no clipping")
    add(
        "--patience",
        type=COUNT,
        default=0,
        help="stop after so many evaluations without a better one; 0: never",
    )
    add(
        "--eval-every",
        type=COUNT,
        default=0,
        help="updates between evaluations; 0: at the end of every epoch",
    )
    add(
        "--save-every",
        type=COUNT,
        default=0,
        help="also save a checkpoint every so many updates; 0: only before and after evaluations",
    )
    add("--log-every", type=NATURAL, default=20, help="updates between log lines")
    add(
        "--resume",
        default="auto",
        metavar="{auto,never,CHECKPOINT}",
        help="auto: go on from the newest good checkpoint; never: refuse a folder that has one; "
        "or the checkpoint to go on from",
    )
    add("--deterministic", action="store_true", help="deterministic kernels only (slower on CUDA)")
    add(
        "--compile",
        action="store_true",
        help="compile the models' layers: minutes at the first start, then faster steps (worth it on a GPU)",
    )


def add_sampled_flags(parser: argparse.ArgumentParser) -> None:
    """A loss on sampled replies, its critics, and the labels that it compares with."""
    add = parser.add_argument_group("loss on sampled replies").add_argument
    add(
        "--sampled-loss-w",
        type=WEIGHT,
        default=0.0,
        help="weight of a policy gradient on replies that the model samples, rewarded by critics "
        "(--sampled-reward); 0: nothing is sampled",
    )
    add(
        "--sampled-reward",
        choices=["energy", "distance"],
        default="energy",
        help="energy: the energy score, a proper scoring rule, so that the replies to a context show each "
        "level as often as people's; distance: how near each reply is to the gold reply's labels, so that "
        "every context gets its commonest level",
    )
    add("--samples", type=number(int, least=2), default=4, help="replies sampled to each context")
    add(
        "--sampled-examples",
        type=COUNT,
        default=8,
        help="contexts of a batch that are replied to, drawn by chance; 0: all",
    )
    add(
        "--sampled-top-k",
        type=COUNT,
        default=0,
        help="they are drawn among the K likeliest tokens (0: all); as --top-k, to learn what use will write",
    )
    add("--sampled-temperature", type=POSITIVE, default=1.0, help="and at this temperature")
    add_critic_runs(parser, "this family's")
    add("--labels", metavar="DIR", help="folder of {split}_labels.csv (default: data/empathetic_dialogues)")


def add_init_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="begin with the weights of this finished run: more epochs, or another objective",
    )


#: flags that change what is written after training, not the training
DECODING = {
    "top_k",
    "top_p",
    "temperature",
    "beams",
    "no_repeat_ngram",
    "max_new_tokens",
    "predict",
    "replies",
    "predict_split",
    "predict_batch_size",
    "inference",
    "output",
}


#: flags that --inference heeds
OF_INFERENCE = DECODING | {
    "workdir",
    "overwrite",
    "seed",
    "device",
    "precision",
    "deterministic",
    "exemplars",
    "exemplar_model",
    "base",
}


def drop_default_bound(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """With --batch-size auto, what fits takes the place of a stage's own --batch-tokens."""
    if args.batch_size == "auto" and args.batch_tokens == parser.get_default("batch_tokens"):
        args.batch_tokens = 0


def add_generator_flags(parser: argparse.ArgumentParser) -> None:
    """What all generators share."""
    add = parser.add_argument_group("exemplars").add_argument
    add(
        "--add-exemplars",
        choices=EXEMPLAR_WAYS,
        default="prepend",
        help="prepend their text to the source; or the paper's pooled vector, "
        "by a frozen T5 or by a GloVe encoder trained along",
    )
    add("--top-exemplars", type=NATURAL, default=10, help="exemplars for each example")
    add(
        "--exemplar-len",
        type=number(int, least=2),
        default=150,
        help="source tokens that prepended exemplars share; or tokens of one pooled exemplar",
    )
    add(
        "--exemplar-model",
        default=PARAPHRASER,
        help="of --add-exemplars t5: hub name or folder (t5-tiny: offline)",
    )
    add(
        "--exemplar-layers", type=NATURAL, default=6, help="of --add-exemplars glove-t5: depth of its encoder"
    )
    add("--exemplars", metavar="DIR", help="folder of {split}_dpr.csv (default: data/empathetic_dialogues)")
    add = parser.add_argument_group("losses").add_argument
    add("--main-loss-w", type=WEIGHT, default=1.0, help="weight of the reply's negative log-likelihood")
    add(
        "--empathy-loss-w",
        type=WEIGHT,
        default=1.0,
        help="weight of the empathy critics; 0 loads none of them",
    )
    add(
        "--empathy-losses",
        nargs="+",
        choices=DIMENSIONS,
        metavar="DIM",
        help=f"those of {', '.join(DIMENSIONS)} that count (default: all), to see what each does alone",
    )
    add(
        "--sentiment-loss-w",
        type=WEIGHT,
        default=1.0,
        help="weight of the sentiment critic; 0 does not load it",
    )
    add(
        "--strategy",
        type=int,
        choices=[0, 1, 2],
        default=0,
        help="soft reply: 0 softmax, 1 Gumbel-softmax, 2 straight-through Gumbel",
    )
    add(
        "--critic-targets",
        choices=["labels", "soft"],
        default="labels",
        help="what critics compare with: the gold reply's labels, or their own view of it in full (which "
        "asks for labels all the same: what a guess would lose is said at the start)",
    )
    add(
        "--critic-ramp",
        type=COUNT,
        default=0,
        metavar="N",
        help="let the critics' weights rise from 0 over so many updates",
    )
    add(
        "--balance",
        type=WEIGHT,
        default=0.0,
        metavar="SHARE",
        help="cut each critic's gradient at the logits to this share of the nll's; 0: as long as it is",
    )
    add(
        "--log-gradients",
        action="store_true",
        help="at every evaluation, also log how long each term's own gradient is",
    )
    add(
        "--family",
        help="whose critics lead, where none are named: saved/empathy/FAMILY-DIM, such as glove-t5-a of one "
        "half of the seeker posts (default: t5 or glove-t5; critics of another --model are named by the last "
        "part of its name)",
    )
    add_sampled_flags(parser)
    add_control(parser)
    add = parser.add_argument_group("lengths").add_argument
    add("--src-len", type=NATURAL, default=200, help="latest tokens of the dialogue")
    add("--tgt-len", type=number(int, least=2), default=50, help="tokens of a reply in training")
    add("--dropout", type=SHARE, default=0.1, help="inside the generator")
    parser.add_argument(
        "--targets",
        choices=["all"],
        help="all: also learn to write the speaker's turns, for which there are no exemplars, labels or "
        "critics (default: the listener's alone; --init-from goes on with these)",
    )
    add_init_from(parser)
    add_decoding_flags(parser)


def add_control(parser: argparse.ArgumentParser) -> None:
    """What lets a generator be steered in use."""
    parser.add_argument_group("control").add_argument(
        "--control",
        choices=["marks"],
        help="marks: before each training reply stand levels of empathy that it shows, of some dimensions by "
        "chance, from train_labels.csv (none for a tenth of the replies); in use the --target of respond.py",
    )


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """How replies are written, after the training or without one."""
    add = add_sampling(parser, most=100)
    add("--beams", type=NATURAL, default=1, help="above 1: beam search in place of sampling (the paper: 8)")
    add(
        "--no-repeat-ngram",
        type=COUNT,
        default=0,
        metavar="N",
        help="no N tokens in a row come a second time in a reply (of a causal language model: nor those of "
        "the dialogue before it); 0: they may",
    )
    add(
        "--predict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write predictions after training; with --inference, --no-predict: no replies, only the gold "
        "replies' likelihood",
    )
    add("--predict-split", choices=["valid", "test"], default="test", help="whose predictions")
    add("--predict-batch-size", type=NATURAL, default=64, help="contexts replied to at a time")
    add(
        "--replies",
        type=NATURAL,
        default=1,
        help="to each context; with several, predictions.tsv numbers them in a column `sample`, and tables "
        "show the context AUC of their mean levels",
    )
    add(
        "--inference",
        metavar="RUN",
        help="train nothing; write predictions of this finished run, with its own lengths and exemplars",
    )
    add(
        "--output",
        metavar="DIR",
        help="of --inference: folder for the predictions (default: the run's own), so that several decodings "
        "stand side by side",
    )


def check_generator(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    problems = []
    weights = (args.main_loss_w, args.empathy_loss_w, args.sentiment_loss_w, args.sampled_loss_w)
    if not any(weights):
        problems.append(
            "--main-loss-w, --empathy-loss-w, --sentiment-loss-w and --sampled-loss-w are all 0: nothing to "
            "train on"
        )
    if args.targets and not args.inference:
        asked = {
            "--add-exemplars none": args.add_exemplars != "none",
            "--empathy-loss-w 0": args.empathy_loss_w,
            "--sentiment-loss-w 0": args.sentiment_loss_w,
            "--sampled-loss-w 0": args.sampled_loss_w,
            "no --control": args.control,
        }
        needed = [flag for flag, without in asked.items() if without]
        if needed:
            problems.append(
                "--targets all: the speaker's turns have neither exemplars nor labels; it needs "
                + ", ".join(needed)
                + " (a run that goes on from it by --init-from can have them)"
            )
    if args.empathy_losses and not args.empathy_loss_w:
        problems.append("--empathy-losses: of the critics' losses that --empathy-loss-w 0 takes away")
    if args.balance and not args.main_loss_w:
        problems.append("--balance: a share of the nll's gradient, which --main-loss-w 0 takes away")
    return check_decoding(parser, args, problems)


def check_decoding(parser: Parser, args: argparse.Namespace, problems: list[str]) -> argparse.Namespace:
    """`check`, and what holds for the decoding flags of every family."""
    if args.output and not args.inference:
        problems.append("--output: only with --inference; a training writes to its own folder (--name)")
    if args.replies > 1 and args.beams > 1:
        problems.append("--replies: of sampling; beam search gives one reply to a context (--beams 1)")
    if args.replies > 1 and not args.predict:
        problems.append("--replies: --no-predict writes none; leave one of them out")
    if args.sampled_loss_w and args.sampled_reward == "energy" and args.samples < 3:
        problems.append(
            "--samples: the energy score compares two of them beside a third; give 3 or more, or "
            "--sampled-reward distance"
        )
    check(parser, args, problems)
    if args.inference:
        note_ignored(
            given(parser, args, [k for k in vars(args) if k not in OF_INFERENCE]),
            "--inference trains nothing and takes the run's own settings",
        )
    else:
        for names, why in unread(args):
            note_ignored(given(parser, args, names), why)
    if args.beams > 1:
        note_ignored(
            given(parser, args, ("top_k", "top_p", "temperature")), f"--beams {args.beams} samples nothing"
        )
    if "family" in args:
        note_void_family(parser, args, CRITICS)
    return args


#: flags that say how critics' losses are taken, where any counts
OF_CRITICS = ("critic_ramp", "strategy", "critic_targets", "balance")


def unread(args: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """Flags that a training with these arguments does not read, and why."""
    weights = {kind: vars(args).get("empathy_loss_w", 0.0) for kind in DIMENSIONS}
    if only := vars(args).get("empathy_losses"):
        weights = {kind: w for kind, w in weights.items() if kind in only}
    weights["sentiment"] = vars(args).get("sentiment_loss_w", 0.0)
    led = [kind for kind in CRITICS if weights.get(kind)]
    if not led:
        yield OF_CRITICS, "no critic's loss counts"
    if not args.sampled_loss_w:
        yield (
            ("samples", "sampled_top_k", "sampled_temperature", "sampled_examples", "sampled_reward"),
            "--sampled-loss-w is 0",
        )
        yield tuple(kind for kind in CRITICS if kind not in led), "no loss is that critic's"
        if not led:
            yield ("family",), "no loss is a critic's"
            if not args.control:
                yield ("labels",), "neither a loss nor --control compares with labels"
    way = args.add_exemplars
    if way == "none":
        yield ("top_exemplars", "exemplar_len", "exemplars"), "--add-exemplars is none"
    if way != "t5":
        yield ("exemplar_model",), "it is of --add-exemplars t5"
    if way != "glove-t5":
        yield ("exemplar_layers",), "it is of --add-exemplars glove-t5"
    if way != "none" or args.control:
        yield ("pack",), "each turn is a sequence of its own there"
    if vars(args).get("lora_rank") == 0:
        yield ("lora_alpha", "lora_dropout"), "--lora-rank 0 trains all weights"


def never_read(flags: Mapping[str, Any]) -> set[str]:
    """What `unread` names of a training's flags: a run goes on with others."""
    return {name for names, _ in unread(argparse.Namespace(**flags)) for name in names}
