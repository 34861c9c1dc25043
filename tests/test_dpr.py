"""The dense passage retriever: training data, loss, vectors, loading, and the rank that chooses the best."""

import contextlib
import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertModel, DPRContextEncoder, DPRQuestionEncoder, T5Config

import dpr_exemplar_retriever
from corpora import listener_turns, read_pairs
from DPR import biencoder, prepare_dpr_data, retriever, train_dpr
from DPR.biencoder import SIDES, BiEncoder, dpr_loss, embed, load_saved, load_side, vectors
from DPR.learning import passages_of, rank_report, read_entries, training_data
from DPR.prepare_dpr_data import draw, from_dialogues, from_pairs
from DPR.retriever import Retriever
from DPR.train_dpr import parse_args
from options import Paths, UserError
from pretrained import load_tokenizer
from session import Session
from settings import SearchOptions, pick

TEXTS = [
    "i am sad",
    "what happened to your old dog ?",
    "oh",
    "i am sad",
    "my friend is happy and i am so proud of it",
]


@pytest.fixture(scope="module")
def session():
    return Session("cpu", "fp32", 1)


@pytest.fixture(scope="module")
def bert(prepared):
    return prepared / "data" / "bert-tiny"


@pytest.fixture(scope="module", params=["cls", "mean"])
def encoder(bert, request):
    return load_side(bert, "context", request.param).eval()


def ids_of(tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


# ------------------------------------------------------------------------------------------------------- loss


def loss_written_out(questions, contexts, positive, texts):
    total = 0.0
    for i, question in enumerate(questions):
        scores = [sum(a * b for a, b in zip(question, c, strict=True)) for c in contexts]
        rivals = [s for j, s in enumerate(scores) if j == positive[i] or texts[j] != texts[positive[i]]]
        total -= scores[positive[i]] - math.log(sum(math.exp(s) for s in rivals))
    return total


def loss_of(questions, contexts, positive, texts):
    positive, texts = torch.tensor(positive), torch.tensor(texts)
    return dpr_loss(
        torch.as_tensor(questions),
        torch.as_tensor(contexts),
        positive,
        texts[positive][:, None] == texts[None],
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 10_000), st.data())
def test_loss_is_the_formula_written_out(count, extra, seed, data):
    generator = torch.Generator().manual_seed(seed)
    questions, contexts = (
        torch.randn(count, 4, generator=generator),
        torch.randn(count + extra, 4, generator=generator),
    )
    positive = data.draw(st.lists(st.integers(0, count + extra - 1), min_size=count, max_size=count))
    texts = data.draw(st.lists(st.integers(0, 4), min_size=count + extra, max_size=count + extra))
    expected = loss_written_out(questions.tolist(), contexts.tolist(), positive, texts)
    assert loss_of(questions, contexts, positive, texts).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_loss_is_computed_in_fp32_under_bf16_autocast():
    questions, contexts = 3 * torch.randn(4, 8), 3 * torch.randn(12, 8)
    plain = loss_of(questions, contexts, [0, 3, 6, 9], range(12))
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(questions, contexts, [0, 3, 6, 9], range(12)).item() == plain.item()


def test_a_copy_of_the_positive_is_no_negative_but_another_text_is():
    questions, contexts = torch.randn(2, 4), torch.randn(4, 4)
    before = loss_of(questions, contexts, [0, 2], [10, 11, 12, 13])
    with_copy = torch.cat([contexts, contexts[:1]])
    # for the second question the copy is one more negative, so only the first is asked
    first = loss_of(questions[:1], contexts, [0], [10, 11, 12, 13])
    assert loss_of(questions[:1], with_copy, [0], [10, 11, 12, 13, 10]).item() == pytest.approx(
        first.item(), rel=1e-6
    )
    assert loss_of(questions[:1], with_copy, [0], [10, 11, 12, 13, 99]) > first + 1e-3
    assert (
        loss_of(questions, with_copy, [0, 2], [10, 11, 12, 13, 10]) > before
    )  # a passage of one question is a negative of the other


def test_gradient_pulls_the_positive_and_pushes_its_rivals():
    questions, contexts = torch.eye(2, 4), torch.randn(3, 4, requires_grad=True)
    loss_of(questions, contexts, [0, 1], [0, 1, 2]).backward()
    pull = questions @ contexts.grad.T  # (2, 3)
    assert (pull.diagonal() < 0).all()
    assert pull[0, 1] > 0 and pull[1, 0] > 0 and (pull[:, 2] > 0).all()


# ---------------------------------------------------------------------------------------------- training data


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=3)), max_size=12),
    st.integers(0, 1000),
)
def test_draw_never_returns_ones_own_conversation(pool, seed):
    drawn = draw(random.Random(seed), pool, own="a")
    allowed = [text for owner, text in pool if owner != "a"]
    assert drawn in allowed if allowed else drawn is None


def test_draw_finds_the_one_stranger_among_many_of_ones_own():
    pool = [("a", "mine")] * 5000 + [("b", "theirs")]
    assert draw(random.Random(1), pool, "a") == "theirs"


def owners(examples) -> dict:
    found = {}
    for e in examples:
        found.setdefault(e.response, set()).add((e.conv_id, e.emotion))
    return found


def test_entries_of_dialogues_have_the_published_keys_and_the_right_negatives(prepared):
    path = Paths(prepared).dialogues("train")
    examples, entries = listener_turns(path), from_dialogues(path, seed=1)
    assert len(entries) == len(examples)
    owner = owners(examples)
    for example, entry in zip(examples, entries, strict=True):
        assert set(entry) == {"question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}
        assert entry["question"] == " ".join(example.history)
        assert entry["answers"] == [example.response]
        assert entry["positive_ctxs"] == [{"title": "", "text": example.response}]
        for hard in entry["hard_negative_ctxs"]:
            assert any(c != example.conv_id and m == example.emotion for c, m in owner[hard["text"]])
        for other in entry["negative_ctxs"]:
            assert any(c != example.conv_id and m != example.emotion for c, m in owner[other["text"]])
    assert all(e["negative_ctxs"] for e in entries) and any(e["hard_negative_ctxs"] for e in entries)


def test_entries_of_pairs_have_warm_positives_and_cold_negatives(prepared):
    path = Paths(prepared).pairs("emo", "train")
    table = read_pairs(path)
    level = {}
    for post, reply, value in zip(table["seeker_post"], table["response_post"], table["level"], strict=True):
        level.setdefault(reply, set()).add((post, value >= 1))
    entries = from_pairs(path, seed=1)
    assert len(entries) == (table["level"] >= 1).sum()
    for entry in entries:
        post = entry["question"]
        assert (post, True) in level[entry["positive_ctxs"][0]["text"]]
        assert any(p != post and warm for p, warm in level[entry["hard_negative_ctxs"][0]["text"]])
        assert any(p != post and not warm for p, warm in level[entry["negative_ctxs"][0]["text"]])


def test_entries_depend_on_the_seed_alone(prepared):
    path = Paths(prepared).dialogues("train")
    assert from_dialogues(path, 1) == from_dialogues(path, 1) != from_dialogues(path, 2)


def test_both_datasets_together_and_training_reads_what_was_written(workdir):
    sizes = {}
    for dataset in ("empd", "reddit", "empd-reddit"):
        prepare_dpr_data.main(["--workdir", str(workdir), "--dataset", dataset])
        sizes[dataset] = len(read_entries(Paths(workdir).dpr_data(dataset, "train")))
    assert sizes["empd-reddit"] == sizes["empd"] + sizes["reddit"] > sizes["empd"] > 0


def test_more_negatives_than_there_are_is_said(workdir, capsys):
    """Else runs with 1 and with 5 would be the same and look different."""
    prepare_dpr_data.main(["--workdir", str(workdir)])
    tiny = f"--encoder {Paths(workdir).bert_tiny} --max-steps 1 --valid-queries 5 --device cpu".split()
    for asked, said in (("5", True), ("1", False)):
        flags = ["--workdir", str(workdir), *tiny, "--name", asked]
        train_dpr.main([*flags, "--hard-negatives", asked, "--other-negatives", asked])
        out = capsys.readouterr().out
        assert ("note: --hard-negatives 5: no question of" in out) == said
        assert ("--other-negatives 5" in out and "has more than 1" in out) == said


GOOD = {"question": "q", "positive_ctxs": [{"text": "p"}], "hard_negative_ctxs": [], "negative_ctxs": []}


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        {},
        GOOD | {"question": None},
        GOOD | {"positive_ctxs": []},
        GOOD | {"positive_ctxs": ["p"]},
        GOOD | {"positive_ctxs": {"text": "p"}},
        GOOD | {"hard_negative_ctxs": [{"title": "t"}]},
        GOOD | {"negative_ctxs": [{"text": 3}]},
        GOOD | {"negative_ctxs": None},
    ],
)
def test_a_bad_entry_is_reported_with_file_and_number(tmp_path, bad):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([GOOD, GOOD, bad]))
    with pytest.raises(UserError, match=f"{file}, entry 2"):
        read_entries(file)


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "3", "[" * 100_000])
def test_a_file_without_entries_is_a_plain_error(tmp_path, text):
    file = tmp_path / "train.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{file}: .*; make it with: python -m DPR.prepare_dpr_data"):
        read_entries(file)


def test_missing_entries_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match="DPR.prepare_dpr_data"):
        read_entries(tmp_path / "none.json")


def test_published_data_without_optional_keys_is_read(tmp_path):
    file = tmp_path / "train.json"
    file.write_text(
        json.dumps([{"question": "q", "positive_ctxs": [{"title": "t", "text": "p", "score": 1}]}])
    )
    assert passages_of(read_entries(file)[0], 1, 1) == ["p"]


def entry(question, positive, hard=(), other=()):
    contexts = {"positive_ctxs": [positive], "hard_negative_ctxs": hard, "negative_ctxs": other}
    return {"question": question} | {k: [{"text": t} for t in v] for k, v in contexts.items()}


def test_a_batch_knows_each_positive_and_every_copy_of_it(bert):
    tokenizers = dict.fromkeys(SIDES, load_tokenizer(bert))
    entries = [
        entry("i", "so sad", ["oh no"], ["my dog"]),
        entry("you", "oh no"),
        entry("we", "so sad", ["my dog"]),
    ]
    args = SimpleNamespace(max_length=16, max_passage_length=16, hard_negatives=1, other_negatives=1)
    batch = training_data(entries, args, tokenizers).collate([2, 0, 1])
    texts = tokenizers["context"].batch_decode(batch["passage_ids"], skip_special_tokens=True)
    assert texts == ["so sad", "my dog", "so sad", "oh no", "my dog", "oh no"]
    assert batch["positive"].tolist() == [0, 2, 5]
    numbers = batch["text_numbers"]
    assert (numbers[:, None] == numbers).tolist() == [[a == b for b in texts] for a in texts]


def test_long_questions_keep_their_end_and_long_passages_their_beginning(bert):
    tokenizers = {side: load_tokenizer(bert) for side in SIDES}
    text = "i am so sad that my dog is not happy with you"
    args = SimpleNamespace(max_length=6, max_passage_length=6, hard_negatives=1, other_negatives=1)
    batch = training_data([entry(text, text)], args, tokenizers).collate([0])
    kept = [
        tokenizers["context"].decode(batch[k][0], skip_special_tokens=True)
        for k in ("question_ids", "passage_ids")
    ]
    assert kept == ["not happy with you", "i am so sad"]


def test_nothing_to_learn_from_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--batch-size", "1", "--hard-negatives", "0", "--other-negatives", "0"])
    assert "--batch-size 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- vectors


def test_vectors_are_the_cls_position_or_the_mean_over_real_positions(bert):
    plain = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    ids, mask = ids_of(load_tokenizer(bert), TEXTS)
    hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    means = torch.stack([h[: m.sum()].mean(0) for h, m in zip(hidden, mask, strict=True)])
    for side in SIDES:
        for pooling, expected in (("cls", hidden[:, 0]), ("mean", means)):
            found = vectors(load_side(bert, side, pooling).eval(), ids, mask)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_pools_as_its_own_folder_says(bert, tmp_path):
    """Where sentence-transformers wrote it, and nobody says otherwise."""
    folder = shutil.copytree(bert, tmp_path / "sentence-encoder")
    (folder / "1_Pooling").mkdir()
    ids, mask = ids_of(load_tokenizer(bert), TEXTS)
    for mean in (True, False):
        how = "mean" if mean else "cls"
        config = {"pooling_mode_cls_token": not mean, "pooling_mode_mean_tokens": mean}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            expected = vectors(load_side(bert, "context", how).eval(), ids, mask)
            torch.testing.assert_close(vectors(load_side(folder, "context").eval(), ids, mask), expected)
        found = Retriever.from_pretrained(encoder=str(folder), session=Session("cpu"), max_length=12)
        assert found.encoders.origin["pooling"] == how  # exemplars say what made them


def test_vectors_do_not_depend_on_batch_mates(encoder, bert):
    tokenizer = load_tokenizer(bert)
    together = vectors(encoder, *ids_of(tokenizer, TEXTS))
    alone = torch.cat([vectors(encoder, *ids_of(tokenizer, [t])) for t in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_embedding_in_bulk_equals_one_by_one(encoder, bert, session, batch_size):
    tokenizer = load_tokenizer(bert)
    with torch.no_grad():
        alone = torch.cat([vectors(encoder, *ids_of(tokenizer, [t])) for t in TEXTS])
    encoder.train()  # dropout must not reach the vectors
    found = embed(encoder, tokenizer, TEXTS, session, 32, False, "texts", batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found[0], found[3])  # one text, one vector


def test_a_gpu_reads_short_texts_in_fewer_passes_with_the_same_vectors(encoder, bert, session, monkeypatch):
    passes = []
    whole = biencoder.vectors
    monkeypatch.setattr(biencoder, "vectors", lambda *a: (passes.append(a[1].shape), whole(*a))[1])
    plain = {"move": lambda x: x, "gather": list, "autocast": contextlib.nullcontext, "rank": 0, "world": 1}
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), **plain)
    tokenizer = load_tokenizer(bert)
    given = embed(encoder, tokenizer, TEXTS, gpu, 32, False, "texts", 2)
    fewer = len(passes)
    assert all(rows * width <= 2 * 32 for rows, width in passes)
    expected = embed(encoder, tokenizer, TEXTS, session, 32, False, "texts", 2)
    assert fewer < len(passes) - fewer
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_each_distinct_text_is_embedded_once(bert, session):
    encoder, rows = load_side(bert, "context"), []
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    embed(encoder, load_tokenizer(bert), TEXTS * 5, session, 32, False, "texts", 2)
    assert sum(rows) == len(set(TEXTS))


def test_an_interrupted_embedding_goes_on_where_it_stopped(bert, session, tmp_path):
    encoder, tokenizer, rows = load_side(bert, "context"), load_tokenizer(bert), []
    texts = [" ".join(["sad", "dog", "you", "oh"][: 1 + i % 4]) + " ." * (i // 4) for i in range(20)]
    whole = embed(encoder, tokenizer, texts, session, 32, False, "texts", 1)
    arguments = (encoder, tokenizer, texts, session, 32, False, "texts", 1, tmp_path)
    hook = encoder.register_forward_pre_hook(
        lambda module, args: 1 / 0 if len(rows) == 12 else rows.append(1)
    )
    with pytest.raises(ZeroDivisionError):
        embed(*arguments)
    hook.remove()
    rows.clear()
    encoder.register_forward_pre_hook(lambda module, args: rows.append(1))
    np.testing.assert_array_equal(embed(*arguments), whole)
    assert 0 < len(rows) < len(texts)


def test_embedding_keeps_the_end_of_a_dialogue_and_the_beginning_of_a_passage(bert, session):
    encoder, tokenizer = load_side(bert, "question"), load_tokenizer(bert)
    text = "i am so sad that my dog is not happy with you"
    for keep_latest, kept in ((True, "not happy with you"), (False, "i am so sad")):
        found = embed(encoder, tokenizer, [text, kept], session, 6, keep_latest, "texts")
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("side", list(SIDES))
def test_what_holds_no_encoder_is_a_plain_error(bert, tmp_path, side):
    with pytest.raises(UserError, match="nowhere"):
        load_side(tmp_path / "nowhere", side)
    empty, bare, t5 = tmp_path / "empty", tmp_path / "bare", tmp_path / "t5"
    empty.mkdir(), bare.mkdir()
    shutil.copy(bert / "config.json", bare)
    T5Config(d_model=8).save_pretrained(t5)
    for folder in (empty, bare, t5):
        with pytest.raises(UserError, match=str(folder)):
            load_side(folder, side)


def test_an_encoder_of_the_other_side_is_refused(bert, tmp_path):
    load_side(bert, "question").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no context encoder"):
        load_side(tmp_path, "context")


@pytest.mark.parametrize("how", ["cut", "lacks a layer", "other width"])
def test_weights_that_do_not_fill_the_model_are_refused(bert, tmp_path, how):
    """Nothing of an encoder may be left at random in silence."""
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    if how == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 3} if how == "lacks a layer" else {"intermediate_size": 64}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(folder)):
        load_side(folder, "question")


def test_a_folder_without_tokenizer_is_a_plain_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.fixture
def run_folder(bert, tmp_path):
    """What train_dpr exports, from encoders that differ."""
    for seed, side in enumerate(SIDES):
        torch.manual_seed(seed)
        encoder = load_side(bert, side, "mean")
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(0.05 * torch.randn_like(p))
        encoder.save_pretrained(tmp_path / f"{side}_encoder")
        load_tokenizer(bert).save_pretrained(str(tmp_path / f"{side}_encoder"))
    return tmp_path


def test_saved_encoders_are_plain_dpr_encoders(run_folder):
    saved = load_saved(run_folder)
    for side, plain in (("question", DPRQuestionEncoder), ("context", DPRContextEncoder)):
        encoder, tokenizer = saved[side]
        loaded, info = plain.from_pretrained(run_folder / f"{side}_encoder", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids, mask = ids_of(tokenizer, TEXTS)
        expected = loaded.eval()(input_ids=ids, attention_mask=mask).pooler_output
        torch.testing.assert_close(encoder.eval()(input_ids=ids, attention_mask=mask).pooler_output, expected)
        assert encoder.config.pooling == "mean"  # remembered, so that retrieval pools as training did
        with pytest.raises(UserError, match="was trained with --pooling mean"):
            load_side(run_folder / f"{side}_encoder", side, "cls")
        assert load_side(run_folder / f"{side}_encoder", side, "mean").config.pooling == "mean"
    weights = [next(saved[side][0].parameters()) for side in SIDES]
    assert not torch.equal(*weights)


def test_a_run_without_weights_names_the_command_that_makes_them(run_folder):
    (run_folder / "context_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="context_encoder/model.safetensors.*DPR.train_dpr"):
        load_saved(run_folder)


def test_biencoder_gives_each_side_its_own_texts(run_folder):
    saved = load_saved(run_folder)
    model = BiEncoder(saved["question"][0], saved["context"][0]).eval()
    tokenizer = saved["question"][1]
    (question_ids, question_mask), (context_ids, context_mask) = (
        ids_of(tokenizer, TEXTS[:2]),
        ids_of(tokenizer, TEXTS),
    )
    batch = {
        "question_ids": question_ids,
        "question_mask": question_mask,
        "passage_ids": context_ids,
        "passage_mask": context_mask,
    }
    questions, contexts = model(batch)
    torch.testing.assert_close(questions, vectors(saved["question"][0], question_ids, question_mask))
    torch.testing.assert_close(contexts, vectors(saved["context"][0], context_ids, context_mask))


# ------------------------------------------------------------------------------------------------------- rank


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 10_000))
def test_rank_report_equals_counting_one_by_one(count, passages, seed):
    rng = np.random.default_rng(seed)
    questions, contexts = (rng.integers(-2, 3, size=(n, 3)).astype(np.float32) for n in (count, passages))
    positive = rng.integers(0, passages, size=count)
    ranks, places = [], []
    for question, place in zip(questions, positive, strict=True):
        scores = [float(question @ c) for c in contexts]
        better = sum(s > scores[place] for s in scores)
        equal = sum(s == scores[place] for j, s in enumerate(scores) if j != place)
        ranks.append(better + equal / 2)
        places.append(range(better, better + equal + 1))  # where it may stand among its equals
    report = rank_report(questions, contexts, positive)
    assert report["average_rank"] == pytest.approx(sum(ranks) / count)
    for k in (1, 10, 50):
        shares = [sum(place < k for place in own) / len(own) for own in places]
        assert report[f"recall_{k}"] == pytest.approx(100 * sum(shares) / count)


def test_constant_vectors_rank_in_the_middle():
    report = rank_report(np.ones((5, 4), np.float32), np.ones((101, 4), np.float32), np.arange(5))
    assert report["average_rank"] == 50
    assert report["recall_1"] == pytest.approx(100 / 101)
    assert report["recall_50"] == pytest.approx(100 * 50 / 101)


def test_passages_of_many_lengths_are_read_in_pieces_and_found_by_their_questions(bert):
    tokenizers = dict.fromkeys(SIDES, load_tokenizer(bert))
    entries = [entry(f"i am {'so ' * (n % 9)}sad", "you " * (1 + n % 20), ["my dog"]) for n in range(40)]
    args = SimpleNamespace(max_length=40, max_passage_length=40, hard_negatives=1, other_negatives=1)
    batch = training_data(entries, args, tokenizers).collate([*range(40)])
    texts = tokenizers["context"].batch_decode(batch["passage_ids"], skip_special_tokens=True)
    assert [texts[place] for place in batch["positive"]] == [
        e["positive_ctxs"][0]["text"].strip() for e in entries
    ]
    known = {text: set() for text in texts}
    for text, number in zip(texts, batch["text_numbers"].tolist(), strict=True):
        known[text].add(number)
    assert all(len(numbers) == 1 for numbers in known.values())
    side = BiEncoder(BertModel.from_pretrained(bert), BertModel.from_pretrained(bert)).eval()
    whole = {k: v for k, v in batch.items() if k != "passage_pieces"}
    torch.testing.assert_close(side(batch)[1], side(whole)[1], atol=1e-5, rtol=1e-4)
    padded = sum(count * width for count, width in batch["passage_pieces"])
    assert batch["passage_mask"].sum() <= padded < 0.8 * batch["passage_mask"].numel()


@pytest.mark.parametrize(("hard", "other"), [(2, 1), (0, 2), (1, 0)])
def test_as_many_negatives_of_each_kind_are_learnt_from_as_are_asked_for(hard, other):
    texts = {"positive_ctxs": ["p"], "hard_negative_ctxs": ["h1", "h2"], "negative_ctxs": ["o1", "o2"]}
    asked = {name: [{"text": text} for text in row] for name, row in texts.items()}
    assert passages_of(asked, hard, other) == ["p", *["h1", "h2"][:hard], *["o1", "o2"][:other]]


def test_questions_of_another_seed_have_other_negatives(workdir):
    found = []
    for seed in ("1", "1", "2"):
        prepare_dpr_data.main(["--workdir", str(workdir), "--seed", seed, "--overwrite"])
        found.append(Paths(workdir).dpr_data("empd", "train").read_text())
    assert found[0] == found[1] != found[2]


def test_a_retriever_that_fits_in_its_training_fits_where_it_is_measured(trained_copy, monkeypatch):
    plain = BertModel.forward

    def small(self, input_ids=None, **named):
        if len(input_ids) > 8:  # four times --batch-size
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, input_ids=input_ids, **named)

    monkeypatch.setattr(BertModel, "forward", small)
    words = [
        "--workdir",
        str(trained_copy),
        "--encoder",
        str(Paths(trained_copy).bert_tiny),
        "--device",
        "cpu",
    ]
    words += "--max-steps 1 --batch-size 2 --accumulate 1 --valid-queries 20 --name small".split()
    assert train_dpr.main(words)["after"]["average_rank"] > 0


@pytest.mark.parametrize("is_main", [True, False])
def test_a_process_without_a_task_joins_the_others_and_leaves_what_they_keep(
    is_main, trained_copy, monkeypatch
):
    """Of two processes the one that looks later can find all files written."""
    kept = []
    plain = retriever.Drawn.read

    def read(self, corpus, groups, keep):
        keep.mkdir(parents=True)
        kept.append(keep)
        return plain(self, corpus, groups, keep)

    monkeypatch.setattr(retriever.Drawn, "read", read)
    monkeypatch.setattr(Session, "gather", lambda self, items: [*items, True])
    words = ["--workdir", str(trained_copy), "--match", "random", "--output", "saved/drawn"]
    options = pick(SearchOptions, dpr_exemplar_retriever.parse_args(words))
    session, paths = Session("cpu"), Paths(trained_copy, exemplars=str(trained_copy / "drawn"))
    session.main = is_main
    for times in (1, 2):  # the second finds nothing to do
        retriever.find(options, session, paths, overwrite=False)
        assert len(kept) == times and kept[-1].exists() == (not is_main)
        shutil.rmtree(kept[-1], ignore_errors=True)
