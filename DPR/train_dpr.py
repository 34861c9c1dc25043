"""Fine-tune the dense passage retriever: two BERT encoders, inner product, in-batch + hard + other negatives.

  python -m DPR.train_dpr --dataset empd --epochs 8 --warmup-steps 1237     (the paper's: from facebook/dpr-*)
  python -m DPR.train_dpr --dataset empd --encoder minilm --epochs 1
  torchrun --standalone --nproc-per-node=2 -m DPR.train_dpr ...    in-batch negatives come from both processes

Kept: the evaluation with the lowest average rank of the positive among all passages of the held-out
questions. Saved as two folders, question_encoder/ and context_encoder/, that `from_pretrained` loads.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python DPR/train_dpr.py too

import options
from commands import add_training
from options import COUNT, DATASETS, TOKENS, Paths, add_common, add_device, check, given, make_parser
from settings import DPR_HUB, RetrieverOptions, TrainingOptions, device_flags, pick


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument_group("retriever").add_argument
    add(
        "--dataset",
        choices=DATASETS,
        default="empd",
        help="which file of DPR.prepare_dpr_data",
    )
    add(
        "--encoder",
        help="hub name or folder of a BERT that both encoders begin from, or minilm (default: "
        "facebook/dpr-*)",
    )
    add("--question-encoder", default=DPR_HUB["question"], help="where the question encoder begins")
    add("--context-encoder", default=DPR_HUB["context"], help="where the passage encoder begins")
    add(
        "--pooling",
        choices=["cls", "mean"],
        help="how a text's vector is made (default: what the encoder's 1_Pooling/config.json says, as "
        "MiniLM's: mean; else cls, DPR's)",
    )
    add("--max-length", type=TOKENS, default=128, help="tokens of a question; the latest are kept")
    add("--max-passage-length", type=TOKENS, default=64, help="tokens of a passage")
    add("--hard-negatives", type=COUNT, default=1, help="per question")
    add("--other-negatives", type=COUNT, default=1, help="per question")
    add(
        "--valid-queries",
        type=COUNT,
        default=1000,
        help="held-out questions for average rank and recall; 0: all",
    )
    add(
        "--drop-without-positive",
        action="store_true",
        help="leave out entries without a positive passage, as the original DPR does (default: refuse them)",
    )
    add_training(parser, epochs=8, lr=2e-5, batch_size=16, clip=2.0)
    parser.set_defaults(schedule="linear")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = []
    for side in DPR_HUB:
        if args.encoder and getattr(args, f"{side}_encoder") != DPR_HUB[side]:
            problems.append(f"--{side}-encoder: --encoder is for both sides; leave one of them out")
    if args.batch_size in (1, "auto") and args.hard_negatives == args.other_negatives == 0:
        problems.append(
            f"--batch-size {args.batch_size} without negatives: there may be nothing to tell the positive "
            "from"
        )
    if given(parser, args, ["batch_tokens"]):
        problems.append(
            "--batch-tokens: of examples that are read as one; a question's passages stand beside it: give "
            "--batch-size"
        )
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    from DPR import learning
    from session import Session

    session = Session(**device_flags(args))
    choices, training = pick(RetrieverOptions, args), pick(TrainingOptions, args)
    return learning.train(
        choices, training, session, Paths(args.workdir), args.name or args.dataset, vars(args)
    )


if __name__ == "__main__":
    options.run(main)
