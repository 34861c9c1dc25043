"""Exemplar retrieval against a brute-force oracle, and the csv that it writes."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dpr_exemplar_retriever
from corpora import EXEMPLAR_COLUMNS, Example, listener_turns, read_exemplars
from DPR import biencoder
from DPR.index import Index
from dpr_exemplar_retriever import parse_args
from options import Paths, UserError
from settings import CANDIDATES

RULES = ("same-emotion", "all")


def oracle(query, candidates, allowed: list[int], k: int) -> list[tuple[int, float]]:
    """Score descending, then place ascending: plain sorting of everything that is allowed."""
    scored = [(place, float(np.dot(query, candidates[place]))) for place in allowed]
    return sorted(scored, key=lambda hit: (-hit[1], hit[0]))[:k]


def integers(rng, rows: int, width: int, spread: int) -> np.ndarray:
    """Exact in float32; a small spread makes many ties and duplicates, 0 makes everything equal."""
    return rng.integers(-spread, spread + 1, size=(rows, width)).astype(np.float32)


def turns(rng, count: int, conversations: int, emotions: int, bias: float = 0.0) -> list[Example]:
    """With `bias`, so large a share of the turns belongs to conversation 0."""
    convs = np.where(rng.random(count) < bias, 0, rng.integers(0, conversations, size=count))
    return [
        Example(f"conv{c}", 2 * i + 2, f"emotion{c % emotions}", ("hi",), f"reply {i}")
        for i, c in enumerate(convs)
    ]


worlds = st.fixed_dictionaries(
    {
        "queries": st.integers(0, 30),
        "candidates": st.integers(1, 60),
        "width": st.integers(1, 6),
        "spread": st.integers(0, 3),
        "conversations": st.integers(1, 8),
        "emotions": st.integers(1, 3),
        "bias": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "k": st.integers(1, 12),
        "seed": st.integers(0, 100_000),
    }
)
#: everything ties; nearly all candidates are one's own; one candidate; many more than are fetched at first
CORNERS = [
    {
        "queries": 5,
        "candidates": 60,
        "width": 2,
        "spread": 0,
        "conversations": 8,
        "emotions": 1,
        "bias": 0.0,
        "k": 3,
        "seed": 1,
    },
    {
        "queries": 9,
        "candidates": 50,
        "width": 3,
        "spread": 1,
        "conversations": 4,
        "emotions": 1,
        "bias": 0.9,
        "k": 10,
        "seed": 2,
    },
    {
        "queries": 3,
        "candidates": 1,
        "width": 1,
        "spread": 1,
        "conversations": 2,
        "emotions": 1,
        "bias": 0.0,
        "k": 10,
        "seed": 3,
    },
    {
        "queries": 40,
        "candidates": 800,
        "width": 3,
        "spread": 1,
        "conversations": 200,
        "emotions": 2,
        "bias": 0.0,
        "k": 10,
        "seed": 4,
    },
]


def with_corners(test, examples: int = 150):
    for corner in CORNERS:
        test = example(world=corner)(test)
    return settings(max_examples=examples, deadline=None)(given(world=worlds)(test))


def retrieve(queries, candidates, asked, corpus, rule, k):
    groups = None if rule == "all" else [c.emotion for c in corpus]
    index = Index(candidates, [c.conv_id for c in corpus], groups)
    return index.search(queries, k, [e.conv_id for e in asked], [e.emotion for e in asked])


def make(world):
    rng = np.random.default_rng(world["seed"])
    queries, candidates = (
        integers(rng, world[n], world["width"], world["spread"]) for n in ("queries", "candidates")
    )
    asked = turns(rng, len(queries), world["conversations"], world["emotions"], world["bias"])
    return (
        queries,
        candidates,
        asked,
        turns(rng, len(candidates), world["conversations"], world["emotions"], world["bias"]),
        world["k"],
    )


@pytest.mark.parametrize("rule", RULES)
@with_corners
def test_retrieval_equals_sorting_what_the_rule_allows(rule, world):
    queries, candidates, asked, corpus, k = make(world)
    found = retrieve(queries, candidates, asked, corpus, rule, k)
    for query, e, row in zip(queries, asked, found, strict=True):
        allowed = [
            i
            for i, c in enumerate(corpus)
            if c.conv_id != e.conv_id and (rule == "all" or c.emotion == e.emotion)
        ]
        assert len(row) == min(k, len(allowed))  # never fewer, as in the published code
        assert row == oracle(query, candidates, allowed, k)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("rule", RULES)
@partial(with_corners, examples=25)
def test_an_approximate_index_returns_as_many_as_exact_search_and_nothing_excluded(rule, kind, world):
    queries, candidates, asked, corpus, k = make(world)
    groups = None if rule == "all" else [c.emotion for c in corpus]
    index = Index(candidates, [c.conv_id for c in corpus], groups, kind, approximate_from=1)
    found = index.search(queries, k, [e.conv_id for e in asked], [e.emotion for e in asked])
    exact = retrieve(queries, candidates, asked, corpus, rule, k)
    for query, e, row, best in zip(queries, asked, found, exact, strict=True):
        assert len(row) == len(best)
        assert len({place for place, _ in row}) == len(row)
        for (place, score), (_, most) in zip(row, best, strict=True):
            assert corpus[place].conv_id != e.conv_id
            assert rule == "all" or corpus[place].emotion == e.emotion
            assert score == float(np.dot(query, candidates[place])) <= most


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_nearly_what_exact_search_finds(kind):
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(40, 32))
    candidates = (middles[rng.integers(40, size=2000)] + rng.normal(size=(2000, 32))).astype(np.float32)
    queries = candidates[::50] + rng.normal(size=(40, 32)).astype(np.float32) / 4
    owners = [str(n // 4) for n in range(2000)]
    asked = owners[::50]
    best, found = (
        Index(candidates, owners, kind=way, approximate_from=1000).search(queries, 10, asked)
        for way in ("flat", kind)
    )
    kept = [len({p for p, _ in a} & {p for p, _ in b}) / 10 for a, b in zip(best, found, strict=True)]
    assert np.mean(kept) > 0.9


def test_filtering_a_fixed_number_afterwards_would_be_noticed():
    """The published way finds the best of everything and drops what is not allowed: too few are left."""
    rng = np.random.default_rng(0)
    queries, candidates = integers(rng, 4, 5, 3), integers(rng, 300, 5, 3)
    asked, corpus = turns(rng, 4, 5, 1, bias=1.0), turns(rng, 300, 5, 1, bias=0.9)
    top = [np.argsort(-(candidates @ q), kind="stable")[:50] for q in queries]
    filtered = [
        [p for p in row if corpus[p].conv_id != e.conv_id][:10] for row, e in zip(top, asked, strict=True)
    ]
    assert min(map(len, filtered)) < 10
    assert {len(row) for row in retrieve(queries, candidates, asked, corpus, "all", 10)} == {10}


def test_an_emotion_without_candidates_gets_no_exemplars_and_the_others_theirs():
    corpus = [Example("a", 2, "sad", ("hi",), "one"), Example("b", 2, "sad", ("hi",), "two")]
    asked = [Example("x", 2, "proud", ("hi",), "r"), Example("a", 2, "sad", ("hi",), "r")]
    ones = np.ones((2, 3), np.float32)
    assert retrieve(ones, ones, asked, corpus, "same-emotion", 10) == [[], [(1, 3.0)]]
    assert retrieve(ones, ones, asked, corpus, "all", 10) == [[(0, 3.0), (1, 3.0)], [(1, 3.0)]]


# ------------------------------------------------------------------------------------------------ the command


def run(folder, *flags):
    bert = str(folder / "data" / "bert-tiny")
    dpr_exemplar_retriever.main(["--workdir", str(folder), "--device", "cpu", "--encoder", bert, *flags])


@pytest.mark.parametrize("rule", RULES)
def test_the_written_exemplars_obey_the_rule_and_are_read_back(prepared, tmp_path, rule):
    run(prepared, "--candidates", rule, "--top-k", "3", "--output", str(tmp_path))
    paths = Paths(prepared)
    corpus = {e.key: e for e in listener_turns(paths.dialogues("train"))}
    for split in ("train", "valid", "test"):
        examples = listener_turns(paths.dialogues(split))
        table = pd.read_csv(
            Paths(paths.root, exemplars=tmp_path).exemplars(split), dtype=str, keep_default_na=False
        )
        assert tuple(table.columns) == EXEMPLAR_COLUMNS
        texts = read_exemplars(Paths(paths.root, exemplars=tmp_path).exemplars(split), examples)
        for e, (_, row), exemplars in zip(examples, table.iterrows(), texts, strict=True):
            assert (row["conv_id"], int(row["utterance_idx"]), row["utterance"]) == (*e.key, e.response)
            chosen = [corpus[tuple(key)] for key in json.loads(row["exemplars_index"])]
            allowed = [
                c
                for c in corpus.values()
                if c.conv_id != e.conv_id and (rule == "all" or c.emotion == e.emotion)
            ]
            assert [c.response for c in chosen] == exemplars
            assert len(chosen) == min(3, len(allowed)) and len({c.key for c in chosen}) == len(chosen)
            assert all(c in allowed for c in chosen)
            scores = json.loads(row["scores"])
            assert scores == sorted(scores, reverse=True)


def test_an_index_that_does_not_pay_is_said_to_be_exact_and_is_another_search(prepared, tmp_path, capsys):
    words = ["--splits", "valid", "--output", str(tmp_path)]
    run(prepared, *words, "--index", "ivf")
    assert "note: --index ivf: every search is exact" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with another index; add --overwrite"):
        run(prepared, *words)


@pytest.mark.parametrize("match", ["reply", "random"])
def test_a_new_rule_needs_nothing_but_its_name_and_its_group(prepared, tmp_path, monkeypatch, capsys, match):
    monkeypatch.setitem(CANDIDATES, "same-place", lambda turn: str(turn.utterance_idx))
    only = ["--encoder", str(prepared / "data" / "bert-tiny")] if match == "reply" else []
    words = ["--workdir", str(prepared), "--device", "cpu", "--splits", "valid", "--output", str(tmp_path)]
    dpr_exemplar_retriever.main([*words, *only, "--match", match, "--candidates", "same-place"])
    rows = pd.read_csv(Paths(prepared, exemplars=tmp_path).exemplars("valid"), dtype=str)
    for row in rows.itertuples():
        assert {str(place) for _, place in json.loads(row.exemplars_index)} == {row.utterance_idx}
    monkeypatch.setitem(CANDIDATES, "same-words", lambda turn: turn.response)
    dpr_exemplar_retriever.main(
        [*words, *only, "--match", match, "--candidates", "same-words", "--overwrite"]
    )
    assert "that --candidates same-words allows; --candidates all drops that rule" in capsys.readouterr().out


def test_exemplars_are_found_by_the_pooling_that_is_asked_for(prepared, tmp_path):
    found = []
    for name, flags in (("own", []), ("cls", ["--pooling", "cls"]), ("mean", ["--pooling", "mean"])):
        run(prepared, "--candidates", "all", "--splits", "valid", "--output", str(tmp_path / name), *flags)
        found.append(pd.read_csv(Paths(prepared, exemplars=tmp_path / name).exemplars("valid"))["scores"])
    own, cls, mean = found
    assert own.equals(cls) and (cls != mean).all()


def test_retrieving_again_is_the_same_and_other_settings_need_overwrite(workdir):
    target = Paths(workdir).exemplars("test")
    run(workdir, "--splits", "test")
    first = target.read_bytes()
    run(workdir, "--splits", "test")
    assert target.read_bytes() == first
    with pytest.raises(UserError, match="overwrite"):
        run(workdir, "--splits", "test", "--candidates", "all")
    assert target.read_bytes() == first
    run(workdir, "--splits", "test", "--candidates", "all", "--overwrite")
    assert target.read_bytes() != first


def test_an_interrupted_stage_never_goes_on_with_vectors_of_other_dialogues(workdir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Index, "search", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(workdir, "--splits", "test")
    path = Paths(workdir).dialogues("test")
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    conversations = dict.fromkeys(line.split(",", 1)[0] for line in lines)
    lines = [line for conv in reversed(conversations) for line in lines if line.startswith(conv + ",")]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    run(workdir, "--splits", "test")
    shutil.rmtree(Paths(workdir).cache, ignore_errors=True)
    run(workdir, "--splits", "test", "--output", str(tmp_path))
    assert (
        Paths(workdir).exemplars("test").read_text()
        == Paths(workdir, exemplars=tmp_path).exemplars("test").read_text()
    )


def test_no_text_is_read_twice_by_one_encoder(prepared, tmp_path, monkeypatch):
    """The dialogues are candidates here and, of the training split, questions besides."""
    read = []
    plain = biencoder.vectors

    def spy(encoder, ids, mask):
        read.extend((id(encoder), *row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True))
        return plain(encoder, ids, mask)

    monkeypatch.setattr(biencoder, "vectors", spy)
    run(prepared, "--match", "context", "--output", str(tmp_path))
    assert len(read) > 50 and len(read) == len(set(read))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--top-k", "0"], "--top-k 0"),
        (["--path", "x", "--pooling", "mean"], "--path: a trained retriever brings its own"),
        (["--path", "x", "--encoder", "minilm"], "--path: a trained retriever brings its own"),
    ],
)
def test_impossible_flags_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert named in capsys.readouterr().err


def test_a_missing_run_is_a_plain_error_never_other_encoders(prepared):
    with pytest.raises(UserError, match="no/such/run"):
        dpr_exemplar_retriever.main(["--workdir", str(prepared), "--device", "cpu", "--path", "no/such/run"])


@pytest.mark.parametrize("width", [3, 64, 129])
def test_copies_of_one_vector_stand_in_the_candidates_order_whatever_the_matrix_product_rounds(width):
    rng = np.random.default_rng(width)
    one, query = rng.normal(size=width), rng.normal(size=width)
    others = rng.normal(size=(40, width)) - 9 * query  # all of them far off
    candidates = np.insert(others, sorted(rng.integers(0, 41, 23)), one + query, axis=0).astype(np.float32)
    copies = np.flatnonzero((candidates == candidates[np.argmax(candidates @ query)]).all(1)).tolist()
    asked = np.tile(query.astype(np.float32), (7, 1))
    for row in Index(candidates, [""] * len(candidates)).search(asked, 10, [None] * 7):
        assert [place for place, _ in row] == copies[:10]
        assert len({score for _, score in row}) == 1
