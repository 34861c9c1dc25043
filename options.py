"""What every command line here shares: flags, default paths, and checks that report all problems at once.

Nothing heavy is imported, so `--help` answers at once; torch and transformers come after argument parsing.
"""

import argparse
import sys
from pathlib import Path

SPLITS = ("train", "valid", "test")
#: flag value -> (name in our csv files, name of the official Empathy Mental Health file)
DIMENSIONS = {
    "emo": ("emotion", "emotional-reactions"),
    "exp": ("exploration", "explorations"),
    "int": ("interpretation", "interpretations"),
}
CRITICS = (*DIMENSIONS, "sentiment")


class UserError(Exception):
    """Something the user can mend; the message names file, line or flag, and the remedy."""


class Paths:
    """Every default path, hanging off one folder (`--workdir`)."""

    def __init__(self, workdir: str | Path = "."):
        self.root = Path(workdir)
        self.data = self.root / "data"
        self.saved = self.root / "saved"
        self.results = self.root / "results"
        self.dialogues_dir = self.data / "empathetic_dialogues"
        self.pairs_dir = self.data / "empathy_mental_health"
        self.glove = self.data / "glove"
        self.t5_tiny = self.data / "t5-tiny"
        self.bert_tiny = self.data / "bert-tiny"
        self.cache = self.data / "cache"

    def dialogues(self, split: str) -> Path:
        plain = self.dialogues_dir / "original" / f"{split}.csv"
        packed = plain.with_suffix(".csv.gz")
        return packed if packed.exists() and not plain.exists() else plain

    def vader(self, split: str) -> Path:
        return self.dialogues_dir / f"{split}_vader.csv"

    def labels(self, split: str, folder: str | None = None) -> Path:
        return Path(folder or self.dialogues_dir) / f"{split}_labels.csv"

    def exemplars(self, split: str, folder: str | None = None) -> Path:
        return Path(folder or self.dialogues_dir) / f"{split}_dpr.csv"

    def pairs(self, dim: str, split: str) -> Path:
        return self.pairs_dir / f"{DIMENSIONS[dim][0]}_{split}.csv"

    def dpr_data(self, dataset: str, split: str) -> Path:
        return self.data / "dpr" / f"{dataset}_{split}.json"

    def critic(self, kind: str, family: str) -> Path:
        if kind == "sentiment":
            return self.saved / "sentiment" / family
        return self.saved / "empathy" / f"{family}-{kind}"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A strict parser whose help begins with the script's docstring and shows every default."""

    class Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=doc, formatter_class=Format, allow_abbrev=False)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", default=".", help="folder that holds data/ saved/ results/")
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote before")
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if there is one"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="bf16 is autocast over fp32 weights; auto: bf16 on a GPU that has it, else fp32 (fp16 overflows in T5)",
    )


def batch_count(text: str) -> int | str:
    return text if text == "auto" else int(text)


def add_training(
    parser: argparse.ArgumentParser,
    *,
    epochs: int,
    lr: float | None,
    batch_size: int,
    clip: float = 1.0,
    patience: int = 0,
) -> None:
    """The flags of the training loop; the keyword arguments are the stage's own defaults."""
    group = parser.add_argument_group("training loop")
    group.add_argument("--name", help="name of the run's folder (default: from the stage and the model)")
    group.add_argument("--epochs", type=int, default=epochs, help="passes over the training data")
    group.add_argument("--max-steps", type=int, default=0, help="stop after so many updates; 0: no limit")
    group.add_argument(
        "--lr",
        type=float,
        default=lr,
        help="peak learning rate (AdamW)" + ("" if lr else "; default: by model"),
    )
    group.add_argument(
        "--batch-size",
        type=batch_count,
        default=batch_size,
        metavar="{N,auto}",
        help=f"examples in one forward pass and process; auto: the most that fits, {batch_size} an update by --accumulate",
    )
    parser.set_defaults(effective_batch=batch_size)
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=0,
        help="also close a batch at so many padded tokens; 0: no such limit",
    )
    group.add_argument("--accumulate", type=int, default=1, help="forward passes per update")
    group.add_argument(
        "--schedule",
        choices=["constant", "linear", "cosine"],
        default="constant",
        help="course of the learning rate after warm-up (constant: the paper's)",
    )
    group.add_argument("--warmup-steps", type=int, default=0, help="updates over which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, not on norms and biases")
    group.add_argument("--clip", type=float, default=clip, help="largest gradient norm; 0: no clipping")
    group.add_argument(
        "--patience",
        type=int,
        default=patience,
        help="stop after so many evaluations without a better one; 0: never",
    )
    group.add_argument(
        "--eval-every", type=int, default=0, help="updates between evaluations; 0: at the end of every epoch"
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=0,
        help="also save a checkpoint every so many updates; 0: only after evaluations",
    )
    group.add_argument("--log-every", type=int, default=20, help="updates between log lines")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,never,CHECKPOINT}",
        help="auto: go on from the newest good checkpoint; never: refuse a folder that has one; or the checkpoint to go on from",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="deterministic kernels only (slower on CUDA)"
    )


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, problems: list[str] = (), **at_least: float
) -> None:
    """Refuse impossible flag values, together with the script's own `problems` and least values, all in one message."""
    problems = list(problems)
    at_least |= {
        "epochs": 1,
        "batch_size": 1,
        "accumulate": 1,
        "log_every": 1,
        "max_steps": 0,
        "batch_tokens": 0,
        "warmup_steps": 0,
        "weight_decay": 0,
        "clip": 0,
        "patience": 0,
        "eval_every": 0,
        "save_every": 0,
    }
    for name, least in at_least.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and value < least:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if getattr(args, "lr", 1.0) <= 0:
        problems.append(f"--lr {args.lr}: must be above 0")
    for name in ("dropout", "head_dropout", "word_dropout"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")
    if not 0 <= getattr(args, "seed", 0) < 2**32:
        problems.append(f"--seed {args.seed}: must be from 0 to 4294967295")
    if not Path(args.workdir).is_dir():
        problems.append(f"--workdir {args.workdir}: no such folder")
    if getattr(args, "batch_size", None) == "auto" and args.accumulate != 1:
        problems.append("--batch-size auto sets --accumulate itself; leave it out")
    if getattr(args, "batch_size", None) == "auto" and args.batch_tokens:
        problems.append("--batch-size auto and --batch-tokens both bound a batch; give one of them")
    if problems:
        parser.error("\n  " + "\n  ".join(problems))


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Nothing already on disk is replaced unless the user says so."""
    there = [str(p) for p in paths if p.exists()]
    if there and not overwrite:
        raise UserError(
            f"already there: {', '.join(there)}; add --overwrite to replace, or choose another --workdir"
        )


def run(main) -> None:
    """Entry point of a script: a `UserError` becomes one plain message and exit code 2, Ctrl-C outside of training exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
