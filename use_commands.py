"""The flags of what uses trained runs: which critics and base, a pool of replies, how tokens are drawn.

As light as options.py, so that `--help` answers at once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from options import CRITICS, NATURAL, POSITIVE, TOKENS, OtherPrecision, number
from records import REPLY_COLUMNS
from settings import IN_USE

TOP_P = number(float, above=0, most=1)


def add_base(parser: argparse.ArgumentParser, adapters: bool = True) -> None:
    """Of what uses a trained run; `adapters`: it can be one."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--base",
        metavar="FOLDER",
        help="of an adapter, or of a run with pooled exemplars: where the model lies that it was trained on, "
        "if that was moved",
    )
    if adapters:
        either.add_argument(
            "--base-in-other-precision",
            dest="base",
            type=OtherPrecision,
            metavar="MODEL",
            help="of an adapter, in place of --base: a folder or hub name with other weights of the same "
            "shapes, as the same model in another precision; its replies are not those that were measured",
        )


def add_critic_runs(parser: argparse.ArgumentParser, default: str = "") -> None:
    """A flag for each critic in use; `default`: which serves where none is given."""
    for kind in CRITICS:
        ending = f" (default: {default})" if default else ""
        parser.add_argument(f"--{kind}", metavar="RUN", help=f"run folder of the {kind} critic{ending}")


def critic_runs(args: argparse.Namespace) -> dict[str, Path]:
    """{kind: folder} of those that were given."""
    return {kind: Path(getattr(args, kind)) for kind in CRITICS if getattr(args, kind)}


def add_pool(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Replies to search, and what searches them; `default`: what serves where no pool is given."""
    add = parser.add_argument_group("exemplars").add_argument
    ending = f" (default: {default})" if default else ""
    add(
        "--pool",
        required=not default,
        metavar="FILE",
        help=f"replies: csv, tsv, jsonl, or a text file with one a line{ending}",
    )
    add(
        "--column",
        metavar="NAME",
        help=f"of --pool: the reply's column (default: the first of {', '.join(REPLY_COLUMNS)})",
    )
    add("--path", metavar="RUN", help="a train_dpr run: its folder or hub name (default: saved/dpr/empd)")
    add("--encoder", help="in place of a run: hub name or folder of a BERT for both encoders, or minilm")
    add_pooling(add)


def add_pooling(add: Callable) -> None:
    add(
        "--pooling",
        choices=["cls", "mean"],
        help="with --encoder: the vector (default: what its 1_Pooling/config.json says, else cls)",
    )


def add_reading(add: Callable, query: str, candidate: str) -> None:
    """How a retriever reads its texts, which are called so."""
    add(
        "--max-length",
        type=TOKENS,
        help=f"tokens of a {query}; the latest are kept (default: as the retriever was trained, else 128)",
    )
    add(
        "--max-passage-length",
        type=TOKENS,
        help=f"tokens of a {candidate} (default: as the retriever was trained, else 64)",
    )
    add("--batch-size", type=NATURAL, default=128, help="texts in one forward pass")


def pool_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.path and args.encoder:
        problems.append("--path: a trained retriever brings its own encoders; leave --encoder out")
    if args.pooling and not args.encoder:
        problems.append("--pooling: goes with --encoder; a trained retriever has its own")
    if args.column and not args.pool:
        problems.append("--column: of --pool FILE")
    if args.pool == "-":
        problems.append("--pool: a file, beside which its vectors are kept; standard input has no place")
    return problems


def add_sampling(parser: argparse.ArgumentParser, most: int) -> Callable[..., Any]:
    """How tokens are drawn, up to `most` of them; returns what adds to this group."""
    add = parser.add_argument_group("decoding").add_argument
    add("--top-k", type=NATURAL, default=IN_USE.top_k, help="sample among so many most likely tokens")
    add("--top-p", type=TOP_P, default=IN_USE.top_p, help="and of these the fewest that reach this share")
    add("--temperature", type=POSITIVE, default=IN_USE.temperature, help="of sampling")
    add("--max-new-tokens", type=NATURAL, default=most, help="a reply that has not ended by then is cut")
    return add
