"""Conversations that have one number in two splits: only where they are one conversation are they kept
apart."""

import json

import numpy as np
import pytest

import dpr_exemplar_retriever
from corpora import Example
from DPR.index import Index
from DPR.retriever import own_conversations

CORPUS = [
    Example("1", 2, "sad", ("my cat left",), "oh no"),
    Example("1", 4, "sad", ("my cat left", "oh no", "yes"), "poor thing"),
    Example("2", 2, "sad", ("hi",), "hello"),
]
VECTORS = np.array([[3.0], [2.0], [1.0]], dtype=np.float32)


def places(example, rule, same_split):
    query = np.ones((1, 1), dtype=np.float32)
    groups = [c.emotion for c in CORPUS] if rule == "same-emotion" else None
    own = [example.conv_id] if same_split else own_conversations([example], CORPUS)
    index = Index(VECTORS, [c.conv_id for c in CORPUS], groups)
    (hits,) = index.search(query, 3, own, [example.emotion])
    return [place for place, _ in hits]


@pytest.mark.parametrize("rule", ["same-emotion", "all"])
def test_an_unrelated_conversation_with_the_same_number_is_a_candidate(rule):
    other = Example("1", 2, "sad", ("my cat left",), "which cat?")
    assert places(other, rule, same_split=False) == [0, 1, 2]


@pytest.mark.parametrize("rule", ["same-emotion", "all"])
@pytest.mark.parametrize("same_split", [True, False])
@pytest.mark.parametrize("example", CORPUS[:2])
def test_ones_own_conversation_is_none_also_where_it_stands_in_another_split(rule, same_split, example):
    assert places(example, rule, same_split) == [2]


def test_the_command_keeps_conversations_apart_in_training_only(trained_copy):
    """The sample's conversations get the same numbers in each split, as own data has them."""
    from options import Paths

    paths = Paths(trained_copy)
    texts = {}
    for split in ("train", "test"):
        table = cells(paths.dialogues(split))
        numbers = {conv: str(n) for n, conv in enumerate(dict.fromkeys(row[0] for row in table[1:]), 1)}
        rows = [table[0], *([numbers[row[0]], *row[1:]] for row in table[1:])]
        paths.dialogues(split).write_text("\n".join(",".join(row) for row in rows) + "\n", encoding="utf-8")
        texts[split] = rows
    dpr_exemplar_retriever.main(
        ["--workdir", str(trained_copy), "--device", "cpu", "--path", str(paths.saved / "dpr" / "empd")]
        + ["--candidates", "all", "--top-k", "1000", "--splits", "train", "test", "--overwrite"]
    )
    import pandas as pd

    def share(split):
        table = pd.read_csv(paths.exemplars(split), keep_default_na=False, dtype={"conv_id": str})
        return [
            any(conv == row["conv_id"] for conv, _ in json.loads(row["exemplars_index"]))
            for _, row in table.iterrows()
        ]

    assert not any(share("train"))
    assert all(share("test"))


def cells(path):
    return [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
