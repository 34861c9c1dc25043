"""The word-level tokenizer, word vectors and configs of the GloVe family."""

import gzip
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import generators
import train_glove_t5
from dataloaders import tokenizer_hash
from glove_models import (
    SIZES,
    glove_config,
    load_vectors,
    narrowed,
    read_glove,
    save_glove,
    set_word_vectors,
    word_counts,
    word_tokenizer,
)
from options import UserError

SENTENCE = "I don't know, you're right!"


def tokenizer_of(*texts):
    return word_tokenizer(word_counts(texts))


def pieces(text: str) -> list[str]:
    return tokenizer_of(text).tokenize(text)


# -------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello WORLD", "hello world"),
        ("I don't", "i do n't"),
        ("I'm, he's, you're, we've, they'll, she'd", "i 'm , he 's , you 're , we 've , they 'll , she 'd"),
        ("DON'T! I’m can’t", "do n't ! i 'm ca n't"),
        ("won`t", "wo n't"),
        ("isn't it?", "is n't it ?"),
        ("didn't've", "did n't 've"),
        ("dogs' o'clock 'seriously'", "dogs ' o ' clock ' seriously '"),
        ("wait...what?!", "wait . . . what ? !"),
        ("$5, 50% (yes)", "$ 5 , 50 % ( yes )"),
        ("café naïve", "café naïve"),
        ("one\ttwo\n three", "one two three"),
        ("", ""),
    ],
)
def test_words_are_cut_as_glove_cuts_them(text, expected):
    assert pieces(text) == expected.split()
    assert word_counts([text, text]) == Counter(2 * expected.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, "i don't know, you're right!"),
        ("It's 50%; I can’t believe you'd say that...", "it's 50%; i can't believe you'd say that..."),
        ("Oh no ! What happened ?", "oh no! what happened?"),
        ("Well: she'll come; I’ve heard", "well: she'll come; i've heard"),
        ("Really (I think)? (Yes.)", "really (i think)? (yes.)"),
        ("Y'all come at 5 o'clock, ma'am", "y'all come at 5 o'clock, ma'am"),
        ("rock 'n' roll 'til then", "rock 'n' roll 'til then"),
        ("It was $5.50 of 1,000,000 at 3:30", "it was $5.50 of 1,000,000 at 3:30"),
        ("In 2010, 200 people; at 5. 3 of them", "in 2010, 200 people; at 5.3 of them"),
        ("At 5 p.m. today", "at 5 p.m. today"),
        ("happy:) sad :( so ;-) :D", "happy :) sad :( so ;-) :d"),
        ("Note: (a) one (so: b) two", "note: (a) one (so: b) two"),
        ("I <3 it!", "i <3 it!"),
        ('She said "hello", then "no". ("Yes")', 'she said "hello", then "no". ("yes")'),
        ("A well-known and/or three-day trip", "a well-known and/or three-day trip"),
        ("the dogs' bowl", "the dogs ' bowl"),
    ],
)
def test_decoding_reads_naturally_and_encodes_to_the_same_ids(text, expected):
    tokenizer = tokenizer_of(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("o y ma am n s d em 5 50 000 p m ' \" : ; ) ( - / . , ! < 3 $ all".split())))
def test_whatever_stands_side_by_side_is_cut_in_the_same_places_again(words):
    tokenizer = tokenizer_of(" ".join(words))
    ids = tokenizer.encode(" ".join(words))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_decoding_leaves_special_tokens_out_on_demand():
    tokenizer = tokenizer_of(SENTENCE)
    ids = [1, *tokenizer.encode(SENTENCE), 2, 0, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "i don't know, you're right!"


def test_encoding_adds_no_special_tokens_and_unknown_words_are_unk():
    tokenizer = word_tokenizer(["hello", "there"])
    assert tokenizer("Hello there stranger")["input_ids"] == [4, 5, 3]


def test_special_ids_are_distinct_and_the_models_own():
    tokenizer = tokenizer_of(SENTENCE)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    for size in SIZES:
        config = glove_config(tokenizer, size)
        assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == ids[:3]
        assert config.vocab_size == len(tokenizer) == 4 + len(set(pieces(SENTENCE)))


def test_words_keep_their_order_and_a_repeat_has_one_id():
    vocabulary = word_tokenizer(["b", "a", "b", "c"]).get_vocab()
    assert [vocabulary[w] for w in "bac"] == [4, 5, 6]
    assert len(vocabulary) == 7


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    tokenizer = tokenizer_of(SENTENCE)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.encode(SENTENCE) == tokenizer.encode(SENTENCE)
    assert loaded.decode(loaded.encode(SENTENCE)) == "i don't know, you're right!"
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (
        0,
        1,
        2,
        3,
    )


def test_another_vocabulary_has_another_hash():
    hashes = {tokenizer_hash(word_tokenizer(w)) for w in (["a", "b"], ["b", "a"], ["a", "b", "c"])}
    assert len(hashes) == 3


# ----------------------------------------------------------------------------------------------- word vectors


def test_vectors_fill_the_first_dimensions_and_the_rest_has_their_scale():
    vectors = (np.random.default_rng(0).normal(size=(400, 50)) * 0.37).astype(np.float32)
    embedding = torch.nn.Embedding(404, 300)
    set_word_vectors(embedding, vectors, seed=1)
    assert torch.equal(embedding.weight[4:, :50], torch.from_numpy(vectors))
    assert embedding.weight[4:, 50:].std().item() == pytest.approx(vectors.std(), rel=0.02)
    assert embedding.weight[:4].std().item() == pytest.approx(vectors.std(), rel=0.15)
    assert embedding.weight.requires_grad


def test_the_drawn_dimensions_depend_on_the_seed_alone():
    vectors = np.ones((4, 2), dtype=np.float32) * [[1.0], [2.0], [3.0], [4.0]]
    drawn = []
    for seed, disturb in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(disturb)
        embedding = torch.nn.Embedding(8, 6)
        set_word_vectors(embedding, vectors.astype(np.float32), seed)
        drawn.append(embedding.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_vectors_wider_than_the_model_keep_their_inner_products_best(capsys):
    """300-d vectors in a small model: as well as any so many numbers can."""
    draw = np.random.default_rng(0)
    vectors = (
        draw.normal(size=(60, 5)) @ draw.normal(size=(5, 30)) + 0.01 * draw.normal(size=(60, 30))
    ).astype("f")
    embedding = torch.nn.Embedding(64, 5)
    set_word_vectors(embedding, vectors, seed=1)
    held = embedding.weight[4:].detach().numpy()
    assert held @ held.T == pytest.approx(
        vectors @ vectors.T, abs=0.02 * float(np.abs(vectors @ vectors.T).max())
    )
    assert "of width 30 are narrowed to the 5" in capsys.readouterr().out


def test_narrowed_vectors_point_the_same_way_on_every_machine(monkeypatch):
    """A direction and its opposite serve as well, and which of them LAPACK gives is left open."""
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype("f")
    found, eigh = narrowed(vectors, 3), np.linalg.eigh

    def others(matrix):
        lengths, directions = eigh(matrix)
        return lengths, directions * np.where(np.arange(len(lengths)) % 2, 1, -1)

    for other in (others, lambda matrix: (eigh(matrix)[0], -others(matrix)[1])):
        monkeypatch.setattr(np.linalg, "eigh", other)
        np.testing.assert_allclose(narrowed(vectors, 3), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "word"), [((3, 6), "3 word vectors for 8 tokens")])
def test_vectors_that_do_not_fit_are_plain_errors(shape, word):
    with pytest.raises(UserError, match=word):
        set_word_vectors(torch.nn.Embedding(8, 6), np.zeros(shape, dtype=np.float32), seed=1)


def test_saved_vectors_belong_to_the_tokenizers_ids(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    save_glove(tmp_path, ["b", "a", "c"], vectors)
    tokenizer, loaded = AutoTokenizer.from_pretrained(str(tmp_path)), load_vectors(tmp_path)
    assert {w: loaded[i - 4].tolist() for w, i in tokenizer.get_vocab().items() if i >= 4} == {
        "b": [0, 1],
        "a": [2, 3],
        "c": [4, 5],
    }


def test_missing_vectors_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match="vectors.safetensors.*prepare_data.py"):
        load_vectors(tmp_path)


# ------------------------------------------------------------------------------------------------ GloVe files


def glove_file(tmp_path, text: str):
    file = tmp_path / "glove.txt"
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_glove_file_is_read_whole(tmp_path, ending):
    rows = list(
        read_glove(glove_file(tmp_path, ending.join(["the 1 -2.5 3e-1", "café 0 0 1", ", 4 5 6"]) + ending))
    )
    assert [w for w, _ in rows] == ["the", "café", ","]
    np.testing.assert_array_equal(
        np.stack([v for _, v in rows]), np.array([[1, -2.5, 0.3], [0, 0, 1], [4, 5, 6]], dtype=np.float32)
    )


@pytest.mark.parametrize(
    ("bad", "line"),
    [("a 1 2", 2), ("a 1 2 3 4", 2), ("a 1 2 x", 2), ("", 2), ("a 1 2 ", 2)],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path, bad, line):
    file = glove_file(tmp_path, f"the 1 2 3\n{bad}\nof 1 2 3\n")
    with pytest.raises(UserError, match=rf"{file}, line {line}: "):
        list(read_glove(file))


ROWS = b"the 0.1 0.2 0.3\ncat 0.4 0.5 0.6\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(ROWS + b". . . 0.1 0.2 0.3\n", ["the", "cat", ". . ."], id="blanks in a word"),
        pytest.param(b"2 3\n" + ROWS, ["the", "cat"], id="counts in the first line"),
        pytest.param(ROWS.replace(b"\n", b" \n"), ["the", "cat"], id="blanks at line ends"),
        pytest.param(ROWS.replace(b" ", b"\t"), ["the", "cat"], id="tabs"),
        pytest.param(ROWS + b"\n\n", ["the", "cat"], id="blank last lines"),
        pytest.param(b"\xef\xbb\xbf" + ROWS, ["the", "cat"], id="byte order mark"),
        pytest.param(b"\xef\xbb\xbf2 3\n" + ROWS, ["the", "cat"], id="mark before the counts"),
        pytest.param(gzip.compress(ROWS), ["the", "cat"], id="gzip"),
        pytest.param(
            "2024 1 2 3\na\u00a0b 1 2 3\n\x85 1 2 3\n".encode(), ["2024", "a\u00a0b", "\x85"], id="odd"
        ),
    ],
)
def test_word_vectors_are_read_in_the_forms_that_people_have(tmp_path, content, words):
    (tmp_path / "v.txt").write_bytes(content)
    found = dict(read_glove(tmp_path / "v.txt"))
    assert list(found) == words
    assert all(v.shape == (3,) and np.isfinite(v).all() for v in found.values())
    if "cat" in words:
        np.testing.assert_array_equal(found["cat"], np.array([0.4, 0.5, 0.6], dtype=np.float32))


def test_a_word_that_stands_there_again_keeps_its_first_vector(tmp_path, capsys):
    found = list(read_glove(glove_file(tmp_path, "the 1 2\nof 3 4\nthe 5 6\n")))
    assert [(w, v.tolist()) for w, v in found] == [("the", [1, 2]), ("of", [3, 4])]
    assert "1 words stand there again" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused_with_its_line(tmp_path, number):
    with pytest.raises(UserError, match=r"glove\.txt, line 2: .*not finite"):
        list(read_glove(glove_file(tmp_path, f"the 1 2 3\ncat 1 {number} 3\n")))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html>\n<html lang=en>\n", "line 1"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"", "no word vectors"),
        (b"2 3\n", "no word vectors"),
        (b"3000000 300\n</s> \x00\x01\x7f\xff\x80", "line 2"),  # word2vec's binary form
        (gzip.compress(ROWS * 99, mtime=0)[:-9], "damaged"),
        (ROWS.decode().encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_plain_words(tmp_path, content, what):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"v.txt.*{what}"):
        list(read_glove(tmp_path / "v.txt"))


def test_a_file_that_is_no_glove_is_refused_at_its_first_line(tmp_path):
    with pytest.raises(UserError, match="line 1"):
        list(read_glove(glove_file(tmp_path, "word\nother\n")))


# ---------------------------------------------------------------------------------------------------- configs


def test_config_takes_changes_and_leaves_out_what_is_none():
    tokenizer = tokenizer_of(SENTENCE)
    config = glove_config(tokenizer, "tiny", 0.25, d_model=128, num_layers=None)
    assert (config.d_model, config.d_ff, config.dropout_rate) == (128, 128, 0.25)
    assert config.num_layers == config.num_decoder_layers == 2
    assert glove_config(tokenizer, "paper", num_layers=3).num_decoder_layers == 3


def test_prepared_tokenizer_knows_the_marker_of_exemplars(prepared):
    from dataloaders import EXEMPLAR_MARKER

    tokenizer = AutoTokenizer.from_pretrained(str(prepared / "data" / "glove"))
    assert tokenizer.unk_token_id not in tokenizer.encode(EXEMPLAR_MARKER)
    assert len(load_vectors(prepared / "data" / "glove")) + 4 == len(tokenizer)


def test_the_mini_size_brings_its_recipe_and_flags_still_win():
    assert train_glove_t5.parse_args([]).lr == 1e-4
    mini = train_glove_t5.parse_args(["--size", "mini", "--lr", "5e-4"])
    assert (mini.lr, mini.dropout, mini.batch_tokens) == (5e-4, 0.0, 4000)
    fits = train_glove_t5.parse_args(["--size", "mini", "--batch-size", "auto"])
    assert (fits.batch_size, fits.batch_tokens, fits.effective_batch) == ("auto", 0, 96)


@pytest.mark.parametrize(("size", "rate"), [("paper", "0.0001"), ("mini", "0.001")])
def test_the_help_shows_the_defaults_of_the_size_that_is_asked_about(size, rate, capsys):
    with pytest.raises(SystemExit):
        train_glove_t5.parse_args(["--size", size, "--help"])
    assert f"peak learning rate (AdamW) (default: {rate})" in " ".join(capsys.readouterr().out.split())


def test_the_sizes_of_a_model_are_those_of_its_flags(prepared, monkeypatch):
    monkeypatch.setattr(generators, "run", lambda command, load: load(command.paths).t5.config)
    words = "--size tiny --d-model 32 --d-kv 8 --heads 2 --d-ff 48 --layers 1 --add-exemplars none".split()
    words += ["--empathy-loss-w", "0", "--sentiment-loss-w", "0", "--workdir", str(prepared)]
    made = train_glove_t5.main(words)
    sizes = (made.d_model, made.d_kv, made.num_heads, made.d_ff, made.num_layers, made.num_decoder_layers)
    assert sizes == (32, 8, 2, 48, 1, 1)
