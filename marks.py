"""Level marks (`--control marks`): the levels of empathy that a reply shows, told to a generator just before
it writes. A mark is one common word for each dimension and level. Knows no model.
"""

import random
from collections.abc import Mapping, Sequence

from corpora import Example, listener_turns
from dataloaders import encode
from gold import gold_labels
from options import DIMENSIONS, Paths, UserError
from storage import hash_seed

#: the share of training replies without marks: in use, none may be asked for
LEFT_OUT = 0.1


def in_words(levels: Mapping[str, int]) -> str:
    """The marks of these levels, in one order: emo=1, exp=0 is "warm tell"; nothing for none."""
    return " ".join(DIMENSIONS[dim].marks[levels[dim]] for dim in DIMENSIONS if dim in levels)


def of_target(target: Mapping[str, float], known: Mapping[str, int]) -> dict[str, int]:
    """What of a target can be marked, {dimension: the nearest level}. `known`: {dimension: labels} of the
    generator."""
    return {
        dim: min(round(target[dim]), known[dim] - 1) for dim in DIMENSIONS if dim in target and dim in known
    }


def known(paths: Paths) -> dict[str, int]:
    """{dimension: how many levels stand in the training labels}: 2 or 3."""
    labels = read("train", listener_turns(paths.dialogues("train")), paths)
    return {dim: max(1, *levels) + 1 for dim, levels in labels.items()}


def read(split: str, examples: Sequence[Example], paths: Paths) -> dict[str, list[int]]:
    """{dimension: the level of each gold reply}."""
    found = gold_labels(split, examples, paths)
    return {dim: found[dim] for dim in DIMENSIONS}


def of_split(split: str, examples: Sequence[Example], paths: Paths, seed: int) -> list[str]:
    """The marks before each reply in training, in words: those of some dimensions, each choice as likely,
    since in use mostly one is asked for. What is left out depends on seed and example."""
    labels, marked = read(split, examples, paths), []
    for n, example in enumerate(examples):
        rng = random.Random(hash_seed("marks", seed, *example.key))
        chosen = 0 if rng.random() < LEFT_OUT else rng.randrange(1, 2 ** len(DIMENSIONS))
        marked.append(in_words({dim: labels[dim][n] for k, dim in enumerate(DIMENSIONS) if chosen >> k & 1}))
    return marked


def require_words(tokenizer, known: Mapping[str, int]) -> None:
    """Raises `UserError` where a tokenizer cannot tell the marks apart."""
    words = [DIMENSIONS[dim].marks[level] for dim, count in known.items() for level in range(count)]
    ids = encode(tokenizer, words)
    rows = [tuple(ids[word].tolist()) for word in words]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if lacking := [
        word
        for word, row in zip(words, rows, strict=True)
        if rows.count(row) > 1 or (unknown is not None and unknown in row)
    ]:
        raise UserError(
            "--control marks: the vocabulary lacks some of the words that serve as marks, or knows two as "
            f"one: {', '.join(lacking)}"
        )
