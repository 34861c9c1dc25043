"""Texts that a model has read once are not read again, and a long reading is announced."""

import numpy as np

import answers
from answers import Answers, announce


def counting(asked: list):
    def ask(replies, contexts):
        asked.extend(zip(replies, contexts, strict=True))
        return np.array([[len(reply), len(turns)] for reply, turns in zip(replies, contexts, strict=True)])

    return ask


def test_a_text_is_read_once_even_by_another_table_and_beside_other_texts(tmp_path):
    asked: list = []
    first = Answers(counting(asked), tmp_path / "a.npz")
    assert first(["b", "aa", "b"], [("x",), (), ("x",)]).tolist() == [[1, 1], [2, 0], [1, 1]]
    second = Answers(counting(asked), tmp_path / "a.npz")
    assert second(["ccc", "aa"], [(), ()]).tolist() == [[3, 0], [2, 0]]
    third = Answers(counting(asked), tmp_path / "a.npz")
    assert third(["b", "ccc"], [("x",), ()]).tolist() == [[1, 1], [3, 0]]
    assert asked == [("b", ("x",)), ("aa", ()), ("ccc", ())]
    first(["dd"], [()])  # two processes at one file: what the other has written stays
    assert Answers(counting(asked), tmp_path / "a.npz")(["ccc", "dd"], [(), ()])[:, 0].tolist() == [3, 2]
    assert len(asked) == 4


def test_the_same_reply_in_another_context_is_another_text_only_to_who_reads_contexts():
    asked: list = []
    blind = Answers(counting(asked), reads_context=False)
    assert blind(["a", "a"], [("x",), ("y", "z")]).tolist() == [[1, 0], [1, 0]]
    assert asked == [("a", ())]
    assert len(Answers(counting(asked)).new(["a", "a"], [("x",), ("y",)])) == 2


def test_a_long_reading_is_announced_by_its_first_texts_and_a_short_one_is_not(monkeypatch):
    clock = iter(np.arange(0, 1e6, 5.6))  # of 64 texts 8 warm up, the others take a tenth of a second
    monkeypatch.setattr(answers.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    texts, asked = [f"reply {n}" for n in range(6_464)], []
    announce([(Answers(counting(asked), reads_context=False), texts, [()] * len(texts))], said.append)
    assert len(asked) == 64 and "6,464 of 6,464 replies" in said[0] and "about 11 minutes" in said[0]
    announce([(Answers(counting([])), ["few"] * 10, [()] * 10)], said.append)
    assert len(said) == 1
