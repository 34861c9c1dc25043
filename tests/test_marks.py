"""Level marks: read before a reply, never learnt as words, asked for by targets."""

import json
from dataclasses import replace
from itertools import permutations

import pandas as pd
import pytest
import torch
from test_causal_models import LONG, TALKS, by_turn, make_tokenizer, save_llama
from test_causal_models import trained as new_causal

import conversation
import generators
import marks
import respond
import storage
import train_causal_lm
import train_glove_t5
from causal_models import CausalGenerator
from chats import causal_data, prompt_data
from corpora import listener_turns
from dataloaders import generator_data
from marks import of_target
from models import Generator, GeneratorSettings, token_nll
from options import DIMENSIONS, Paths, UserError
from responder import Responder
from session import Session
from settings import pick

MARKS = ["warm ask quiet", "", "far", ""]


def test_in_a_chat_marks_stand_right_before_the_reply_and_are_no_targets():
    tokenizer = make_tokenizer()
    plain = causal_data(TALKS, tokenizer, packed=False, **LONG)
    marked = causal_data(TALKS, tokenizer, packed=True, marks=MARKS, **LONG)
    assert marked.bare_lengths == plain.lengths == plain.bare_lengths != marked.lengths
    prompts = prompt_data(TALKS, tokenizer, marks=MARKS, **LONG)
    assert len(marked) == len(plain) == 4  # each turn its own: no marks in a history
    for n, mark in enumerate(MARKS):
        before, after = plain.collate([n]), marked.collate([n])
        assert before["target_ids"].tolist() == after["target_ids"].tolist()
        reply = TALKS[n].response + "<|im_end|>"
        prompt = tokenizer.decode(before["input_ids"][0]).removesuffix(reply) + (f"{mark}\n" if mark else "")
        assert tokenizer.decode(after["input_ids"][0]) == prompt + reply
        assert tokenizer.decode(prompts.collate([n])["input_ids"][0]) == prompt


def test_a_chat_without_marks_is_as_likely_as_before_and_one_with_marks_is_not(tmp_path):
    model = new_causal(save_llama(tmp_path / "llama", make_tokenizer()), tmp_path)
    plain = by_turn(model, causal_data(TALKS, model.tokenizer, packed=True, **LONG))
    marked = by_turn(model, causal_data(TALKS, model.tokenizer, packed=True, marks=MARKS, **LONG))
    for n, mark in enumerate(MARKS):
        assert (marked[n] == pytest.approx(plain[n], rel=1e-5)) == (mark == "")


@pytest.fixture(scope="module")
def glove(prepared) -> tuple[Generator, object]:
    backbone = generators.load_glove_t5("tiny", 0.0, 0, Paths(prepared))
    settings = GeneratorSettings(backbone=backbone.t5.config.to_dict(), exemplars="none")
    return Generator(settings, backbone.t5).eval(), backbone.tokenizer


def glove_batch(glove, texts: list[str] | None, numbers: list[int]) -> dict:
    model, tokenizer = glove
    start = model.t5.config.decoder_start_token_id
    data = generator_data(TALKS, tokenizer, src_len=40, tgt_len=None, marks=texts, start=start)
    return data.collate(numbers)


def test_a_decoder_reads_marks_and_is_asked_for_the_reply_alone(glove):
    model, _ = glove
    with torch.no_grad():
        plain = glove_batch(glove, None, [0, 1, 2, 3])
        before = token_nll(model(plain), plain["labels"]).sum(1)
        batch = glove_batch(glove, MARKS, [0, 1, 2, 3])
        assert batch["labels"].equal(plain["labels"]) and batch["reply_mask"].equal(plain["reply_mask"])
        together = token_nll(model(batch), batch["labels"]).sum(1)
        for n, mark in enumerate(MARKS):
            one = glove_batch(glove, MARKS, [n])
            alone = float(token_nll(model(one), one["labels"]).sum())
            assert together[n] == pytest.approx(alone, rel=1e-5)
            assert (alone == pytest.approx(float(before[n]), rel=1e-5)) == (mark == "")


def test_a_decoder_is_made_to_begin_with_the_marks(glove):
    model, tokenizer = glove
    batch = glove_batch(glove, MARKS, [0])
    out = model.generate(batch, max_new_tokens=4, num_return_sequences=2, do_sample=True)
    expected = [model.t5.config.decoder_start_token_id, *tokenizer("warm ask quiet")["input_ids"]]
    assert out[:, :4].tolist() == [expected] * 2 and out.shape[1] <= 8


def test_a_tenth_of_the_replies_has_no_marks_and_which_depends_on_the_example_alone(trained):
    paths = Paths(trained)
    examples = listener_turns(paths.dialogues("train"))
    found = marks.of_split("train", examples, paths, seed=1)
    labels = marks.read("train", examples, paths)
    whole = [marks.in_words({dim: labels[dim][n] for dim in labels}) for n in range(len(examples))]
    for mark, full in zip(found, whole, strict=True):
        assert set(mark.split()) <= set(full.split())
    backwards = marks.of_split("train", examples[::-1], paths, seed=1)
    assert backwards[::-1] == found
    many = [marks.of_split("train", examples, paths, seed) for seed in range(40)]
    empty = sum(mark == "" for row in many for mark in row) / (40 * len(examples))
    assert empty == pytest.approx(0.1, abs=0.03)
    alone = sum(len(mark.split()) == 1 for row in many for mark in row) / (40 * len(examples))
    assert alone == pytest.approx(0.9 * 3 / 7, abs=0.04)  # as in use, where mostly one dimension is asked for
    assert marks.of_target({"exp": 0.8, "sentiment": 1, "int": 2}, {"exp": 2, "int": 2}) == {
        "exp": 1,
        "int": 1,
    }


def test_marks_stand_in_one_order_whatever_the_order_of_a_target():
    target = {"int": 1, "exp": 0, "emo": 1}
    known = dict.fromkeys(DIMENSIONS, 2)
    asked = [marks.in_words(marks.of_target(dict(pairs), known)) for pairs in permutations(target.items())]
    assert set(asked) == {marks.in_words(target)} == {"warm tell " + DIMENSIONS["int"].marks[1]}


def test_a_dimension_of_which_no_reply_shows_anything_has_two_levels_still(trained_copy):
    paths = Paths(trained_copy)
    file = paths.labels("train")
    pd.read_csv(file, dtype=str).assign(emo=0, exp=2).to_csv(file, index=False)
    known = marks.known(paths)
    assert (known["emo"], known["exp"]) == (2, 3)


def test_a_replys_marks_are_those_of_its_labels(trained_copy):
    paths = Paths(trained_copy)
    file = paths.labels("train")
    pd.read_csv(file, dtype=str).assign(emo=1, exp=0, int=0).to_csv(file, index=False)
    found = marks.of_split("train", listener_turns(paths.dialogues("train")), paths, seed=1)
    words = {word for mark in found for word in mark.split()}
    assert words == {DIMENSIONS["emo"].marks[1], DIMENSIONS["exp"].marks[0], DIMENSIONS["int"].marks[0]}


def test_labels_older_than_their_dialogues_or_critics_are_named_before_marks_are_learnt(trained_copy, capsys):
    paths = Paths(trained_copy)
    file = paths.dialogues("train")
    file.write_text(file.read_text(encoding="utf-8").replace(" my ", " your "), encoding="utf-8")
    marks.known(paths)
    said = capsys.readouterr().out
    assert "train_labels.csv: what it was made from has changed since: dialogues" in said
    noted = storage.read_origin(paths.labels("train"))["exp"]["critic"]
    weights = paths.find(noted) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    marks.known(paths)
    assert "has changed since: dialogues, exp;" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["causal", "glove-t5"])
def test_targets_become_marks_where_the_generator_knows_them(script, trained_copy, tmp_path, monkeypatch):
    asked, of_split = [], marks.of_split
    monkeypatch.setattr(
        marks, "of_split", lambda split, *given: asked.append((split, given[-1])) or of_split(split, *given)
    )
    short = "--device cpu --max-steps 2 --batch-size 4 --control marks --no-predict --seed 5"
    flags = ["--workdir", str(trained_copy), *short.split()]
    if script == "causal":
        base = save_llama(tmp_path / "llama", make_tokenizer())
        train_causal_lm.main([*flags, "--model", base, "--lora-rank", "2", "--valid-conversations", "2"])
        run = trained_copy / "saved" / "causal-lm" / "plain-marks"
    else:
        plain = "--size tiny --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0"
        train_glove_t5.main([*flags, *plain.split()])
        run = trained_copy / "saved" / "glove-t5" / "plain-marks"
    assert asked == [("train", 5)], "by the run's seed, and none where likelihoods are measured"
    responder = Responder.from_pretrained(run, session=Session("cpu"), workdir=trained_copy)
    words = {"turns": ["My dog died."], "seed": 1, "n_candidates": 3}
    free, far, warm = (
        responder.reply(target=target, **words) for target in (None, {"emo": 0}, {"emo": 1, "exp": 1})
    )
    values = [a.candidates[0].log_probability for a in (free, far, warm)]
    assert len(set(values)) == 3 and free == responder.reply(target={}, **words)
    if script == "causal":
        batch = responder.writer.encode(["Hi."], [], {"emo": 1, "exp": 0})
        assert responder.writer.tokenizer.decode(batch["input_ids"][0]).endswith("assistant\nwarm tell\n")
    with pytest.raises(UserError, match="emo=2: this generator's marks have levels from 0 to 1"):
        responder.check_target({"emo": 2})
    with pytest.raises(UserError, match="there is no sentiment critic"):
        responder.check_target({"sentiment": 1})


def test_missing_labels_are_named_with_the_command_that_makes_them(trained_copy, tmp_path):
    Paths(trained_copy).labels("train").unlink()
    base = save_llama(tmp_path / "llama", make_tokenizer())
    with pytest.raises(UserError, match="train_labels.csv: no such file; make it with: .*label_dialogues.py"):
        train_causal_lm.main(["--workdir", str(trained_copy), "--model", base, "--control", "marks"])


def test_a_target_for_a_generator_without_marks_chooses_among_candidates_and_says_so(
    trained, tmp_path, capsys
):
    base = save_llama(tmp_path / "llama", make_tokenizer())
    CausalGenerator.start(base, rank=2, cache=tmp_path).save_pretrained(tmp_path / "run")
    critic = Paths(trained).critic("emo", "t5")
    words = ["--run", str(tmp_path / "run"), "--target", "emo=1", "--workdir", str(tmp_path)]
    options = pick(conversation.RespondOptions, respond.parse_args(words))
    responder = conversation.open_responder(options, {"emo": critic}, Paths(tmp_path), Session("cpu"))
    assert "trained without marks; a --target only chooses among its candidates" in capsys.readouterr().err
    answer = responder.reply(["Hello."], 4, {"emo": 1}, seed=0)
    assert answer.candidates[0].total == max(c.total for c in answer.candidates)


def test_marks_that_a_vocabulary_cannot_tell_apart_are_refused(prepared, monkeypatch):
    tokenizer = generators.load_glove_t5("tiny", 0.0, 0, Paths(prepared)).tokenizer
    marks.require_words(tokenizer, {"emo": 2, "exp": 2, "int": 2})
    strange = replace(DIMENSIONS["int"], marks=("xqzzy", "know", "understand"))
    monkeypatch.setitem(DIMENSIONS, "int", strange)
    with pytest.raises(UserError, match="the vocabulary lacks some of the words .*: xqzzy$"):
        marks.require_words(tokenizer, {"emo": 2, "exp": 2, "int": 2})


@pytest.mark.parametrize("unfit", [("quiet", "xqzzy", "know"), (DIMENSIONS["exp"].marks[0], "know", "xqzzy")])
def test_a_mark_that_is_unknown_or_anothers_is_refused_where_its_level_is_used(prepared, monkeypatch, unfit):
    tokenizer = generators.load_glove_t5("tiny", 0.0, 0, Paths(prepared)).tokenizer
    monkeypatch.setitem(DIMENSIONS, "int", replace(DIMENSIONS["int"], marks=unfit))
    with pytest.raises(UserError, match="the vocabulary lacks some of the words that serve as marks"):
        marks.require_words(tokenizer, {"emo": 2, "exp": 2, "int": 2})
    fit = replace(DIMENSIONS["int"], marks=("quiet", "know", "xqzzy"))
    monkeypatch.setitem(DIMENSIONS, "int", fit)
    marks.require_words(tokenizer, {"emo": 2, "exp": 2, "int": 2})  # no reply shows its third level


def test_a_target_between_two_levels_is_told_as_the_nearer_one():
    known = {"emo": 2, "exp": 3, "int": 2}
    assert of_target({"emo": 0.6, "exp": 1.7, "int": 0.4}, known) == {"emo": 1, "exp": 2, "int": 0}


def test_a_run_that_was_told_marks_notes_the_labels_that_they_are_of(trained_copy):
    """Else labels that were made anew meanwhile are no other training."""
    flags = "--size tiny --max-steps 1 --batch-size 4 --src-len 20 --tgt-len 4 --no-predict --device cpu"
    none = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --control marks --name run"
    train_glove_t5.main(["--workdir", str(trained_copy), *flags.split(), *none.split()])
    folder = Paths(trained_copy).saved / "glove-t5" / "run"
    assert "labels train" in json.loads((folder / "sources.json").read_text())
    assert "labels train" in json.loads((folder / "args.json").read_text())["inputs"]
