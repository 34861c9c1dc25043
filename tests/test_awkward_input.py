"""What people bring and do: each wrong thing is one plain message, and nothing is lost or read as another."""

import importlib
import io
import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import advice
import bundled
import control
import conversation
import dpr_exemplar_retriever
import evaluate_responses
import label_dialogues
import options
import own_dialogues
import probe_critics
import records
import reproduce
import respond
import retrieve
import score
import systems
import train_causal_lm
import train_empathy_classifier
import train_glove_t5
import train_t5
import turns
from DPR import train_dpr
from options import Paths, UserError
from records import read_records, write_records
from settings import pick

HERE = Path(__file__).resolve().parent.parent
BYTE = b"caf\xe9".decode("utf-8", "surrogateescape")  # as a terminal of another encoding gives it
MINI = [flag for kind in ("emo", "exp", "int") for flag in (f"--{kind}", str(bundled.MINI / kind))]


def test_what_was_never_prepared_is_named_with_the_command_that_makes_it(tmp_path, workdir):
    common = ["--device", "cpu", "--workdir", str(tmp_path)]
    sample = r"make it with: python prepare_data\.py .*; that is the bundled sample: --source names other"
    with pytest.raises(UserError, match=rf"train\.csv: no such file; {sample}"):
        dpr_exemplar_retriever.main([*common, "--match", "random"])
    with pytest.raises(UserError, match=r"train\.csv: no such file; make it with: python prepare_data\.py"):
        label_dialogues.main([*common, *MINI])
    next(workdir.rglob("valid_vader.csv")).unlink()
    with pytest.raises(UserError, match=r"valid_vader\.csv: no such file; make it with: "):
        label_dialogues.main([*common[:-1], str(workdir), *MINI])


def test_the_remedy_prepares_the_data_as_they_were_prepared(tmp_path):
    (tmp_path / "data").mkdir()
    note = {"source": "download", "levels": 3, "split": "grouped", "seed": 42, "glove": "package"}

    def remedy(**changes):
        (tmp_path / "data" / "prepared.json").write_text(json.dumps(note | changes))
        return advice.prepare(tmp_path)

    assert remedy().endswith("--source download --levels 3 --split grouped --glove package")
    assert remedy(levels=2, split="paper").endswith("--source download --glove package")
    assert remedy(levels=2, split="paper", glove="auto").endswith("--source download")
    assert remedy(levels=2, split="paper", source="sample", glove="auto").endswith("--source sample")
    assert remedy(glove="0" * 64).startswith("prepare_data.py --overwrite, and the --source")


def test_a_check_from_elsewhere_has_its_own_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = reproduce.parse_args(["--check", "emo-glove-t5", "--dry-run"])
    assert args.workdir == str(reproduce.HERE / "results" / "checks" / "emo-glove-t5")


def test_a_reply_that_is_null_is_empty_and_turns_may_have_speakers(tmp_path):
    file = tmp_path / "r.jsonl"
    turns = [{"role": "user", "content": "Hi."}, "And you?", {"speaker": "Ann", "text": " Fine. "}]
    file.write_text(f"{json.dumps({'reply': None, 'context': turns})}\n{json.dumps({'reply': 'Ah'})}\n")
    found = records.read_records(file)
    assert found.texts("reply") == ["", "Ah"]
    assert found.turns("context") == [("Hi.", "And you?", "Fine."), ()]


@pytest.mark.parametrize("name", ["r.csv", "r.tsv"])
def test_the_empty_cells_around_a_spreadsheets_table_are_no_part_of_it(tmp_path, name):
    text = "reply,n,,\nGood.,1,,\n,2,,\n,,,\n,,,\n"
    (tmp_path / name).write_text(text if name == "r.csv" else text.replace(",", "\t"))
    found = records.read_records(tmp_path / name)
    assert found.columns == ["reply", "n"] and found.texts("reply") == ["Good.", ""]
    (tmp_path / name).write_text('reply\n"Good."\n""\n')
    assert records.read_records(tmp_path / name).texts("reply") == ["Good.", ""]


@pytest.mark.parametrize("name", ["r.csv", "r.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_blank_row_of_a_single_column_keeps_its_place(tmp_path, capsys, name, end):
    """As spreadsheets save an empty cell; those below the last reply are no cells of the table."""
    (tmp_path / name).write_bytes(end.join(["reply", "Good.", "", "Bad.", "", ""]).encode())
    found = records.read_records(tmp_path / name)
    assert found.texts("reply") == ["Good.", "", "Bad."] and found.lines == [2, 3, 4]
    asked = ["--device", "cpu", "--input", str(tmp_path / name), "--output", str(tmp_path / "scored.csv")]
    score.main(asked)
    assert "1 replies are empty (the first in line 3)" in capsys.readouterr().err
    assert records.read_records(tmp_path / "scored.csv").texts("reply") == found.texts("reply")


def test_the_bundled_critics_label(workdir):
    label_dialogues.main(["--device", "cpu", "--workdir", str(workdir), *MINI, "--splits", "test"])
    assert next(workdir.rglob("test_labels.csv")).read_text().count("\n") == 15


def test_critics_that_read_no_context_say_so_where_one_is_given(capsys):
    score.main(["--device", "cpu", "--context", "My dog died.", "I am so sorry."])
    assert "emo, exp, int, sentiment: read replies alone; no context changes" in capsys.readouterr().err
    score.main(["--device", "cpu", "--context", " ", "I am so sorry."])
    assert "context" not in capsys.readouterr().err
    score.main(["--device", "cpu", "I am so sorry."])
    said = capsys.readouterr()
    assert "context" not in said.err and said.out.startswith("I am so sorry.")  # notes stand apart


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("r.json", '[\n  {"reply": "I am so sorry."}\n]\n', r"\.json is not read here; .*\.jsonl"),
        ("r.xlsx", "PK", r"\.xlsx is not read here"),
        ("r.csv", "reply;post\nI am sorry;My dog died\n", "its separator seems to be ';'"),
        ("r.csv", b"reply,pr\xe9nom\nso sorry,Bob\n", "line 1: not UTF-8"),
        (
            "r.txt",
            "I am sorry.\n".encode("utf-16"),
            r"r\.txt, line 1: .*it is UTF-16.*convert it with: iconv",
        ),
    ],
)
def test_a_file_that_is_no_list_of_texts_is_not_read_as_one(name, text, said, tmp_path):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        records.read_records(file)


def test_lines_that_are_left_out_are_counted(tmp_path, capsys):
    (tmp_path / "r.txt").write_text("I am sorry\n\n   \nGreat!\n")
    assert records.read_records(tmp_path / "r.txt").lines == [1, 4]
    assert "2 lines are empty and left out (the first: 2)" in capsys.readouterr().err


def test_bytes_of_another_encoding_are_refused_wherever_they_come_from(tmp_path):
    (tmp_path / "pool.txt").write_text("hello\n")
    with pytest.raises(UserError, match="'caf.': not UTF-8"):
        score.main(["--device", "cpu", BYTE])
    with pytest.raises(UserError, match="not UTF-8"):
        score.main(["--device", "cpu", "--context", BYTE, "hi"])
    with pytest.raises(UserError, match="not UTF-8"):
        conversation.check_turns([f"{BYTE} is nice"])


def test_no_output_takes_the_place_of_what_is_read(tmp_path, capsys):
    mine, table = tmp_path / "mine.jsonl", tmp_path / "p.csv"
    mine.write_text('{"turns": ["hi"]}\n')
    table.write_text("reply\nhello\n")
    for parse, words, said in (
        (respond.parse_args, ["--file", mine, "--output", mine], "that is the input"),
        (evaluate_responses.parse_args, [mine, "--exemplars", tmp_path], "no test_dpr.csv there"),
        (train_t5.parse_args, ["--resume", mine, "--overwrite"], "goes on; give one of them"),
        (respond.parse_args, ["--file", mine, "--output", tmp_path / "r.csv"], "must end in .jsonl"),
        (retrieve.parse_args, ["--pool", table, "--input", mine, "--output", table], "that is the input"),
        (retrieve.parse_args, ["--pool", "-", "hi"], "standard input has no place"),
        (retrieve.parse_args, ["--pool", table], "give either texts as arguments or a file with --input"),
        (retrieve.parse_args, ["--pool", table, "--input", mine, "hi"], "give either texts as arguments or"),
        (respond.parse_args, ["--file", mine, "hi"], "give either a dialogue as arguments or dialogues with"),
        (score.parse_args, ["--input", table, "--output", table], "that is the input"),
        (retrieve.parse_args, ["--pool", table, "--pooling", "mean", "hi"], "--pooling: goes with --encoder"),
        (train_dpr.parse_args, ["--encoder", "minilm", "--question-encoder", mine], "is for both sides"),
        (train_dpr.parse_args, ["--batch-tokens", "999"], "passages stand beside it: give --batch-size"),
        (dpr_exemplar_retriever.parse_args, ["--match", "random", "--path", mine], "compares nothing"),
        (respond.parse_args, ["--column", "x", "hi"], "--column: of --pool FILE"),
        (score.parse_args, ["--format", "csv", "hi"], "--format: of --input"),
        (probe_critics.parse_args, ["a", "--kinds", "emo", "--exp", "x"], "--exp: not among --kinds emo"),
        (evaluate_responses.parse_args, [mine, "--rating-mode", "ab"], "--rating-mode: of --rating-kit N"),
        (
            evaluate_responses.parse_args,
            [mine, "--rating-kit", "2", "--judges", "tfidf"],
            "--judges: of a table, and --rating-kit makes none",
        ),
        (evaluate_responses.parse_args, ["--ratings", mine, "--items", "last"], "--items: of systems"),
        (control.parse_args, ["a", "--ways", "marks", "--empathy-w", "9"], "--empathy-w: of ranking"),
    ):
        with pytest.raises(SystemExit):
            parse([*map(str, words), *(["--overwrite"] if "--output" in words else [])])
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="no table"):
        conversation.respond_to_file(None, str(table), None, None)


def test_a_conversation_on_a_terminal_has_no_output_which_is_said_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys
):
    asked = ["--output", str(tmp_path / "r.jsonl")]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert respond.parse_args(asked).output  # of standard input
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        respond.parse_args(asked)
    assert "is kept with its command /save FILE" in capsys.readouterr().err


def test_a_letter_that_the_terminal_lacks_is_shown_by_its_number(tmp_path, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # PYTHONIOENCODING=ascii
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", None)
    options.run(lambda: print("Ich f\u00fchle \u2639", flush=True))
    assert screen.buffer.getvalue() == b"Ich f\\xfchle \\u2639\n"
    # JSON knows no \x: there the letters are escaped as it does it
    monkeypatch.setattr("conversation.answer_line", lambda *_: {"reply": "Ich f\u00fchle \u2639"})
    (tmp_path / "in.txt").write_text("Hi\n")
    asked = pick(conversation.RespondOptions, respond.parse_args(["--file", str(tmp_path / "in.txt")]))
    conversation.respond_to_file(lambda: None, str(tmp_path / "in.txt"), None, asked)
    assert json.loads(screen.buffer.getvalue().splitlines()[1]) == {"reply": "Ich f\u00fchle \u2639"}


@pytest.mark.parametrize("words", [[], ["--output", "r.jsonl"], ["--file", "-"]])
def test_a_dialogue_is_not_read_where_there_is_no_standard_input(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)  # python respond.py <&-
    with pytest.raises(SystemExit):
        respond.parse_args(words)
    said = capsys.readouterr().err
    assert "no standard input; give the dialogue as arguments or --file" in said
    assert respond.parse_args(["Hello"]).turns and respond.parse_args(["--file", "mine.jsonl"]).file
    with pytest.raises(UserError, match="no standard input; give a file"):
        records.read_records("-")


def test_a_file_that_cannot_be_answered_is_refused_before_a_generator_is_opened(tmp_path):
    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    indented, kept = tmp_path / "a.jsonl", tmp_path / "kept.jsonl"
    indented.write_text('{\n  "turns": ["hi"]\n}\n')
    kept.write_text("mine\n")

    def opened():
        raise AssertionError("minutes of loading")

    for source, output in ((indented, None), (tmp_path / "t.txt", kept)):
        with pytest.raises(UserError):
            conversation.respond_to_file(opened, str(source), output and str(output), asked)
    assert kept.read_text() == "mine\n"


NO_CRITIC = ["--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
EMO = str(bundled.MINI / "emo")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (
            train_t5,
            [*NO_CRITIC, "--strategy", "1", "--critic-ramp", "9"],
            "--critic-ramp, --strategy: ignored",
        ),
        (train_t5, ["--strategy", "1", "--critic-ramp", "9"], ""),
        (train_t5, [*NO_CRITIC, "--family", "t5-a"], "--family: ignored"),
        (train_t5, [*NO_CRITIC, "--labels", "x"], "--labels: ignored"),
        (train_t5, [*NO_CRITIC, "--labels", "x", "--control", "marks"], ""),
        (train_t5, ["--samples", "6"], "--samples: ignored, since --sampled-loss-w is 0"),
        (train_t5, ["--samples", "6", "--sampled-loss-w", "1"], ""),
        (train_t5, ["--empathy-losses", "exp", "--emo", EMO], "--emo: ignored"),
        (train_t5, ["--empathy-losses", "exp", "--exp", EMO], ""),
        (train_t5, [*NO_CRITIC, "--emo", EMO, "--sampled-loss-w", "1"], ""),
        (train_t5, ["--add-exemplars", "none", "--top-exemplars", "3"], "--top-exemplars: ignored"),
        (train_glove_t5, ["--exemplar-layers", "3"], "--exemplar-layers: ignored"),
        (train_glove_t5, ["--exemplar-layers", "3", "--add-exemplars", "glove-t5"], ""),
        (train_causal_lm, ["--lora-rank", "0", "--lora-alpha", "8"], "--lora-alpha: ignored"),
        (train_causal_lm, ["--no-pack", "--add-exemplars", "prepend"], "--no-pack: ignored"),
        (train_causal_lm, ["--emo", EMO], "--emo: ignored"),
        (train_causal_lm, ["--exemplar-len", "90", "--add-exemplars", "prepend"], ""),
        (train_empathy_classifier, ["--dim", "emo", "--baselines", "--epochs", "3"], "--epochs: ignored"),
        (train_empathy_classifier, ["--dim", "emo", "--baselines", "--part", "a"], ""),
    ],
)
def test_a_training_says_which_flags_it_does_not_read(script, words, said, capsys):
    script.parse_args(words)
    printed = capsys.readouterr().out
    assert (f"note: {said}" in printed) if said else ("ignored" not in printed)


COMMANDS = {
    "train_t5": [],
    "train_glove_t5": [],
    "train_causal_lm": [],
    "train_empathy_classifier": ["--dim", "emo"],
    "train_sentiment_regressor": [],
    "label_dialogues": [],
    "prepare_data": [],
    "DPR.prepare_dpr_data": [],
    "DPR.train_dpr": [],
    "DPR.evaluate_retriever": [],
    "dpr_exemplar_retriever": [],
    "evaluate_responses": ["--dry-run"],
    "probe_critics": ["run"],
    "control": ["run"],
    "respond": ["Hi."],
    "score": ["Hi."],
    "retrieve": ["--pool", "p.txt", "Hi."],
    "app": [],
    "reproduce": ["--table", "main"],
}


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("value", ["-1", "0", "nan", "some"])
def test_whatever_number_a_flag_is_given_it_is_taken_or_refused_in_words(
    module, value, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(module)
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    flags = re.findall(r"(?m)^  (?:-\w, )?(--[a-z0-9-]+)", capsys.readouterr().out)
    assert len(flags) > 3
    for flag in flags:
        try:
            script.parse_args([*COMMANDS[module], flag, value])
        except (SystemExit, UserError):
            continue


def test_turns_that_score_has_written_into_a_cell_are_turns_again(tmp_path):
    (tmp_path / "a.csv").write_text('reply,history\nOh.,"[""My dog died."", ""[sigh] no""]"\nOh.,[sigh] no\n')
    found = records.read_records(tmp_path / "a.csv").turns("history")
    assert found == [("My dog died.", "[sigh] no"), ("[sigh] no",)]


def test_a_comma_in_a_place_is_no_second_seed(tmp_path, monkeypatch):
    (tmp_path / "wö rk, a=b").mkdir()
    (tmp_path / "wö rk, a=b" / "run.tsv").write_text("")
    for name in ("one.tsv", "two.tsv"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    whole = "x=wö rk, a=b/run.tsv"
    assert evaluate_responses.parse_args([whole]).runs == [whole]
    assert options.named_places(whole) == ("x", ["wö rk, a=b/run.tsv"])
    assert options.named_places("x=one.tsv,two.tsv") == ("x", ["one.tsv", "two.tsv"])
    assert options.named_places("x=") == ("x", [])


def test_a_line_without_a_reply_keeps_its_own_name(monkeypatch):
    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    monkeypatch.setattr(conversation, "reply", lambda _, turns, __: turns)
    monkeypatch.setattr(conversation, "as_row", lambda turns: {"reply": turns[-1].upper()})

    def row(text: str, place: str = "a.jsonl") -> dict:
        return conversation.answer_line(None, asked, 7, text, place)

    wrong = row('{"id": "x", "turns": ["My dog died.", "Oh no."]}')
    assert wrong["id"] == "x" and "turns" in wrong["error"]
    assert row('"Caf\\u00e9"')["reply"] == "CAF\u00c9"
    assert row('"Oh", she said.', "a.txt")["reply"] == '"OH", SHE SAID.'
    assert "plain text that begins like JSON" in row("[sigh] My dog died.", "a.txt")["error"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/chat.jsonl", "x" * 300])
def test_a_name_that_no_file_can_have_leaves_the_conversation_as_it_is(name):
    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    talk = conversation.Conversation(None, asked, input, print)
    talk.turns = ["hello", "hi"]
    with pytest.raises(UserError, match="/save .*: no name for a file"):
        talk.save(name)


def test_ctrl_c_stops_a_reply_and_not_the_conversation(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    lines, said = iter(["/help", "hello", "/save x", "/quit"]), []
    talk = conversation.Conversation(None, asked, lambda _: next(lines), said.append)
    monkeypatch.setattr(conversation, "reply", interrupted)
    talk.run()
    assert "the dialogue is where it was before this line" in said[-2] and "nothing was said yet" in said[-1]


TALK = """
import conversation, respond, settings
asked = settings.pick(conversation.RespondOptions, respond.parse_args([]))
conversation.Conversation.answer = lambda self, turns: self.write(f"<{len(turns[-1])} {turns[-1][-7:]}>")
conversation.Conversation(None, asked).run()
"""


@pytest.mark.skipif(importlib.util.find_spec("readline") is None, reason="a Python without readline")
def test_a_long_message_arrives_whole_from_a_terminal():
    """A terminal by itself ends a line at 4,096 bytes, and what stands behind is lost."""
    pty = pytest.importorskip("pty")
    leader, terminal = pty.openpty()
    command = [sys.executable, "-c", TALK]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, cwd=options.HERE)
    os.close(terminal)
    said = b""

    def until(text: bytes) -> None:
        nonlocal said
        while text not in said:
            assert select.select([leader], [], [], 60)[0], said[-200:]
            said += os.read(leader, 1000)

    try:
        until(b"> ")
        for _ in range(20):  # as much as a terminal takes at once
            os.write(leader, b"word " * 100)
            until(b"word " * 2)
            said = b""
        os.write(leader, b"the end\r")
        until(b" the end>")
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert b"<10007 the end>" in said


def test_bytes_that_are_not_utf8_end_no_conversation(monkeypatch):
    """In a UTF-8 locale input raises, elsewhere it gives lone surrogates."""

    def lines():
        yield UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid continuation byte")
        yield "caf\udce9 is bad"
        yield "/quit"

    def read(_):
        if isinstance(found := next(given), Exception):
            raise found
        return found

    given, said = lines(), []
    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    talk = conversation.Conversation(None, asked, read, said.append)
    talk.run()
    assert ["set the terminal to UTF-8" in line for line in said[1:]] == [True, True] and not talk.turns


@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_a_file_of_dialogues_is_told_which_formats_are_read_there(name, tmp_path):
    (tmp_path / name).write_text("[]")
    asked = pick(conversation.RespondOptions, respond.parse_args([]))
    with pytest.raises(UserError, match=r"a dialogue a line, as text \(.txt\) or as JSON \(.jsonl\)"):
        conversation.respond_to_file(lambda: None, str(tmp_path / name), None, asked)


def test_a_text_that_no_csv_field_holds_is_said_to_be_long(tmp_path):
    (tmp_path / "r.csv").write_text(f'reply\n"{"word " * 30_000}"\n')
    with pytest.raises(UserError, match="line 2: a text of over 131,072 characters, .* as .jsonl"):
        records.read_records(tmp_path / "r.csv")


def test_a_dialogues_name_is_not_taken_for_its_turns():
    for row in ({"conversation": "c12", "messages": ["hi"]}, {"Dialogue": 3, "utterances": ["hi"]}):
        assert turns.pick(row, "turns") == ["hi"]


def test_equal_dialogues_share_a_split_and_are_counted(tmp_path, capsys):
    said = [("a", "b"), ("c", "d"), ("a", "b"), ("e", "f"), ("a", "b")]
    drawn = own_dialogues.draw_splits(said, 1)
    assert len({drawn[0], drawn[2], drawn[4]}) == 1 and set(drawn) == {"train", "valid", "test"}
    rows = "".join(f"{n},{who},{text}\n" for n, turns in enumerate(said) for who, text in enumerate(turns))
    (tmp_path / "d.csv").write_text("id,speaker,text\n" + rows)
    own_dialogues.convert([tmp_path / "d.csv"], tmp_path, None, 1)
    assert "2 stand there before, word for word (the first: " in capsys.readouterr().out


def test_a_reader_that_has_enough_ends_a_command_quietly(tmp_path):
    (tmp_path / "r.txt").write_text("I am sorry\n" * 3000)
    command = f"{sys.executable} score.py --device cpu --input {tmp_path / 'r.txt'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=HERE, env=dict(os.environ))
    assert done.stdout == "I am sorry\n" and "Traceback" not in done.stderr


def test_a_published_model_is_not_read_as_a_file_of_replies():
    with pytest.raises(
        UserError, match=r"a published model; .*train_glove_t5\.py --inference .*--output DIR"
    ):
        systems.read_system(bundled.MINI / "generator", [], "test", Paths())
    with pytest.raises(UserError, match="the run of a Critic, not of a generator"):
        systems.read_system(bundled.MINI / "emo", [], "test", Paths())


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    reproduce.main(["--recipe", "sample", "--workdir", str(tmp_path / "none"), "--dry-run"])
    assert "prepare_data.py" in capsys.readouterr().out and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        reproduce.parse_args(["--render", "--dry-run"])
    assert "--render runs no command" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.parse_args(["--recipe", "glove", "--dry-run", "--override", "train_glove_t5.py '"])
    assert "No closing quotation" in capsys.readouterr().err


def test_a_carriage_return_inside_a_text_ends_no_row_of_what_is_written(tmp_path):
    rows = [{"reply": "Oh\rno", "id": "1"}, {"reply": "Well", "id": "2"}]
    for ending in ("csv", "tsv"):
        write_records(tmp_path / f"out.{ending}", ["reply", "id"], rows)
        assert read_records(tmp_path / f"out.{ending}").rows == rows


def test_turns_that_cannot_be_replied_to_are_refused_before_anything_is_loaded(home, monkeypatch):
    monkeypatch.setattr(conversation, "open_responder", lambda *_: pytest.fail("loaded first"))
    for said, named in (([" "], "each with a text"), (["Hello", "Hi"], "2 turns: the last must be")):
        with pytest.raises(UserError, match=named):
            respond.main(["--workdir", str(home), "--device", "cpu", *said])
