"""The tables' figures against values by hand and against second libraries, for usual and odd replies."""

import json
import math
import operator
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sklearn.metrics import cohen_kappa_score, f1_score
from test_causal_models import make_tokenizer, save_llama

import causal_models
import floors
import measures
from corpora import Example
from measuring import Extras, Standard, text_nll
from options import Paths, UserError
from session import Session

GOLD = ["i am so sorry .", "what did you do then ?", "oh no !", "glückwunsch , 好 !", "yes"]
REPLIES = {
    "usual": ["i am sorry .", "what did he do ?", "oh dear !", "congratulations !", "yes , of course"],
    "the gold ones": GOLD,
    "empty": ["", "", "", "", ""],
    "some empty": ["i am so", "", "oh no !", "", "yes"],
    "one word": ["sorry", "what", "no", "好", "yes"],
    "all equal": ["oh no !"] * 5,
    "unicode": ["ὦ φίλε .", "wаs ?", "ого !", "glückwunsch , 好 好 !", "да"],
}


@pytest.mark.parametrize("name", REPLIES)
def test_bleu_is_sacrebleus_for_every_order_and_for_any_part(name):
    replies = REPLIES[name]
    found = measures.bleu(replies, GOLD, (1, 2, 3, 4))
    for n, figure in found.items():
        whole = BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        assert figure.point == pytest.approx(whole.corpus_score(replies, [GOLD]).score, abs=1e-6)
        part = whole.corpus_score(replies[1:4], [GOLD[1:4]]).score
        assert figure.take(np.array([1, 2, 3])).point == pytest.approx(part, abs=1e-6)


def test_bleu_1_by_hand_with_brevity_penalty_and_of_the_corpus():
    # 5 words of 7: 4 match ("the" is clipped to 1), so 4/5 * exp(1 - 7/5)
    found = measures.bleu(["the cat the sat", "hi"], ["the big cat sat down", "hi there"], (1,))[1]
    assert found.point == pytest.approx(100 * 4 / 5 * math.exp(1 - 7 / 5))
    assert found.items() == pytest.approx([100 * 3 / 4 * math.exp(1 - 5 / 4), 100 * math.exp(-1)])


@pytest.mark.parametrize(
    ("reply", "gold", "expected"),
    [
        ("a x b c", "a b c d e", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
        ("", "a b", 0),
        ("好", "好", 1),
        ("c b a", "a b c", 1 / 3),
        ("don't !", "! don't", 1 / 2),
    ],
)
def test_rouge_l_by_hand(reply, gold, expected):
    assert measures.rouge_l([reply], [gold]).point == pytest.approx(100 * expected)


class AtSpaces:
    """rouge-score's own tokenizer drops whatever is not a Latin letter or a digit."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def test_rouge_l_is_rouge_scores():
    scorer, rng = RougeScorer(["rougeL"], tokenizer=AtSpaces()), random.Random(3)
    texts = [" ".join(rng.choices("a b c d e", k=rng.randrange(90))) for _ in range(60)]
    for name, replies in {**REPLIES, "long": texts[:30]}.items():
        gold = GOLD if name != "long" else texts[30:]
        expected = [100 * scorer.score(g, r)["rougeL"].fmeasure for g, r in zip(gold, replies, strict=True)]
        assert measures.rouge_l(replies, gold).items() == pytest.approx(expected)


@pytest.mark.parametrize("constant", [False, True])
def test_agreement_of_levels_is_scikit_learns(constant):
    rng = np.random.default_rng(1)
    gold = rng.integers(2, size=80)
    levels = np.zeros(80, dtype=int) if constant else np.where(rng.random(80) < 0.6, gold, 1 - gold)
    found = measures.agreement(gold, levels, 2)
    assert found["f1"].point == pytest.approx(100 * f1_score(gold, levels, average="macro"))
    assert found["kappa"].point == pytest.approx(cohen_kappa_score(gold, levels))


def test_diff_epitome_of_the_floors_is_what_algebra_says():
    """Level 0 costs the mean square of the gold levels, their mean only their variance."""
    gold = [np.array([0, 2, 0, 1.0]), np.array([0, 0, 0, 2.0]), np.array([1, 1, 0, 0.0])]
    zero, mean, majority = ([floors.levels(g)[k] for g in gold] for k in floors.levels(gold[0]))
    assert measures.diff_epitome(gold, zero).point == pytest.approx(5 / 4 + 4 / 4 + 2 / 4)
    assert measures.diff_epitome(gold, mean).point == pytest.approx(sum(g.var() for g in gold))
    assert measures.diff_epitome(gold, majority).point == pytest.approx(5 / 4 + 4 / 4 + 2 / 4)


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_column_of_odd_replies_is_what_counting_gives(name):
    replies = REPLIES[name]
    items = [Example(str(n), 2, "sad", ("hello",), text) for n, text in enumerate(GOLD)]
    known = [Example("t", 2, "sad", ("hello",), text) for text in ("Oh no!", "Yes", "\u597d")]
    standard = Standard(items, known, [[text] for text in GOLD], [], lambda *_: {}, Session("cpu"))
    run = standard.measure(name, replies, tuple(range(5)), shown=standard.shown)
    found = {key: figure.point for key, figure in run.figures.items()}
    assert found["length"] == sum(len(reply.split()) for reply in replies) / 5
    said = [reply in ("oh no !", "yes", "\u597d") for reply in replies]
    assert found["verbatim_training"] == 20 * sum(said)
    assert found["verbatim_exemplar"] == 20 * sum(map(operator.eq, replies, GOLD))
    every = [word for reply in replies for word in reply.split()]
    distinct = run.of_the_set(np.arange(5))["distinct_1"].point
    assert distinct == pytest.approx(100 * len(set(every)) / max(len(every), 1))
    assert -1 <= found["vader"] <= 1 and 0 <= found["norm_bleu_4"] <= found["norm_bleu_1"] <= 100 + 1e-9
    undefined = {key for key, value in found.items() if not math.isfinite(value)}
    assert undefined == ({"words_exemplar"} if name == "empty" else set())


def test_most_frequent_vader_and_cosine():
    assert measures.most_frequent(["a", "b", "a", "a"]).point == 75
    assert measures.most_frequent(["", ""]).point == 100
    vader = measures.Vader()
    found = vader(["", "I love it!", "I hate it, I can\u2019t."], "")
    assert found[0] == 0 and found[1] > 0.5 and found[2] < -0.5
    vectors = np.array([[1.0, 0.0], [3.0, 4.0]])
    assert measures.cosines(vectors, vectors[::-1]).point == pytest.approx(0.6)


def test_bertscore_gives_each_pair_its_own_score_and_an_empty_reply_none(tmp_path, prepared):
    """Pairs in another order have the same scores in that order (one library pairs wrongly there)."""
    pytest.importorskip("bert_score")
    model = tmp_path / "bert"
    shutil.copytree(Paths(prepared).bert_tiny, model)
    with pytest.raises(UserError, match="has no model_max_length"):
        measures.bertscore(["a"], ["b"], model, "cpu")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    replies = [
        "i am so sorry to hear that .",
        "",
        "what ?",
        "my dog ran away",
        "i am so sorry to hear that .",
    ]
    gold = ["that is sad .", "yes", "what ?", "when did it come back to you again ?", "what ?"]
    found = measures.bertscore(replies, gold, model, "cpu").items()
    order = [3, 0, 4, 1, 2]
    shuffled = measures.bertscore([replies[i] for i in order], [gold[i] for i in order], model, "cpu").items()
    assert shuffled == pytest.approx(found[order], abs=1e-3)
    assert found[1] == 0 and found[2] == pytest.approx(100, abs=1e-3) and found[0] != pytest.approx(found[4])


def test_the_fluency_stand_in_charges_every_token_of_a_reply_read_alone(tmp_path):
    model, tokenizer = causal_models.load_base(save_llama(tmp_path, make_tokenizer()), tmp_path)
    texts = ["I am so sorry.", "", "My dog ran away last night!", "I am so sorry.", "好"]
    found = text_nll(model, tokenizer, texts, Session(device="cpu"), "")
    for text, nll in zip(texts, found, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        expected = 0.0
        with torch.no_grad():
            for n in range(1, len(ids)):
                chances = model(input_ids=torch.tensor([ids[:n]])).logits[0, -1].log_softmax(-1)
                expected -= float(chances[ids[n]])
        assert nll == pytest.approx(expected, rel=1e-4)
    assert found[1] == 0


def test_a_reply_that_says_nothing_costs_no_fluency(tmp_path):
    loaded = causal_models.load_base(save_llama(tmp_path, make_tokenizer()), tmp_path)
    items, session = [Example(str(n), 2, "sad", ("hello",), "hi") for n in range(2)], Session("cpu")
    standard = Standard(items, [], None, [], lambda *_: {}, session, Extras(fluency=loaded))
    found = standard.measure("x", ["\u200b", "I am so sorry."], (0, 1)).figures["fluency_ppl"]
    (nll,) = text_nll(*loaded, ["I am so sorry."], session, "")
    assert found.point == pytest.approx(math.exp(nll / 5), rel=1e-4)


def test_words_come_from_an_exemplar_where_four_in_a_row_do():
    replies = ["oh i am so sorry to hear it", "i am so glad", "", "i am so very so sorry to hear"]
    shown = [
        ["well , i am so sorry !", "sorry to hear it all"],
        ["i am so sad"],
        ["a b c d"],
        ["so sorry to hear"],
    ]
    found = measures.copied_words(replies, shown)
    # all but "oh", by two exemplars; three in a row are not enough; the last four
    assert found.items()[[0, 1, 3]] == pytest.approx([100 * 7 / 8, 0, 100 * 4 / 8])
    assert found.point == pytest.approx(100 * 11 / 20)
    assert np.isnan(found.items()[2])  # says nothing


# ----------------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize("sizes", [[1, 1], [3, 1, 2, 1, 1], [2] * 40, [4, 4], [1] * 7])
def test_another_items_gold_is_of_another_conversation_and_each_is_used_once(sizes):
    conversations = [f"c{n}" for n, size in enumerate(sizes) for _ in range(size)]
    for seed in range(5):
        others = floors.derangement(conversations, seed)
        assert sorted(others) == list(range(len(conversations)))
        assert all(conversations[i] != conversations[j] for i, j in enumerate(others))
    assert floors.derangement(conversations, 1) == floors.derangement(conversations, 1)


@pytest.mark.parametrize("count", [2, 5])
def test_in_a_single_conversation_another_items_gold_is_at_least_another_items(count):
    others = floors.derangement(["c"] * count, 42)
    assert sorted(others) == list(range(count)) and all(i != j for i, j in enumerate(others))
    assert floors.derangement(["c"], 42) == [0] and floors.derangement([], 42) == []


def test_the_floors_of_replies_are_found_without_the_reply():
    def turn(conv: str, history: str, response: str) -> Example:
        return Example(conv, 2, "sad", (history,), response)

    training = [
        turn("t1", "my dog died", "poor dog"),
        turn("t2", "i won the race", "well done"),
        turn("t3", "the exam went badly", "well done"),
    ]
    asked = [turn("a", "yesterday my old dog died", "oh no"), turn("b", "i won a race", "great")]

    def nearest(histories: list[str], known: list[str]) -> list[int]:
        return floors.nearest_by_tfidf(histories, known, ["t1", None], ["t1", "t2", "t3"])

    found = floors.replies(asked, training, 0, nearest)
    assert found[floors.CONSTANT] == ["well done"] * 2
    assert found[floors.OTHER_GOLD] == ["great", "oh no"]
    assert floors.OTHER_GOLD not in floors.replies(asked[:1], training, 0, None)  # there is no other
    assert found[floors.NEAREST][1] == "well done"
    assert found[floors.NEAREST][0] != "poor dog"  # of the same conversation, as t1 is said to be
    free = floors.nearest_by_tfidf(
        [asked[0].history[0]], [t.history[0] for t in training], [None], ["", "", ""]
    )
    assert free == [0]


def test_macro_f1_is_of_the_levels_that_occur_alone():
    """Where nobody shows a dimension, gold or reply, all answers are right: 100, and not half of it."""
    none = np.zeros(5, dtype=int)
    found = measures.agreement(none, none, 2)
    assert found["f1"].point == 100 and math.isnan(found["kappa"].point)


def test_a_reply_is_held_against_the_exemplars_of_its_own_item():
    items = [Example(str(n), 2, "sad", ("hello",), "oh") for n in range(3)]
    shown = [["no"], ["i am so very sorry"], ["why"]]
    standard = Standard(items, [], shown, [], lambda *_: {}, Session("cpu"))
    run = standard.measure("some", ["I am so very sorry", "No"], (1, 2), shown=standard.shown)
    assert run.figures["verbatim_exemplar"].point == 50
    assert run.figures["words_exemplar"].point == pytest.approx(100 * 5 / 6)


def test_relevance_is_to_the_last_turn_of_the_replys_own_item():
    class Encoders:
        def embed(self, side, texts, session, title):
            return np.array([[text == "one", text == "two"] for text in texts], dtype=float)

    items = [Example(n, 2, "sad", ("hello", "yes", n), "oh") for n in ("one", "two")]
    extras = Extras(relevance=SimpleNamespace(encoders=Encoders()))
    standard = Standard(items, [], None, [], lambda *_: {}, Session("cpu"), extras)
    assert standard.measure("some", ["two"], (1,)).figures["cosine_last_turn"].point == 1
