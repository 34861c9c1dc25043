"""What people do with trained models: score.py, retrieve.py, respond.py, and the objects beneath them."""

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import chat_ids
from safetensors.torch import load_file, save_file
from test_causal_models import CHATML, make_tokenizer, save_llama

import bundled
import conversation
import distress
import dpr_exemplar_retriever
import models
import respond
import retrieve
import sampling
import score
import scoring
import searching
import storage
import systems
import train_glove_t5
from causal_models import CausalGenerator, example_nll
from chats import SYSTEM, causal_data, chat_format
from corpora import Example, listener_turns
from critics import Critic, Score, find_critics, unread
from dataloaders import encode, generator_data
from DPR.index import Index
from DPR.retriever import Retriever
from models import Generator, token_nll
from options import CRITICS, Paths, UserError
from pretrained import load_tokenizer
from responder import Answer, CausalWriter, Responder, mean_log_probability
from session import Session
from settings import Decoding, Weights, pick
from vocabulary import logits_nll

REPLIES = ["I am so sorry.", "What happened then?", "That is great news, you must be proud of it!"]
DIALOGUE = ("My dog ran away last night.", "Oh no!", "We looked for him at the lake.")


@pytest.fixture(scope="module")
def responder(home) -> Responder:
    paths = Paths(home)
    return Responder.from_pretrained(
        paths.saved / "glove-t5" / "exemplars",
        {kind: paths.critic(kind, "glove-t5") for kind in ("emo", "exp", "sentiment")},
        paths.saved / "dpr" / "empd",
        REPLIES,
        Session("cpu"),
        workdir=home,
    )


def test_a_glove_run_that_pools_exemplars_replies_where_no_data_are_prepared(workdir, tmp_path):
    """A folder that was taken elsewhere, or came from the hub: its words lie in it."""
    common = ["--workdir", str(workdir), "--device", "cpu"]
    dpr_exemplar_retriever.main([*common, "--match", "random", "--top-k", "2"])
    flags = "--size tiny --add-exemplars glove-t5 --exemplar-layers 1 --max-steps 1 --no-predict --name run"
    train_glove_t5.main([*common, *flags.split(), "--empathy-loss-w", "0", "--sentiment-loss-w", "0"])
    run = tmp_path / "taken"
    shutil.copytree(Paths(workdir).saved / "glove-t5" / "run", run)
    said = [
        Responder.from_pretrained(run, session=Session("cpu"), workdir=place).reply(DIALOGUE, 2, seed=1).reply
        for place in (workdir, tmp_path)
    ]
    assert said[0] and said[0] == said[1]


def test_a_pool_without_a_retriever_is_not_left_out_in_silence(home):
    with pytest.raises(UserError, match="both a retriever and a pool"):
        Responder.from_pretrained(Paths(home).saved / "glove-t5" / "exemplars", pool=REPLIES, workdir=home)


def test_a_text_by_itself_is_no_sequence_of_letters(responder):
    emo, retriever = responder.critics["emo"], responder.retriever
    assert emo.score("Hello", ["I fell"]) == emo.score(["Hello"], [["I fell"]])
    assert emo.score(pd.Series(["Hello"])) == emo.score(np.array(["Hello"])) == emo.score(["Hello"])
    assert retriever.search("I fell", "Oh no") == retriever.search(["I fell"], ["Oh no"])
    assert responder.reply("Hello", 1, seed=1) == responder.reply(["Hello"], 1, seed=1)


def test_what_an_object_cannot_do_is_one_line_with_the_remedy(responder, home):
    emo, retriever = responder.critics["emo"], responder.retriever
    bare = Responder(responder.writer, {}, None, None, responder.session)
    wrong = {
        r"--target joy: no such dimension; there are emo, exp, int, sentiment": lambda: responder.reply(
            ["Hi"], target={"joy": 1}
        ),
        r"--emotion happy: not known; the known ones are afraid, ": lambda: bare.reply(
            ["Hi"], emotion="happy"
        ),
        r"0 candidates: the best is chosen among one": lambda: responder.reply(["Hi"], 0),
        r"2 replies, 1 contexts; give the turns before each": lambda: emo.score(["Hi", "Oh"], [["I fell"]]),
        r"reply 1 \(from 0\) is None, no text; leave it out": lambda: emo.score(["Hi", None]),
        r"contexts: one text; give a list": lambda: emo.score(["Hi"], "I fell"),
        r"pool: replies.txt is one text; give a list": lambda: Responder.from_pretrained(
            Paths(home).saved / "glove-t5" / "exemplars", retriever=retriever, pool="replies.txt"
        ),
        r"context 1, turn 0 \(from 0\) is None, no text": lambda: emo.score(["Hi", "Oh"], [[], [None]]),
        r"reply 0 \(from 0\) holds half a character": lambda: emo.score(["a\ud800b"]),
        r"a pool needs replies": lambda: retriever.search(["Hi"], []),
        r"text 1 \(from 0\) is nan, no text": lambda: retriever.search(["Hi", float("nan")], REPLIES),
        r"1 emotions for 2 texts; give one for each": lambda: retriever.search(
            ["Hi", "Oh"], retriever.pool(["Oh no"], emotions=["sad"]), emotions=["sad"]
        ),
        r"emotions: one text; give a list": lambda: retriever.search(["Hi"], REPLIES, emotions="sad"),
        r"1 emotions for 2 replies": lambda: retriever.pool(["Oh", "No"], emotions=["sad"]),
        r"1 owners for 2 replies": lambda: retriever.pool(["Oh", "No"], owners=["x"]),
        r"-1 replies to each text": lambda: retriever.search(["Hi"], REPLIES, k=-1),
        r"turn 0 \(from 0\) is \{'text': 'Hi'\}, no text": lambda: responder.reply([{"text": "Hi"}]),
        r"target: 'emo=1' is a text; give levels": lambda: responder.reply(["Hi"], target="emo=1"),
        r"critics: .*: RUN": lambda: Responder.from_pretrained(
            Paths(home).saved / "glove-t5" / "exemplars", critics=Paths(home).saved / "empathy"
        ),
        r"holds no critic but a Generator; give the folder of a trained critic": lambda: (
            Critic.from_pretrained(Paths(home).saved / "glove-t5" / "exemplars")
        ),
    }
    for named, ask in wrong.items():
        with pytest.raises(UserError, match=named) as error:
            ask()
        assert "\n" not in str(error.value)


def test_what_a_notebook_hands_over_is_read(responder):
    emo, retriever = responder.critics["emo"], responder.retriever
    texts, said = pd.Series(["I fell", "I won"]), [["We met"], []]
    assert emo.score(texts, said) == emo.score(list(texts), [["We met"], float("nan")])  # an empty cell
    for empty in (None, pd.NA):
        assert emo.score(texts, [["We met"], empty]) == emo.score(list(texts), said)
    pool = retriever.pool(pd.Series(REPLIES))
    assert retriever.search(texts, pool) == retriever.search(np.array(texts), REPLIES)
    assert responder.reply("Hi", 1, seed=np.int64(3)).reply == responder.reply("Hi", 1, seed=3).reply


def test_exemplars_for_a_generator_that_reads_none_are_refused(home, responder, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(Paths(home).saved / "glove-t5" / "exemplars", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"exemplars": "none"}))
    with pytest.raises(UserError, match="plain: was trained without exemplars and reads none"):
        Responder.from_pretrained(folder, retriever=responder.retriever, pool=REPLIES, session=Session("cpu"))
    plain = Responder.from_pretrained(folder, session=Session("cpu"))
    with pytest.raises(UserError, match="plain: reads no exemplars, so no emotion restricts them"):
        plain.reply(["Hi"], 1, emotion="sad")


def run(script, home: Path, *words: str):
    return script.main(["--workdir", str(home), "--device", "cpu", *words])


# ------------------------------------------------------------------------------------------------------ score


def test_a_score_does_not_depend_on_the_texts_beside_it_and_depends_on_the_context(home):
    for kind in ("emo", "sentiment"):
        scorer = Critic.from_pretrained(Paths(home).critic(kind, "t5"), Session("cpu"))
        together = scorer.score(REPLIES, [DIALOGUE] * 3, batch_size=2)
        for text, found in zip(REPLIES, together, strict=True):
            (alone,) = scorer.score([text], [DIALOGUE])
            assert found.value == pytest.approx(alone.value, abs=1e-5)
            assert scorer.score([text])[0].value != pytest.approx(alone.value, abs=1e-7)
        assert scorer.score([]) == []


def test_a_level_comes_with_its_probabilities_and_what_it_means(home):
    scorer = Critic.from_pretrained(Paths(home).critic("exp", "glove-t5"), Session("cpu"))
    assert scorer.score_of([0.3, 0.7]) == Score(0.7, 1, (0.3, 0.7), "asks about what was told")
    assert scorer.score_of([0.2, 0.1, 0.7]).meaning == "asks about something in particular"
    assert scorer.score_of([0.2, 0.1, 0.7]).value == pytest.approx(1.5)
    sentiment = Critic.from_pretrained(Paths(home).critic("sentiment", "glove-t5"), Session("cpu"))
    found = [sentiment.score_of([v]).meaning for v in (-0.6, -0.06, -0.04, 0.0, 0.04, 0.06, 0.6)]
    assert found == ["negative"] * 2 + ["neutral"] * 3 + ["positive"] * 2  # VADER's borders


def test_what_of_a_reply_no_critic_reads_is_said(home, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("i am sorry\n\n" + "i am sorry " * 40 + "\n")
    run(score, home, "--input", str(tmp_path / "in.txt"), "--family", "glove-t5")
    said = capsys.readouterr().err
    assert re.search(
        r"note: 1 replies are longer than the \d+ tokens that [\w, ]+ reads?; .* in line 3\)", said
    )
    run(score, home, "i am sorry", "--family", "glove-t5")
    assert "longer than" not in capsys.readouterr().err
    scorer = Critic.from_pretrained(Paths(home).critic("emo", "glove-t5"), Session("cpu"))
    reads = scorer.critic.settings.reply_len
    whole, longer = " ".join(["sorry"] * reads), " ".join(["sorry"] * (reads + 1))
    assert unread({"emo": scorer}, [whole, longer])[0] == [1]
    pieces = load_tokenizer(Paths(home).t5_tiny)  # of which many make a word
    other = SimpleNamespace(critic=scorer.critic, tokenizer=pieces)
    for judges in ({"emo": scorer, "exp": other}, {"exp": other, "emo": scorer}):
        found, said = unread(judges, ["sorry", " ".join(["unspeakableness"] * (reads - 1)), longer])
        assert found == [1, 2] and f"1 replies are longer than the {reads} tokens that emo reads" in said
        assert f"2 replies are longer than the {reads} tokens that exp reads" in said


def test_a_csv_keeps_its_columns_and_an_empty_reply_gets_no_score(home, tmp_path, capsys):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('id,post,Response\n07,"My, dog",I am so sorry.\n08,,\n09,x,"He said ""no"""\n')
    words = ["--family", "glove-t5", "--input", str(source), "--context", "post", "--output", str(output)]
    run(score, home, *words)
    with open(output, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [r["id"] for r in rows] == ["07", "08", "09"] and rows[2]["Response"] == 'He said "no"'
    assert float(rows[0]["critic_emo_p0"]) + float(rows[0]["critic_emo_p1"]) == pytest.approx(1, abs=2e-4)
    assert rows[1]["critic_emo"] == rows[1]["critic_sentiment"] == ""
    scorer = Critic.from_pretrained(Paths(home).critic("emo", "glove-t5"), Session("cpu"))
    (expected,) = scorer.score(["I am so sorry."], [("My, dog",)])
    assert float(rows[0]["critic_emo_expected"]) == pytest.approx(expected.value, abs=1e-4)
    assert "1 replies are empty (the first in line 3)" in capsys.readouterr().err

    run(score, home, *words)
    assert "kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="another precision; add --overwrite"):
        run(score, home, *words, "--precision", "bf16")
    source.write_text(source.read_text() + "10,y,Hello\n")
    with pytest.raises(UserError, match="another input; add --overwrite"):
        run(score, home, *words)
    with pytest.raises(UserError, match="a column critic_emo already; choose another --prefix"):
        run(score, home, "--input", str(output), "--column", "response", "--family", "glove-t5")


def test_each_reply_is_scored_after_its_own_turns_where_one_before_it_is_empty(home, tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("post,reply\nMy dog died.,I am so sorry.\nHm.,\nI won.,Great!\n")
    real, asked = Critic.rows, []

    def rows(self, replies, contexts, *further):
        asked.append((list(replies), [tuple(turns) for turns in contexts]))
        return real(self, replies, contexts, *further)

    monkeypatch.setattr(Critic, "rows", rows)
    run(score, home, "--input", str(tmp_path / "in.csv"), "--context", "post", "--family", "glove-t5")
    read = (["I am so sorry.", "Great!"], [("My dog died.",), ("I won.",)])
    assert asked and all(found == read for found in asked)


def test_standard_input_is_scored_a_reply_a_line(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"I am so sorry.\n\nWhat happened?\n")))
    rows = run(score, home, "--family", "glove-t5", "--input", "-", "--context", "My dog died.")
    assert [row["text"] for row in rows] == ["I am so sorry.", "What happened?"]
    scorer = Critic.from_pretrained(Paths(home).critic("emo", "glove-t5"), Session("cpu"))
    (expected,) = scorer.score(["What happened?"], [("My dog died.",)])
    assert rows[1]["critic_emo_expected"] == pytest.approx(expected.value, abs=1e-4)
    assert "What happened?\n  emo " in capsys.readouterr().out


def test_a_levels_probability_stands_under_its_level_and_one_context_is_for_all_lines(home, tmp_path):
    (tmp_path / "in.txt").write_text("I am so sorry.\nWhat happened?\n")
    critic, output = Paths(home).critic("emo", "t5"), tmp_path / "out.csv"
    words = ["--emo", str(critic), "--input", str(tmp_path / "in.txt"), "--output", str(output)]
    run(score, home, *words, "--context", "My dog died.")
    rows = pd.read_csv(output)
    texts, scorer = ["I am so sorry.", "What happened?"], Critic.from_pretrained(critic, Session("cpu"))
    after, alone = scorer.score(texts, [("My dog died.",)] * 2), scorer.score(texts)
    for level in (0, 1):
        shown = rows[f"critic_emo_p{level}"].tolist()
        assert shown == pytest.approx([found.probabilities[level] for found in after], abs=1e-4)
    assert after[0].value != pytest.approx(alone[0].value, abs=2e-4)


def test_an_interrupted_scoring_goes_on_where_it_stopped(home, tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"n": n, "reply": f"{REPLIES[n % 3]} {n}"} for n in range(40)]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["--family", "glove-t5", "--input", str(source), "--output", str(output), "--batch-size", "2"]
    real, asked = Critic.rows, []

    def stops(self, *args, **kwargs):
        if self.kind == "int":
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Critic, "rows", stops)
    with pytest.raises(KeyboardInterrupt):
        run(score, home, *words)
    monkeypatch.setattr(Critic, "rows", real)
    forward = torch.nn.Module.__call__
    import models

    def counted(self, *args, **kwargs):
        if isinstance(self, models.Critic):
            asked.append(self.settings.kind)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    run(score, home, *words)
    assert set(asked) == {"int", "sentiment"}
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["n"] for r in found] == list(range(40)) and all(r["critic_int"] in (0, 1) for r in found)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.origin.json"}


def test_unknown_words_and_useless_critics_are_said(home, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(home / "saved" / "empathy", work / "saved" / "empathy")
    file = Paths(work).critic("emo", "glove-t5") / "result.json"
    result = json.loads(file.read_text())
    result["valid"] = result["baselines"]["majority"]
    file.write_text(json.dumps(result))
    run(score, work, "--family", "glove-t5", "Qwxz fghj I am sorry")
    shown = "".join(capsys.readouterr())
    assert "40% of these words are unknown to emo, exp, int" in shown
    assert "no better than guessing" in shown and "no sentiment critic" in shown


@pytest.mark.parametrize(("unknown", "said"), [(1, False), (2, True)])
def test_a_critic_is_doubted_where_more_than_a_tenth_of_the_words_are_unknown_to_it(
    home, tmp_path, capsys, unknown, said
):
    text = " ".join(["qwxz"] * unknown + ["sorry"] * (12 - unknown))
    run(score, home, "--family", "glove-t5", text, "--output", str(tmp_path / "out.csv"))
    shown = "".join(capsys.readouterr())
    assert ("of these words are unknown to emo, exp, int" in shown) == said


def test_a_broken_input_is_named_with_its_line(home, tmp_path):
    for name, content, named in (
        ("a.csv", "id,reply\n1,x\n2\n", r"a.csv, line 3: 1 columns, expected 2"),
        ("b.jsonl", '{"reply": "x"}\n{bad\n', r"b.jsonl, line 2: not readable as JSON"),
        ("c.csv", "id,words\n1,x\n", r"no column reply, .*; name one of id, words with --column"),
        (
            "d.jsonl",
            '{"id": "1", "turns": [{"text": "x"}]}\n',
            r"name one of id with --column \(lists, .*: turns",
        ),
        ("d.jsonl", '{"reply": 3}\n', r"d.jsonl, line 1: reply is '3', expected a text"),
        ("e.txt", "\n\n", r"e.txt: holds no rows"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=named):
            run(score, home, "--family", "glove-t5", "--input", str(tmp_path / name))
    with pytest.raises(UserError, match="--emo .*exemplars: holds no critic"):
        run(score, home, "--emo", str(Paths(home).saved / "glove-t5" / "exemplars"), "Hello")
    with pytest.raises(UserError, match="holds a critic of exp; give it with --exp"):
        run(score, home, "--emo", str(Paths(home).critic("exp", "t5")), "Hello")


def test_each_column_holds_what_its_title_says_of_each_reply(home, tmp_path):
    (tmp_path / "in.csv").write_text("n,reply\n0,I am so sorry.\n1,\n2,What happened then?\n3,Great news!\n")
    output, texts = tmp_path / "out.jsonl", ["I am so sorry.", "What happened then?", "Great news!"]
    words = ["--input", str(tmp_path / "in.csv"), "--output", str(output), "--batch-size", "2"]
    widths = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, asked, _: widths.append(len(asked[0])) if isinstance(module, models.Critic) else None
    )
    try:
        run(score, home, "--family", "t5", *words)
    finally:
        hook.remove()
    assert set(widths) == {1, 2}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row) for row in rows] == [list(rows[0])] * 4, "an empty reply has the columns, too"
    empty = rows.pop(1)
    assert {key: value for key, value in empty.items() if value is not None} == {"n": "1", "reply": ""}
    for kind in ("emo", "exp", "int", "sentiment"):
        found = Critic.from_pretrained(Paths(home).critic(kind, "t5"), Session("cpu")).score(texts)
        for row, said in zip(rows, found, strict=True):
            shown = {key: value for key, value in row.items() if key.startswith(f"critic_{kind}")}
            value = pytest.approx(said.value, abs=6e-5)
            if kind == "sentiment":
                assert shown == {"critic_sentiment": value}
                continue
            chances = {
                f"critic_{kind}_p{n}": pytest.approx(p, abs=6e-5) for n, p in enumerate(said.probabilities)
            }
            wanted = {f"critic_{kind}": said.level, f"critic_{kind}_meaning": said.meaning} | chances
            assert shown == wanted | {f"critic_{kind}_expected": value}


def test_scores_that_are_there_are_kept_for_the_same_question_alone(home, tmp_path):
    critic, source, output = tmp_path / "emo", tmp_path / "in.csv", str(tmp_path / "out.csv")
    shutil.copytree(Paths(home).critic("emo", "glove-t5"), critic)
    source.write_text("n,reply,said\n1,I am sorry.,My dog died.\n")
    words = ["--emo", str(critic), "--family", "none", "--input", str(source), "--output", output]
    assert run(score, home, *words) and run(score, home, *words) is None
    others = {
        "prefix": ["--prefix", "judged_"],
        "input": ["--column", "said"],
        "batch_size": ["--batch-size", "3"],
        "precision": ["--precision", "bf16"],
        "emo": ["--emo", str(Paths(home).critic("emo", "t5"))],
        "exp": ["--exp", str(Paths(home).critic("exp", "glove-t5"))],
    }
    for what, more in [*others.items(), ("input", ["--context", "said"])]:
        with pytest.raises(UserError, match=f"made with another {what}; add --overwrite"):
            run(score, home, *words, *more)
    source.write_text(source.read_text().replace("1,I", "2,I"))
    with pytest.raises(UserError, match="another input"):  # its other columns are copied
        run(score, home, *words)
    source.write_text(source.read_text().replace("2,I", "1,I"))
    weights = load_file(critic / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, critic / "model.safetensors")
    with pytest.raises(UserError, match="another emo"):
        run(score, home, *words)


def test_what_was_scored_of_another_input_before_an_interruption_is_not_taken_up(home, tmp_path, monkeypatch):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    words = ["--family", "glove-t5", "--input", str(source), "--output", str(output)]
    source.write_text("reply\nI am so sorry.\n")

    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_records", stops)
        with pytest.raises(KeyboardInterrupt):
            run(score, home, *words)
    source.write_text("reply\nWhat happened then?\n")
    (row,) = run(score, home, *words)
    (said,) = Critic.from_pretrained(Paths(home).critic("emo", "glove-t5"), Session("cpu")).score(
        ["What happened then?"]
    )
    assert row["critic_emo_expected"] == pytest.approx(said.value, abs=1e-4)


def test_a_reply_has_its_own_lines_on_the_terminal_and_its_own_values_as_json():
    emo = [Score(0.25, 0, (0.75, 0.25), "weak"), Score(1.7, 2, (0.1, 0.1, 0.8), "strong")]
    sentiment = [Score(0.0, None, (), "neutral"), Score(0.51239, None, (), "positive")]
    shown = scoring.terminal_table(["Oh.", "I am so sorry."], {"emo": emo, "sentiment": sentiment})
    assert shown.splitlines() == [
        "Oh.",
        "  emo           0  weak (probability of 0: 0.75 1: 0.25)",
        "  sentiment +0.00  neutral",
        "I am so sorry.",
        "  emo           2  strong (probability of 0: 0.10 1: 0.10 2: 0.80)",
        "  sentiment +0.51  positive",
    ]
    weak = {"value": 0.25, "level": 0, "probabilities": [0.75, 0.25], "meaning": "weak"}
    assert scoring.as_json(emo[0]) == weak
    assert scoring.as_json(sentiment[0]) == {"value": 0.0, "meaning": "neutral"}
    assert scoring.as_json(sentiment[1])["value"] == 0.5124
    assert scoring.as_json(Score(2 / 3, 1, (1 / 3, 2 / 3), ""))["probabilities"] == [0.3333, 0.6667]


def test_what_is_said_of_a_files_replies_names_their_lines_and_number(home, tmp_path, capsys):
    source, long = tmp_path / "in.csv", "i am sorry " * 40
    source.write_text(f"n,reply\n1,\n2,i am sorry\n3,{long}\n4,\n5,{long}\n")
    words = ["--family", "glove-t5", "--input", str(source), "--output", str(tmp_path / "out.csv")]
    run(score, home, *words)
    out, said = capsys.readouterr()
    assert "note: 2 replies are empty (the first in line 2)" in said
    assert "note: 2 replies are longer than" in said and "(the first in line 4)" in said
    assert "out.csv: 3 replies scored by emo, exp, int, sentiment" in out
    run(score, home, *words[:4])
    assert capsys.readouterr().out.startswith("i am sorry\n  emo ")
    source.write_text('n,reply\n1,\n2," "\n')
    with pytest.raises(UserError, match="in.csv: every reply is empty"):
        run(score, home, *words, "--overwrite")
    source.write_text("judged_sentiment,reply\n1,i am sorry\n")
    with pytest.raises(UserError, match="a column judged_sentiment already; choose another --prefix"):
        run(score, home, *words, "--overwrite", "--prefix", "judged_")


# --------------------------------------------------------------------------------------------------- retrieve


def test_search_is_the_inner_product_of_the_encoders_with_equal_texts_in_the_pools_order(home):
    retriever = Retriever.from_pretrained(Paths(home).saved / "dpr" / "empd", Session("cpu"))
    texts = [e.response for e in listener_turns(Paths(home).dialogues("train"))]
    pool = [*texts, *texts[:5]]
    asked = ["My dog died.", "I got the job!"]
    vectors = [
        retriever.encoders.embed(side, t, retriever.session, "")
        for side, t in (("question", asked), ("context", pool))
    ]
    for hits, query in zip(retriever.search(asked, pool, len(pool)), vectors[0], strict=True):
        assert [h.text for h in hits] == [pool[h.place] for h in hits]
        exact = vectors[1].astype(np.float64) @ query
        assert [h.score for h in hits] == pytest.approx(sorted(exact, reverse=True), rel=1e-6)
        places = [h.place for h in hits]
        assert all(places.index(n) < places.index(len(texts) + n) for n in range(5))
    own = retriever.search(asked[:1], ["a", "b"], 2, owners=["1"])
    assert len(own[0]) == 2  # a pool without conversations hides nothing


def test_a_pool_that_is_asked_again_is_not_laid_out_again(home, monkeypatch):
    retriever = Retriever.from_pretrained(Paths(home).saved / "dpr" / "empd", Session("cpu"))
    pool, built = retriever.pool(REPLIES), []
    monkeypatch.setattr("DPR.retriever.Index", lambda *a, **k: built.append(a) or Index(*a, **k))
    first = retriever.search(["My dog died."], pool, 2)
    assert retriever.search(["My dog died."], pool, 2) == first
    retriever.search(["I got the job!"], pool, 2)
    assert len(built) == 1


def test_one_pool_is_searched_as_a_whole_and_within_an_emotion(home):
    retriever = Retriever.from_pretrained(Paths(home).saved / "dpr" / "empd", Session("cpu"))
    pool = retriever.pool(REPLIES, emotions=["sad", "sad", "proud"])
    for emotions, found in ((None, REPLIES), (["proud"], REPLIES[2:]), (None, REPLIES)):
        [hits] = retriever.search(["My dog died."], pool, 3, emotions=emotions)
        assert {hit.text for hit in hits} == set(found)


def test_a_retriever_reads_as_many_tokens_as_it_was_trained_to_or_is_told(trained_copy):
    folder = Paths(trained_copy).saved / "dpr" / "empd"
    for side, length in (("question", 7), ("context", 5)):
        file = folder / f"{side}_encoder" / "0_BERT" / "sentence_bert_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_seq_length": length}))

    def lengths(**told) -> dict[str, int]:
        return Retriever.from_pretrained(folder, Session("cpu"), **told).encoders.lengths

    assert lengths() == {"question": 7, "context": 5}
    assert lengths(max_length=9) == {"question": 9, "context": 5}
    with pytest.raises(UserError, match="--max-length 9999: .* reads only 512 tokens"):
        lengths(max_length=9999)


def test_an_index_of_texts_is_not_taken_for_one_of_the_dialogues_that_they_answer(home, tmp_path, capsys):
    retriever = Retriever.from_pretrained(Paths(home).saved / "dpr" / "empd", Session("cpu"))
    file = tmp_path / "index.npz"
    for _ in range(2):
        retriever.pool(REPLIES, file)
        assert "made again" not in capsys.readouterr().err
    retriever.pool(["x"] * len(REPLIES), file, answering=REPLIES)
    assert "made again" in capsys.readouterr().err


def test_a_pool_by_context_holds_the_dialogues_that_its_replies_answer(trained_copy):
    paths, session = Paths(trained_copy), Session("cpu")
    retriever = Retriever.from_pretrained(paths.saved / "dpr" / "empd", session)
    turns = listener_turns(paths.dialogues("train"))
    pool = searching.training_pool(retriever, paths, "context")
    asked = retriever.encoders.embed("question", [" ".join(t.history) for t in turns], session, "")
    np.testing.assert_allclose(pool.vectors, asked, atol=1e-5)
    assert list(pool.texts) == [t.response for t in turns]


def test_a_pools_index_is_used_again_and_made_again_when_the_pool_changes(
    home, tmp_path, monkeypatch, capsys
):
    pool = tmp_path / "replies.txt"
    pool.write_text("I am so sorry.\n\nWhat happened?\nWell done!\n")
    output = tmp_path / "found.jsonl"
    run(retrieve, home, "--pool", str(pool), "--top-k", "2", "--output", str(output), "My dog died.")
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["text"] == "My dog died." and [e["rank"] for e in row["exemplars"]] == [1, 2]
    lines = pool.read_text().split("\n")
    assert all(lines[e["line"] - 1] == e["exemplar"] for e in row["exemplars"])

    embed, sides = Retriever.pool.__globals__["Encoders"].embed, []
    spy = lambda self, side, *args, **kw: (sides.append(side), embed(self, side, *args, **kw))[1]  # noqa: E731
    monkeypatch.setattr("DPR.retriever.Encoders.embed", spy)
    run(retrieve, home, "--pool", str(pool), "Hello")
    assert sides == ["question"]
    pool.write_text(pool.read_text() + "Tell me more.\n")
    run(retrieve, home, "--pool", str(pool), "--top-k", "4", "Hello")
    assert sides == ["question", "context", "question"]
    shown, said = capsys.readouterr()
    assert "it is made again" in said and "note" not in shown  # what was found may be piped on
    assert shown.count("Tell me more.  (line 5)") == 1

    (tmp_path / "asked.csv").write_text("text,score\nHello,1\n")
    words = ["--pool", str(tmp_path / "new.txt"), "--input", str(tmp_path / "asked.csv")]
    (tmp_path / "new.txt").write_text("I am so sorry.\n")
    with pytest.raises(UserError, match="has a column score already"):
        run(retrieve, home, *words, "--output", str(tmp_path / "out.csv"))
    with pytest.raises(UserError, match="none.txt: cannot be read"):
        run(retrieve, home, "--pool", str(tmp_path / "none.txt"), "Hello")
    with pytest.raises(UserError, match="found.jsonl: already there, made with another"):
        run(retrieve, home, *words, "--output", str(output))
    assert not (tmp_path / "new.txt.index.npz").exists()  # said before the pool is embedded
    (tmp_path / "replies.txt.index.npz.origin.json").unlink()
    with pytest.raises(UserError, match="no index of this program; move it"):
        run(retrieve, home, "--pool", str(pool), "Hello")


def test_a_small_pool_needs_no_faiss(home, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    (tmp_path / "p.csv").write_text("emotion,reply\nsad,Oh no.\njoyful,Well done!\nsad,\nsad,I am sorry.\n")
    found = run(retrieve, home, "--pool", str(tmp_path / "p.csv"), "--emotion", "sad", "My dog died.")
    assert {h.text for h in found[0]} == {"Oh no.", "I am sorry."}
    with pytest.raises(UserError, match="--emotion happy: not known; the known ones are joyful, sad"):
        run(retrieve, home, "--pool", str(tmp_path / "p.csv"), "--emotion", "happy", "My dog died.")


def test_a_reply_without_an_emotion_names_none(home, tmp_path):
    (tmp_path / "p.csv").write_text("emotion,reply\nsad,Oh no.\n,Well done!\nangry,I see.\n")
    words = ["--pool", str(tmp_path / "p.csv"), "My dog died."]
    with pytest.raises(UserError, match="--emotion happy: not known; the known ones are angry, sad$"):
        run(retrieve, home, *words, "--emotion", "happy")
    assert not list(tmp_path.glob("*.npz"))  # said before the pool is embedded
    assert {h.text for h in run(retrieve, home, *words)[0]} == {"Oh no.", "Well done!", "I see."}
    assert [h.text for h in run(retrieve, home, *words, "--emotion", "sad")[0]] == ["Oh no."]
    (tmp_path / "p.csv").write_text("emotion,reply\n,Oh no.\n,Well done!\n")
    with pytest.raises(UserError, match="the replies of this pool have no emotions"):
        run(retrieve, home, *words, "--emotion", "sad")


def test_a_search_reads_the_columns_and_takes_the_encoders_that_it_is_told(home, tmp_path):
    pool, asked = tmp_path / "p.csv", tmp_path / "asked.csv"
    pool.write_text("reply,better\nno,Oh no.\nno,Well done!\n")
    asked.write_text("text,post\nno,My dog died.\n")
    words = ["--pool", str(pool), "--column", "better", "--input", str(asked), "--question-column", "post"]
    folder, bert = str(Paths(home).saved / "dpr" / "empd"), str(home / "data" / "bert-tiny")

    def made(*run: str, **encoder: str) -> list:
        retriever = Retriever.from_pretrained(*run, session=Session("cpu"), **encoder)
        return retriever.search(["My dog died."], ["Oh no.", "Well done!"])

    with pytest.raises(UserError, match="no trained retriever; make it with: .*; or name one with --path"):
        run(retrieve, tmp_path, *words)  # in a workdir without a retriever of its own
    assert run(retrieve, tmp_path, *words, "--path", folder) == made(folder)
    cls, mean = (
        run(retrieve, tmp_path, *words, "--encoder", bert, "--pooling", pooling)
        for pooling in ("cls", "mean")
    )
    assert cls == made(encoder=bert) != mean == made(encoder=bert, pooling="mean")


def test_a_search_is_for_the_post_and_not_for_the_reply_that_stands_beside_it(home, tmp_path, capsys):
    pool, asked = tmp_path / "p.txt", tmp_path / "asked.csv"
    pool.write_text("Oh no.\nWell done!\n")
    asked.write_text("reply,post\nWell done!,My dog died.\n")
    run(retrieve, home, "--pool", str(pool), "--input", str(asked))
    said = capsys.readouterr()
    assert said.out.startswith("My dog died.\n") and "column post (--question-column)" in said.err
    asked.write_text("reply\nWell done!\n")
    run(retrieve, home, "--pool", str(pool), "--input", str(asked))
    said = capsys.readouterr()
    assert said.out.startswith("Well done!\n") and not said.err


def test_a_search_that_differs_in_one_flag_is_written_only_where_that_is_said(home, tmp_path, capsys):
    pool, asked, output = tmp_path / "p.csv", tmp_path / "asked.csv", tmp_path / "found.csv"
    pool.write_text("emotion,reply,better\nsad,Oh no.,I am sorry.\njoyful,Well done!,Great!\n")
    asked.write_text("question,post\nMy dog died.,I won.\n")
    words = ["--pool", str(pool), "--input", str(asked), "--output", str(output)]
    run(retrieve, home, *words)
    first = output.read_text()
    run(retrieve, home, *words)
    assert "kept" in capsys.readouterr().out
    bert = str(home / "data" / "bert-tiny")
    for flag, value, named in (
        ("--top-k", "1", "top_k"),
        ("--emotion", "sad", "emotion"),
        ("--column", "better", "column"),
        ("--question-column", "post", "questions"),
        ("--encoder", bert, "encoders"),
    ):
        with pytest.raises(UserError, match=f"found.csv: already there, made with another {named}"):
            run(retrieve, home, *words, flag, value)
    assert output.read_text() == first
    pool.write_text(pool.read_text() + "sad,Tell me more.,Go on.\n")
    with pytest.raises(UserError, match="made with another pool"):
        run(retrieve, home, *words)
    run(retrieve, home, *words, "--overwrite")
    assert "Tell me more." in output.read_text()


def test_a_found_reply_is_named_by_its_own_line_where_empty_ones_are_left_out(home, tmp_path, capsys):
    pool, output = tmp_path / "p.csv", tmp_path / "found.csv"
    pool.write_text("id,reply\n1,Oh no.\n2,\n3,Well done!\n")
    [hits] = run(retrieve, home, "--pool", str(pool), "My dog died.")
    shown, said = capsys.readouterr()
    assert "Oh no.  (line 2)" in shown and "Well done!  (line 4)" in shown
    assert "1 replies are empty, the first in line 3 (column reply)" in said
    run(retrieve, home, "--pool", str(pool), "--output", str(output), "My dog died.")
    rows = pd.read_csv(output).sort_values("line")
    assert rows["exemplar"].tolist() == ["Oh no.", "Well done!"] and rows["line"].tolist() == [2, 4]
    scores = [hit.score for hit in sorted(hits, key=lambda hit: hit.place)]
    assert rows["score"].tolist() == pytest.approx(scores, abs=1e-4)


def test_a_file_where_an_index_would_lie_is_replaced_where_that_is_said(home, tmp_path):
    (tmp_path / "p.txt").write_text("Oh no.\nWell done!\n")
    (tmp_path / "p.txt.index.npz").write_text("somebody's own")
    with pytest.raises(UserError, match="no index of this program; move it, or add --overwrite"):
        run(retrieve, home, "--pool", str(tmp_path / "p.txt"), "Hello")
    assert run(retrieve, home, "--pool", str(tmp_path / "p.txt"), "Hello", "--overwrite")


def test_an_empty_question_is_named_with_its_line_before_anything_is_searched(home, tmp_path):
    (tmp_path / "p.txt").write_text("Oh no.\n")
    (tmp_path / "asked.csv").write_text("id,text\n1,Hello\n2,\n")
    words = ["--pool", str(tmp_path / "p.txt"), "--input", str(tmp_path / "asked.csv")]
    with pytest.raises(UserError, match=r"asked.csv, line 3: an empty text has no exemplars; take it out"):
        run(retrieve, home, *words)
    assert not (tmp_path / "p.txt.index.npz").exists()


# ---------------------------------------------------------------------------------------------------- respond


def test_a_candidates_log_probability_is_the_models_own_of_that_reply(home, monkeypatch):
    """By teacher forcing of the tokens that were drawn."""
    folder = Paths(home).saved / "glove-t5" / "exemplars"
    responder = Responder.from_pretrained(folder, session=Session("cpu"), workdir=home)
    drawn, real = [], Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda *args, **kw: (drawn.append(real(*args, **kw)), drawn[-1])[1]
    )
    answer = responder.reply(DIALOGUE, n_candidates=6, seed=0)
    tokenizer, model = load_tokenizer(folder), Generator.from_pretrained(folder)
    expected, end_id = {}, tokenizer.eos_token_id
    for row in drawn[0].sequences[:, 1:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        example = Example("a", 4, "", DIALOGUE, "")
        batch = generator_data([example], tokenizer, src_len=40, tgt_len=None).collate([0])
        batch["labels"] = torch.tensor([row[:end]])
        with torch.no_grad():
            nll = token_nll(model(batch), batch["labels"])
        text = " ".join(tokenizer.decode(row[:end], skip_special_tokens=True).split())
        expected[text] = -float(nll.mean())
    assert {c.text: c.log_probability for c in answer.candidates} == pytest.approx(expected, abs=1e-4)
    batch["labels"] = torch.tensor([[*tokenizer("i see .", add_special_tokens=False)["input_ids"], end_id]])
    with torch.no_grad():
        nll = token_nll(model(batch), batch["labels"])
        given = responder.writer.log_probability(DIALOGUE, [], "i see .")
    assert given == pytest.approx(-float(nll.mean()), abs=1e-4)


def test_what_stands_after_the_end_of_a_reply_does_not_count():
    each = torch.tensor([[-1.0, -3.0, -50.0, -50.0], [-1.0, -2.0, -3.0, -4.0], [-6.0, -50.0, -50.0, -50.0]])
    ended = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert mean_log_probability(each, ended) == [-2.0, -2.5, -6.0]


def test_a_seed_gives_the_same_reply_whatever_was_drawn_before(responder):
    first = responder.reply(DIALOGUE, seed=5)
    torch.rand(7)
    state = torch.get_rng_state()
    again = responder.reply(DIALOGUE, seed=5)
    assert again == first and torch.equal(torch.get_rng_state(), state)
    free = responder.reply(DIALOGUE)
    assert responder.reply(DIALOGUE, seed=free.seed) == free
    assert len({responder.reply(DIALOGUE, seed=n).reply for n in range(4)}) > 1


def test_the_reply_is_the_likeliest_candidate_or_the_nearest_to_the_target(responder):
    plain = responder.reply(DIALOGUE, n_candidates=12, seed=1)
    assert plain.reply == max(plain.candidates, key=lambda c: c.log_probability).text
    assert len(plain.candidates) == 12 and plain.scores.keys() == {"emo", "exp", "sentiment"}
    for level in (0, 1):
        aimed = responder.reply(DIALOGUE, n_candidates=12, seed=1, target={"emo": level})
        assert {c.text for c in aimed.candidates} == {c.text for c in plain.candidates}
        for c in aimed.candidates:
            assert c.total == pytest.approx(c.log_probability - 5 * abs(c.scores["emo"].value - level))
        totals = [c.total for c in aimed.candidates]
        assert totals == sorted(totals, reverse=True)
    mood = responder.reply(DIALOGUE, n_candidates=12, seed=1, target={"sentiment": 1}).candidates[0]
    assert mood.total == pytest.approx(mood.log_probability - 5 * (1 - mood.scores["sentiment"].value) / 2)


def test_weights_of_the_choice_count(responder):
    only_target = Responder(
        responder.writer, responder.critics, None, None, responder.session, Weights(likelihood=0)
    )
    found = only_target.reply(DIALOGUE, n_candidates=12, seed=1, target={"exp": 0})
    assert found.scores["exp"].value == min(c.scores["exp"].value for c in found.candidates)
    assert Weights(1, 5, 2).total(-1.0, {"emo": 0.5, "sentiment": 0.5}) == -1 - 5 / 2 - 2 / 2


def test_an_empty_candidate_is_never_the_reply(responder, monkeypatch):
    written = [("", -0.1), ("Sorry.", -2.0)]
    monkeypatch.setattr(type(responder.writer), "generate", lambda *_: written)
    assert [c.text for c in responder.reply(DIALOGUE, 2, seed=0).candidates] == ["Sorry."]
    written.pop()
    with pytest.raises(UserError, match="every candidate was empty"):
        responder.reply(DIALOGUE, 2, seed=0)


def test_exemplars_enter_the_generator(responder):
    found = responder.reply(DIALOGUE, seed=2)
    assert {h.text for h in found.exemplars} == set(REPLIES)
    with pytest.raises(UserError, match="the replies of this pool have no emotions"):
        responder.reply(DIALOGUE, emotion="sad")
    without = Responder(responder.writer, responder.critics, None, None, responder.session)
    other = without.reply(DIALOGUE, seed=2)
    assert (
        other.exemplars == [] and other.candidates[0].log_probability != found.candidates[0].log_probability
    )


def test_exemplars_scores_and_unknown_words_are_of_the_whole_dialogue(responder, home):
    critic, retriever = Critic.from_pretrained(Paths(home).critic("emo", "t5")), responder.retriever
    made = Responder(responder.writer, {"emo": critic}, retriever, responder.pool, responder.session)
    answer = made.reply(DIALOGUE, 2, seed=0)
    asked = [" ".join(DIALOGUE), DIALOGUE[-1]]
    whole, last = retriever.search(asked, responder.pool, responder.writer.top_exemplars)
    assert answer.exemplars == whole != last
    after, alone = critic.score([answer.reply] * 2, [DIALOGUE, ()])
    assert answer.scores["emo"].value == pytest.approx(after.value, abs=1e-6)
    assert answer.scores["emo"].value != pytest.approx(alone.value, abs=1e-6)
    assert "qwxz" in made.reply(["Qwxz!", "Hm", "Hello"], 1, seed=0).unknown


def test_seed_0_is_a_seed_and_without_one_each_reply_has_its_own(responder):
    first = responder.reply(DIALOGUE, 2, seed=0)
    assert first.seed == 0 and responder.reply(DIALOGUE, 2, seed=0) == first
    assert len({responder.reply(DIALOGUE, 1).seed for _ in range(3)}) > 1


def test_what_a_dialogue_loses_is_counted(responder):
    writer = responder.writer
    assert writer.settings.src_len == 40
    assert writer.unread(["hello there"]) == 0
    assert writer.unread(["a " * 39]) == 0  # with its end as many as are read
    assert writer.unread(["a " * 40]) == writer.unread(["a " * 50]) == 1
    assert writer.unread(["a " * 10, "b " * 18, "c " * 19]) == 1  # 19 + 1 and 18 + 1 fit, no whole turn more
    assert writer.unread(["a", "b " * 18, "c " * 25]) == 2


def test_what_a_long_dialogue_loses_is_said(responder, capsys):
    said, turns = talk(responder, "Hello", "and " * 50)
    assert said[-2] == "note: the dialogue is long; its oldest 3 turns were left out or cut"
    assert said[-1].startswith("note: words that this generator does not know: ")
    assert len(turns) == 4
    options = pick(conversation.RespondOptions, respond.parse_args([]))
    conversation.once(responder, ["Hello", "Hi", "and " * 38 + "so"], options)
    assert "its oldest 2 turns were left out or cut" in capsys.readouterr().err


def test_of_many_unknown_words_the_first_are_named_and_that_there_are_more():
    def note(words: list[str]) -> str:
        [said] = Answer("Hm.", [], [], 0, None, 0, words).notes
        return said.partition(": ")[2]

    assert note([*"abcde"]) == "a, b, c, d, e" and note([*"abcdef"]) == "a, b, c, d, e ..."


def test_the_flags_of_a_choice_and_of_decoding_arrive(home):
    words = ["--run", str(home / "saved" / "glove-t5" / "exemplars"), "--workdir", str(home)]
    words += (
        "--likelihood-w 0.25 --empathy-w 7 --sentiment-w 3 --top-p 0.6 --top-k 4 --temperature 0.5".split()
    )
    options = pick(conversation.RespondOptions, respond.parse_args([*words, "--max-new-tokens", "9"]))
    opened = conversation.open_responder(options, {}, Paths(home), Session("cpu"))
    assert opened.weights == Weights(0.25, 7.0, 3.0)
    assert opened.decoding == Decoding(4, 0.5, 9, top_p=0.6)


@pytest.mark.parametrize("turns", [(), ("a", "b"), ("a", " ", "c")])
def test_turns_that_no_reply_is_written_to_are_refused(responder, turns):
    with pytest.raises(UserError, match="turns"):
        responder.reply(turns)


def test_a_causal_language_model_serves_through_the_same_interface(home, tmp_path, monkeypatch):
    base = save_llama(tmp_path / "llama", make_tokenizer(CHATML))
    model = CausalGenerator.start(
        base, rank=2, cache=tmp_path, exemplars="prepend", src_len=60, exemplar_len=200
    )
    model.save_pretrained(tmp_path / "run", half=False)
    responder = Responder.from_pretrained(
        tmp_path / "run",
        {"emo": Paths(home).critic("emo", "t5")},
        Paths(home).saved / "dpr" / "empd",
        REPLIES,
        Session("cpu"),
        workdir=tmp_path,
    )
    assert isinstance(responder.writer, CausalWriter)
    answer = responder.reply(DIALOGUE, n_candidates=5, seed=3, target={"emo": 1})
    assert answer == responder.reply(DIALOGUE, n_candidates=5, seed=3, target={"emo": 1})
    spaced = [text.replace(" ", " \n ") for text in DIALOGUE]
    assert answer == responder.reply(spaced, n_candidates=5, seed=3, target={"emo": 1})
    assert len(answer.exemplars) == 3 and answer.scores.keys() == {"emo"}

    writer = responder.writer
    # the shortest reply there is
    ends = torch.tensor([writer.model.chat.end_id] * 2)
    monkeypatch.setattr(sampling, "choose", lambda logits, draws, decoding: ends)
    ((_, found), _) = writer.generate(writer.encode(DIALOGUE, REPLIES), 2, responder.decoding)
    example = Example("a", 4, "", DIALOGUE, "")
    gold = causal_data(
        [example], writer.tokenizer, packed=False, exemplars=[REPLIES], **writer.settings.layout
    )
    batch = gold.collate([0])
    with torch.no_grad():
        nll = example_nll(logits_nll(writer.model(batch), batch["target_ids"]), batch)
    assert found == pytest.approx(-float(nll[0]), abs=1e-4)
    assert writer.unread(DIALOGUE) > 0 and writer.unread(["Hi."]) == 0

    said = Example("a", 4, "", DIALOGUE, "I am so sorry to hear that.")
    layout = writer.settings.layout | {"tgt_len": None}
    whole = causal_data([said], writer.tokenizer, packed=False, exemplars=[REPLIES], **layout).collate([0])
    with torch.no_grad():
        nll = logits_nll(writer.model(whole), whole["target_ids"]).mean()
        given = writer.log_probability(DIALOGUE, REPLIES, said.response)
        assert given == pytest.approx(-float(nll), abs=1e-5)
        assert given != pytest.approx(writer.log_probability(DIALOGUE, [], said.response), abs=1e-5)


def test_what_a_dialogue_loses_to_a_language_model_is_counted(tmp_path):
    base = save_llama(tmp_path / "llama", make_tokenizer(CHATML))
    CausalGenerator.start(base, rank=2, cache=tmp_path).save_pretrained(tmp_path / "run")
    writer, turns = CausalWriter(tmp_path / "run", Session("cpu"), Paths(tmp_path)), [*DIALOGUE, "Ah.", "Hm."]
    chat = chat_format(writer.tokenizer)
    parts = encode(writer.tokenizer, [chat.opening + SYSTEM, chat.after_system], controls=True)
    fixed = sum(map(len, parts.values()))
    for first, less in ((0, 2), (2, 4), (4, 5)):  # what just fits, and one token less
        room = len(chat_ids(writer.tokenizer, turns[first:])) - fixed
        for src_len, lost in ((room, first), (room - 1, less)):
            writer.settings = replace(writer.settings, src_len=src_len)
            assert writer.unread(turns) == lost


def test_a_responder_replies_as_the_terminal_does_where_nothing_is_asked_for(home):
    run = home / "saved" / "glove-t5" / "exemplars"
    options = pick(conversation.RespondOptions, respond.parse_args(["--run", str(run)]))
    opened = conversation.open_responder(options, {}, Paths(home), Session("cpu"))
    made = Responder.from_pretrained(run, session=Session("cpu"), workdir=home)
    assert (made.weights, made.decoding) == (opened.weights, opened.decoding)
    assert len(made.reply("Hi", seed=1).candidates) == options.candidates_per_reply


def test_each_call_draws_a_reply_of_its_own_and_shows_its_seed(responder, capsys):
    options = pick(conversation.RespondOptions, respond.parse_args(["--candidates-per-reply", "1"]))
    seeds = [conversation.once(responder, ["Hello."], options).seed for _ in range(3)]
    assert len(set(seeds)) > 1 and f"best of 1, seed {seeds[-1]}" in capsys.readouterr().out


def test_a_reply_is_computed_in_the_precision_that_is_asked_for(home, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "MINI", tmp_path / "none")
    words = ["--run", str(home / "saved" / "glove-t5" / "exemplars"), "Hello.", "--seed", "1"]
    words += ["--candidates-per-reply", "1"]
    likely = [
        run(respond, tmp_path, *words, "--precision", precision).candidates[0].log_probability
        for precision in ("fp32", "bf16")
    ]
    assert likely[0] != likely[1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no trained generator; give the folder of a finished run, .*make one with: .*train_t5.py"),
        (
            {"args.json": "{}", "environment.json": '{"command": "train_t5.py --name run"}'},
            "not finished; the command that began it goes on with it: train_t5.py --name run$",
        ),
        ({"config.json": '{"model": "Critic", "heads": ["emo", "exp"]}'}, "takes it with --emo or --exp$"),
    ],
    ids=["empty", "begun", "a critic of two dimensions"],
)
def test_a_folder_without_a_generator_is_told_by_what_it_holds(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        Responder.from_pretrained(tmp_path, session=Session("cpu"))


GENERATOR = "saved/glove-t5/exemplars"


def test_a_reply_is_shown_with_what_it_came_from(home, capsys):
    words = [DIALOGUE[0], "--seed", "3", "--emotion", "sad"]
    answer = run(respond, home, *words)
    shown, said = capsys.readouterr()
    assert shown.splitlines()[0] == answer.reply and "best of 8, seed 3" in shown
    assert f"exemplar {answer.exemplars[0].score:8.3f}  {answer.exemplars[0].text}" in shown
    assert "exp " in shown and "sentiment " in shown
    assert said.count("English only") == 1 and distress.NOTICE not in said
    sad = {e.response for e in listener_turns(Paths(home).dialogues("train")) if e.emotion == "sad"}
    assert {h.text for h in answer.exemplars} <= sad
    assert run(respond, home, *words).reply == answer.reply


def test_an_emotion_that_nobody_has_is_refused_before_what_takes_long(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Retriever, "pool", lambda *args, **kwargs: pytest.fail("the replies are embedded"))
    (tmp_path / "p.csv").write_text("emotion,reply\nsad,Oh no.\nangry,I see.\n")
    for more, known in (
        ([], "angry, apprehensive, .*"),
        (["--pool", str(tmp_path / "p.csv")], "angry, sad$"),
    ):
        with pytest.raises(UserError, match=f"--emotion happy: not known; the known ones are {known}"):
            run(respond, home, "Hello.", *more, "--emotion", "happy")


def test_ids_are_kept_and_a_bad_line_is_named_while_the_rest_goes_on(home, tmp_path, capsys):
    lines = [
        "My dog ran away.",
        json.dumps(["Hi.", "Hello."]),
        json.dumps({"id": "b7", "turns": list(DIALOGUE)}),
        "{bad",
        "",
        json.dumps({"turns": ["I got the job!"]}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "out.jsonl"
    words = ["--file", str(tmp_path / "in.jsonl"), "--output", str(output), "--seed", "1"]
    with pytest.raises(UserError, match="2 of 5 lines had no reply: 2, 4; all the others"):
        run(respond, home, *words)
    said = capsys.readouterr().err
    assert "in.jsonl, line 2: 2 turns: the last must be the speaker's" in said
    assert "in.jsonl, line 4: not readable as JSON" in said
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["id"] for r in rows] == [1, 2, "b7", 4, 6]
    assert ["error" in r for r in rows] == [False, True, False, True, False]
    assert run(respond, home, *DIALOGUE, "--seed", "1").reply == rows[2]["reply"]  # as by itself
    with pytest.raises(UserError, match="already there; add --overwrite"):
        run(respond, home, *words)
    (tmp_path / "in.jsonl").write_text(json.dumps({"turns": "I passed!"}) + "\n")
    with pytest.raises(UserError, match="none.jsonl: not written, since no line had a reply"):
        run(respond, home, *words[:2], "--output", str(tmp_path / "none.jsonl"))
    assert "each a plain text" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()
    (tmp_path / "in.jsonl").write_text(json.dumps({"turns": ["I passed!"]}, indent=1))
    with pytest.raises(UserError, match="in.jsonl: one JSON over several lines; write each dialogue on one"):
        run(respond, home, *words[:2])


def test_dialogues_are_answered_as_they_stand_in_other_peoples_files(home, tmp_path, capsys):
    roles = [("system", "Be kind."), ("assistant", "Hi!"), ("user", DIALOGUE[0]), ("assistant", DIALOGUE[1])]
    roles += [("user", part) for part in DIALOGUE[2].split(" ", 1)]
    own = [{"speaker": "Lea" if n == 1 else "Ben", "text": text} for n, text in enumerate(DIALOGUE)]
    lines = [
        {"id": 7, "turns": own},
        {"messages": [{"role": role, "content": text} for role, text in roles]},
        {"conversations": [{"from": role, "value": text} for role, text in roles]},
        {"turns": own[:2]},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--file", str(tmp_path / "in.jsonl"), "--seed", "1", "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(UserError, match="1 of 5 lines had no reply: 4"):
        run(respond, home, *words)
    assert "line 4: 2 turns: the last must be the speaker's" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == [7, 2, 3, 4, 5] and [r["line"] for r in rows] == [1, 2, 3, 4, 5]
    answer = run(respond, home, *DIALOGUE, "--seed", "1").reply
    assert [r.get("reply") for r in rows[:4]] == [answer] * 3 + [None] and rows[4]["reply"]


def test_a_file_without_a_dialogue_is_no_work_that_was_done(home, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(UserError, match="in.jsonl: there is no dialogue to reply to"):
        run(respond, home, "--file", str(tmp_path / "in.jsonl"))


def test_interrupted_replies_to_a_file_are_kept_and_the_same_command_goes_on(home, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("My dog ran away.\nI got the job!\n{bad\nI am so tired.\n")
    output = tmp_path / "out.jsonl"
    words = [
        "--file",
        str(tmp_path / "in.txt"),
        "--output",
        str(output),
        "--seed",
        "1",
        "--max-new-tokens",
        "6",
    ]
    real, asked = Responder.reply, []

    def stops_at(most: int):
        def reply(self, turns, *args, **kwargs):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(turns[-1])
            return real(self, turns, *args, **kwargs)

        return reply

    monkeypatch.setattr(Responder, "reply", stops_at(2))
    with pytest.raises(KeyboardInterrupt):
        run(respond, home, *words)
    assert not output.exists() and len(asked) == 2
    monkeypatch.setattr(Responder, "reply", stops_at(3))
    with pytest.raises(UserError, match="1 of 4 lines had no reply: 3; all the others"):
        run(respond, home, *words)
    assert asked == ["My dog ran away.", "I got the job!", "I am so tired."]
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [1, 2, 3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"in.txt", "out.jsonl", "out.jsonl.origin.json"}


def test_standard_input_is_answered_with_json_and_nothing_else(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"My dog ran away.\n")))
    run(respond, home)
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["id"] == 1 and row["reply"]


def test_without_pool_and_critics_it_says_what_is_missing_and_replies(home, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(home / "saved" / "glove-t5", work / "saved" / "glove-t5")
    monkeypatch.setattr(bundled, "MINI", tmp_path / "none")
    answer = run(respond, work, "My dog ran away.")
    said = capsys.readouterr().err
    assert "no critics, so replies are chosen by likelihood alone" in said
    assert "no exemplars, which this generator reads: give replies with --pool FILE" in said
    assert answer.reply and answer.exemplars == [] and answer.scores == {}
    with pytest.raises(UserError, match="--target emo: there is no emo critic .* give one with --emo RUN"):
        run(respond, work, "Hello", "--target", "emo=1")
    with pytest.raises(
        UserError, match="--emotion, --encoder: there are no replies to search: .*--pool FILE"
    ):
        run(respond, work, "Hello", "--emotion", "sad", "--encoder", str(tmp_path))
    monkeypatch.setattr(bundled, "ADAPTER", tmp_path / "none")  # a copy without saved/
    with pytest.raises(UserError, match="no finished generator; make one with"):
        run(respond, tmp_path, "Hello")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--emotion happy", "--emotion happy: not known; the known ones are angry, "),
        ("--target emo=2", "--target emo=2: this critic knows values from 0 to 1"),
        ("--run saved/empathy/t5-exp", "a critic, not a generator; respond.py takes it with --exp"),
        ("--run saved/none", "no such folder; give the folder of a finished run"),
        (f"--emo {GENERATOR}", "--emo .*holds no critic"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(home, words, named):
    words = [str(home / w) if w.startswith("saved/") else w for w in words.split()]
    with pytest.raises(UserError, match=named) as error:
        run(respond, home, "Hello", *words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["emo=1,emo=0", "joy=1", "emo=3", "sentiment=-2", "emo", "emo=x"])
def test_an_impossible_target_is_refused_at_once(target, capsys):
    with pytest.raises(SystemExit):
        respond.parse_args(["Hello", "--target", target])
    said = capsys.readouterr().err
    named = ("emo, exp, int, sentiment", "must be", "named twice")
    assert f"--target {target}" in said and any(words in said for words in named)


def talk(responder: Responder, *lines: str, seed: int | None = None) -> tuple[list[str], list[str]]:
    """What a conversation of these lines shows, and its turns at the end."""
    asked = respond.parse_args([] if seed is None else ["--seed", str(seed)])
    options = pick(conversation.RespondOptions, asked)
    left, written = list(lines), []

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    spoken = conversation.Conversation(responder, options, read, written.append)
    spoken.run()
    return written[1:], spoken.turns


def test_the_generator_that_was_finished_last_replies(tmp_path):
    for name, finished in (("old", 1e9), ("new", 2e9), ("between", 1.5e9)):
        folder = tmp_path / "saved" / "t5" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model": "Generator"}')
        (folder / "result.json").write_text("{}")
        os.utime(folder / "result.json", (finished, finished))
    assert conversation.newest_generator(Paths(tmp_path)).name == "new"


def test_a_conversation_goes_on_is_taken_back_and_tried_again(responder):
    one, turns = talk(responder, "My dog ran away.", "", "At the lake.", seed=4)
    assert turns[::2] == ["My dog ran away.", "At the lake."] and one[0].startswith(turns[1])
    assert talk(responder, "My dog ran away.", "At the lake.", seed=4) == (one, turns)
    _, undone = talk(responder, "My dog ran away.", "At the lake.", "/undo", seed=4)
    assert undone == turns[:2]
    _, retried = talk(responder, "My dog ran away.", "At the lake.", "/retry", seed=4)
    assert retried[:3] == turns[:3] and retried[3] != turns[3]
    _, fresh = talk(responder, "My dog ran away.", "/reset", "Hello", seed=4)
    assert fresh[0] == "Hello" and len(fresh) == 2
    assert talk(responder, "/quit", "Hello")[1] == []


def test_a_conversations_mistakes_are_answered_and_it_goes_on(responder):
    lines = [
        "/retry",
        "/undo",
        "/nonsense",
        "/target joy=1",
        "/target int=1",
        "/target emo = 2",
        "/save",
        "/save talk.json",
        "Hello",
    ]
    said, turns = talk(responder, *lines)
    assert len(turns) == 2
    for text, named in zip(
        said,
        [
            "nothing to reply to",
            "nothing to take back",
            "there are /retry",
            "no dimension 'joy'",
            "no int critic",
            "/target emo=2: this critic knows values from 0 to 1",
            "name a file",
            "nothing was said yet",
        ],
        strict=False,
    ):
        assert named in text


def test_a_target_of_a_conversation_steers_its_replies(responder):
    values = {}
    for level in (0, 1):
        _, turns = talk(responder, f"/target exp={level}", "My dog ran away.", seed=4)
        values[level] = responder.critics["exp"].score([turns[1]], [("My dog ran away.",)])[0].value
    assert values[0] < values[1]


def test_a_saved_conversation_holds_its_turns(responder, tmp_path):
    file = tmp_path / "talk.json"
    said, turns = talk(responder, "My dog ran away.", f"/save {file}", f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved["turns"] == turns and saved["answers"][0]["reply"] == turns[1]
    assert "already there" in said[-1]
    _, turns = talk(responder, "My dog ran away.", "/retry", f"/save {tmp_path / 'again.json'}")
    saved = json.loads((tmp_path / "again.json").read_text())
    assert saved["turns"] == turns and [answer["reply"] for answer in saved["answers"]] == turns[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        talk(responder, "My dog ran away.", "/save ~/chat.md")
    assert "My dog ran away." in (tmp_path / "chat.md").read_text()


# --------------------------------------------------------------------------------------------------- distress


def test_the_notice_stands_before_anything_is_written(responder, home, monkeypatch, capsys):
    said, _ = talk(responder, "I want to kill myself.", "Thank you.")
    assert said[0] == distress.NOTICE and distress.NOTICE not in said[1:]
    heard = responder.reply(["He left.", "I want to kill myself.", "Who says so?"], 1, seed=0)
    assert heard.notice is None, "nobody is in distress by what a listener said"
    assert responder.reply(["I want to kill myself.", "Oh no!", "Thank you."], 1, seed=0).notice
    monkeypatch.setattr(Responder, "reply", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(respond, home, "I don’t want to live anymore.")
    assert distress.NOTICE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "acute"),
    [
        ("I have been thinking about suicide", True),
        ("I'd be better off dead.", True),
        ("i dont want to wake up tomorrow", True),
        ("There is no reason\nto live.", True),
        ("She took an overdose last night", True),
        ("I don\u00b4t want to live", True),
        ("i don`t want to wake up", True),
        ("thoughts of self\u2011harm", True),
        ("selfharm again", True),
        ("Last night I was cutting myself again", True),
        ("I ended my lifeguard course", False),
        ("I could have died of embarrassment", False),
        ("My dog died and I am so sad", False),
        ("I cut myself while cooking", False),
        ("That movie was killing it", False),
    ],
)
def test_words_of_acute_distress_are_told_from_sad_ones(text, acute):
    assert (distress.notice([text]) is not None) == acute


def test_a_run_that_is_damaged_does_not_stand_in_the_way_of_the_newest(tmp_path):
    for name, content in (("glove-t5/whole", '{"model": "Generator"}'), ("t5/damaged", '{"model": "Gen')):
        storage.write_text(tmp_path / "saved" / name / "config.json", content)
        storage.write_text(tmp_path / "saved" / name / "result.json", "{}")
    assert conversation.newest_generator(Paths(tmp_path)).name == "whole"
    with pytest.raises(UserError, match=r"damaged/config\.json: not a readable JSON file"):
        systems.refuse_other_models(tmp_path / "saved" / "t5" / "damaged")


def test_replies_that_a_call_of_another_seed_has_kept_are_not_taken_for_this_ones(
    home, tmp_path, monkeypatch
):
    (tmp_path / "in.txt").write_text("My dog ran away.\nI got the job!\n")
    output = tmp_path / "out.jsonl"
    words = ["--file", str(tmp_path / "in.txt"), "--output", str(output), "--max-new-tokens", "6"]
    real, asked = Responder.reply, []

    def stops(self, turns, *args, **kwargs):
        if asked:
            raise KeyboardInterrupt
        asked.append(turns[-1])
        return real(self, turns, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Responder, "reply", stops)
        run(respond, home, *words, "--seed", "1")
    run(respond, home, *words, "--seed", "2", "--target", "emo=1")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["seed"], row["target"]) for row in rows] == [(2, {"emo": 1.0})] * 2
    origin = storage.read_origin(output)  # what tells the files of two runs or targets apart
    assert origin["generator"].endswith(GENERATOR) and origin["asked"]["target"] == {"emo": 1}


def test_a_pools_index_is_made_again_for_other_encoders_and_for_fewer_tokens(home, tmp_path):
    for how in ({"pooling": "cls"}, {"pooling": "mean"}, {"pooling": "mean", "max_passage_length": 3}):
        how["encoder"] = str(Paths(home).bert_tiny)
        retriever = Retriever.from_pretrained(**how, session=Session("cpu"))
        kept = retriever.pool(REPLIES, tmp_path / "index.npz")
        assert np.array_equal(kept.vectors, retriever.pool(REPLIES).vectors), how


def test_words_of_acute_distress_are_heard_in_capitals_and_in_small_letters():
    for text in ("I wish I was dead.", "i wish i was dead.", "Suicidal thoughts all day.", "I WANT TO DIE"):
        assert distress.notice([text]) == distress.NOTICE, text


def test_the_notice_of_a_line_of_a_file_stands_before_its_reply_is_written(
    home, tmp_path, monkeypatch, capsys
):
    (tmp_path / "in.txt").write_text("Hello.\nI want to kill myself.\n", encoding="utf-8")
    replies = []

    def reply(self, turns, *args, **how):
        replies.append(turns)
        return 1 / (2 - len(replies))

    monkeypatch.setattr("conversation.as_row", lambda answer: {"reply": "Hi."})
    monkeypatch.setattr(Responder, "reply", reply)
    with pytest.raises(ZeroDivisionError):
        respond.main(["--workdir", str(home), "--device", "cpu", "--file", str(tmp_path / "in.txt")])
    assert f"in.txt, line 2: {distress.NOTICE}" in capsys.readouterr().err


def test_replies_that_were_kept_with_another_pool_or_critic_are_not_taken_for_this_ones(
    home, tmp_path, monkeypatch
):
    (tmp_path / "in.txt").write_text("My dog ran away.\nI got the job!\n", encoding="utf-8")
    real, asked = Responder.reply, []

    def reply(self, turns, *args, **how):
        asked.append(turns)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, turns, *args, **how)

    def answer(name: str, pool: str, family: str) -> None:
        (tmp_path / f"{name}.txt").write_text(pool, encoding="utf-8")
        common = ["--workdir", str(home), "--device", "cpu", "--seed", "1", "--max-new-tokens", "4"]
        files = [
            "--file",
            str(tmp_path / "in.txt"),
            "--output",
            str(tmp_path / f"{name}.jsonl"),
            "--overwrite",
        ]
        given = ["--pool", str(tmp_path / f"{name}.txt"), "--emo", str(Paths(home).critic("emo", family))]
        respond.main([*common, *files, *given])

    monkeypatch.setattr(Responder, "reply", reply)
    for name, pool, family, count in (
        ("same", "Oh no.\nWell done!\n", "t5", 3),
        ("pool", "I am sorry.\nGreat!\n", "t5", 4),
        ("critic", "Oh no.\nWell done!\n", "glove-t5", 4),
    ):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            answer(name, "Oh no.\nWell done!\n", "t5")
        answer(name, pool, family)
        assert len(asked) == count, name


def test_a_retriever_without_a_pool_is_not_left_out_in_silence(home):
    run, finder = Paths(home).saved / "glove-t5" / "exemplars", Paths(home).saved / "dpr" / "empd"
    with pytest.raises(UserError, match="exemplars need both a retriever and a pool"):
        Responder.from_pretrained(run, retriever=finder, session=Session("cpu"), workdir=home)


def test_nobody_gets_the_replies_of_the_conversation_that_is_named(home):
    retriever = Retriever.from_pretrained(Paths(home).saved / "dpr" / "empd", Session("cpu"))
    pool = retriever.pool(REPLIES, owners=["1", "2", "1"])
    found = retriever.search(["My dog died."] * 3, pool, 3, owners=["1", "2", "3"])
    assert [{hit.place for hit in hits} for hits in found] == [{1}, {0, 2}, {0, 1, 2}]


def test_a_reply_gets_as_many_exemplars_as_those_of_the_training(responder):
    pool = responder.retriever.pool([f"Reply number {n}." for n in range(9)])
    made = Responder(responder.writer, {}, responder.retriever, pool, responder.session)
    assert len(made.reply(DIALOGUE, 1, seed=0).exemplars) == responder.writer.top_exemplars < 9


def test_exemplars_in_use_are_found_as_those_of_the_training_were(home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(home / "saved" / "glove-t5" / "exemplars", run)
    config = json.loads((run / "config.json").read_text())
    words = ["--run", str(run), "--workdir", str(home)]
    options = pick(conversation.RespondOptions, respond.parse_args(words))
    for match in ("reply", "context"):
        (run / "config.json").write_text(json.dumps(config | {"match": match}))
        opened = conversation.open_responder(options, {}, Paths(home), Session("cpu"))
        expected = searching.training_pool(opened.retriever, Paths(home), match)
        assert np.array_equal(opened.pool.vectors, expected.vectors), match


def test_of_two_families_the_critics_of_the_first_serve(home):
    paths = Paths(home)
    for families in (["t5", "glove-t5"], ["glove-t5", "t5"]):
        found = find_critics(paths, families, {}, Session("cpu"))
        assert {k: c.folder for k, c in found.items()} == {k: paths.critic(k, families[0]) for k in CRITICS}


def test_what_is_taken_back_is_not_saved(responder, tmp_path):
    names = [str(tmp_path / name) for name in ("talk.json", "talk.md")]
    _, turns = talk(responder, "My dog ran away.", "At the lake.", "/undo", *(f"/save {n}" for n in names))
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["turns"] == turns and [answer["reply"] for answer in saved["answers"]] == turns[1:]
    assert "At the lake" not in (tmp_path / "talk.md").read_text()


def test_a_conversation_saved_to_read_has_critics_and_exemplars_beneath_each_reply(responder, tmp_path):
    talk(responder, "My dog ran away.", "At the lake.", f"/save {tmp_path / 'talk.md'}")
    blocks = (tmp_path / "talk.md").read_text().strip().split("\n\n")
    assert [block.split()[0] for block in blocks] == ["**You:**", "**Reply:**", "-"] * 2
    for block in blocks[2::3]:
        named = [line.split()[1] for line in block.splitlines()]
        assert named == ["emo", "exp", "sentiment", *["exemplar"] * 3]
