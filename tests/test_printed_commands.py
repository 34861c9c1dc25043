"""Whatever the commands print as a command can be pasted: it parses, with flags that its script has."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE
from test_scripts import NO_CRITICS, PARSERS, short

import advice
import bundled
import control
import dpr_exemplar_retriever
import evaluate_responses
import label_dialogues
import options
import prepare_data
import recipes
import reproduce
import score
import storage
import train_causal_lm
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
import updates
from DPR import prepare_dpr_data, train_dpr
from options import Paths, UserError

PARSE = {
    **PARSERS,
    "prepare_data.py": prepare_data.parse_args,
    "train_causal_lm.py": train_causal_lm.parse_args,
}
SCRIPTS = [*ROOT.glob("train_*.py"), ROOT / "prepare_data.py", ROOT / "label_dialogues.py"]
SCRIPTS += [ROOT / "dpr_exemplar_retriever.py", ROOT / "evaluate_responses.py", ROOT / "reproduce.py"]
SCRIPTS += [ROOT / "DPR" / "train_dpr.py", ROOT / "DPR" / "prepare_dpr_data.py"]


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A trained workdir with a blank and an umlaut in its name, seen from the project's folder."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "mein Körper"
    shutil.copytree(trained, folder)
    return folder


def commands(text: str) -> list[list[str]]:
    """The words of every command that stands in a printed text."""
    found = []
    for line in re.findall(r"(?:with: |next: |here: |with it: )(python .*)", text):
        words = shlex.split(re.split(r"; |, and |\) or ", line)[0])
        assert words[0] == "python"
        found.append(words[2:] if words[1] == "-m" else words[1:])
    return found


def refusal(main, *words: object) -> str:
    with pytest.raises(UserError) as refused:
        main([str(w) for w in words])
    return str(refused.value)


def parse(command: list[str], workdir: Path):
    """The flags of a printed command: it must parse, and be about the same workdir."""
    script, *words = command
    args = PARSE[script](words)
    assert Path(args.workdir) == workdir
    return args


def test_a_run_of_the_last_stages_prints_commands_that_run(place, capsys):
    train_glove_t5.main([*short(place), "--size", "tiny"])
    (table,) = commands(capsys.readouterr().out)
    args = parse(table, place)
    assert (table[0], args.family) == ("evaluate_responses.py", "glove-t5")
    evaluate_responses.main([*table[1:], "--device", "cpu"])
    judges = commands(capsys.readouterr().out)  # the one that is missing, in three dimensions
    assert judges and all(parse(judge, place).model == "minilm" for judge in judges)

    train_t5.main([*short(place), "--model", "t5-tiny", *NO_CRITICS, "--no-predict"])
    (replies,) = commands(capsys.readouterr().out)
    assert replies[0] == "train_t5.py" and parse(replies, place).inference
    train_t5.main([*replies[1:], "--device", "cpu", "--max-new-tokens", "5"])

    train_t5.main([*short(place), "--model", "t5-tiny", *NO_CRITICS, "--name", "two"])
    (table,) = commands(capsys.readouterr().out)  # the table that is there stays
    evaluate_responses.main([*table[1:], "--device", "cpu"])
    assert (place / "results" / "evaluation").exists() and len([*(place / "results").iterdir()]) == 2


def test_a_finished_run_that_is_asked_for_other_replies_prints_what_writes_them(place, capsys):
    words = [*short(place), "--size", "tiny", *NO_CRITICS, "--add-exemplars", "none", "--seed", "7"]
    train_glove_t5.main(words)
    run = Paths(place).saved / "glove-t5" / "plain"
    before, weights = (run / "predictions.tsv").read_text(), (run / "model.safetensors").stat().st_mtime_ns
    train_glove_t5.main(words)  # nothing else is asked for
    other = [*words, "--max-new-tokens", "9", "--no-repeat-ngram", "3", "--predict-batch-size", "16"]
    assert len(commands(capsys.readouterr().out)) == 2  # twice the table alone
    train_glove_t5.main(other)
    said = capsys.readouterr().out
    assert "still as they were written (max_new_tokens 5, now 9; no_repeat_ngram_size none, now 3)" in said
    anew, table = commands(said)
    assert table[0] == "evaluate_responses.py" and parse(anew, place).inference == str(run)
    train_glove_t5.main([*anew[1:], "--device", "cpu"])
    assert (run / "predictions.tsv").read_text() != before
    assert (run / "model.safetensors").stat().st_mtime_ns == weights  # not trained again
    capsys.readouterr()
    train_glove_t5.main(other)
    assert len(commands(capsys.readouterr().out)) == 1, "these replies are there"


def test_preparation_says_what_comes_next(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "mein Körper"
    folder.mkdir()
    flags = ["--source", str(corpus), "--workdir", str(folder), "--split", "grouped", "--min-count", "1"]
    prepare_data.main([*flags, "--glove", str(SAMPLE / "glove.sample.50d.txt")])
    (critic,) = commands(capsys.readouterr().out)
    assert parse(critic, folder).model == "glove-t5"  # needs no hub
    train_empathy_classifier.main([*critic[1:], "--device", "cpu", "--max-steps", "1"])


def test_a_stopped_training_prints_the_command_that_goes_on(place, monkeypatch, capsys):
    words = [*short(place), "--size", "tiny", *NO_CRITICS, "--name", "stopped", "--overwrite"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_glove_t5.py", *words])
    update = updates.Update.__call__

    def signalled(self, numbers):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, numbers)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(updates.Update, "__call__", signalled)
        train_glove_t5.main(words)
    assert stop.value.code == 143
    (again,) = commands(capsys.readouterr().out)
    assert again[0] == "train_glove_t5.py" and not parse(again, place).overwrite
    train_glove_t5.main(again[1:])
    assert "resuming from" in capsys.readouterr().out


def test_what_is_missing_is_made_by_the_printed_command(place):
    paths = Paths(place)
    at = ["--workdir", place, "--device", "cpu"]
    glove = [*short(place), "--size", "tiny"]

    def missing(gone: Path, main, *words) -> list[str]:
        aside = gone.with_name(f"{gone.name}-aside")
        gone.rename(aside)
        text = refusal(main, *words)
        aside.rename(gone)
        (command,) = commands(text)
        parse(command, place)
        return command

    labels = missing(paths.labels("train"), train_glove_t5.main, *glove)
    assert labels[0] == "label_dialogues.py" and labels[labels.index("--family") + 1] == "glove-t5"
    shown = missing(paths.exemplars("train"), train_glove_t5.main, *glove, *NO_CRITICS)
    assert shown[0] == "dpr_exemplar_retriever.py"
    paths.exemplars("train").unlink()
    dpr_exemplar_retriever.main([*shown[1:], "--device", "cpu", "--overwrite"])
    assert paths.exemplars("train").exists()

    critic = missing(paths.critic("emo", "glove-t5"), train_glove_t5.main, *glove)
    assert critic[:3] == ["train_empathy_classifier.py", "--dim", "emo"] and "glove-t5" in critic
    critic = missing(paths.critic("sentiment", "glove-t5"), train_glove_t5.main, *glove)
    assert critic[0] == "train_sentiment_regressor.py"
    critic = missing(paths.critic("int", "t5"), label_dialogues.main, *at)
    assert critic[:3] == ["train_empathy_classifier.py", "--dim", "int"]
    missing(paths.dpr_data("empd", "train"), train_dpr.main, *at, "--name", "x", "--encoder", paths.bert_tiny)
    run = paths.saved / "dpr" / "empd"
    found = missing(run, dpr_exemplar_retriever.main, *at, "--path", run, "--overwrite")
    assert found[0] == "DPR.train_dpr"

    (paths.data / "prepared.json").write_text(json.dumps({"source": "sample"}))
    for gone, main, words in (
        (paths.glove, train_glove_t5.main, glove),
        (paths.t5_tiny, train_t5.main, [*short(place), "--model", "t5-tiny"]),
        (
            paths.pairs("emo", "train"),
            train_empathy_classifier.main,
            [*at, "--dim", "emo", "--model", "glove-t5"],
        ),
        (paths.dialogues("train"), prepare_dpr_data.main, ["--workdir", place, "--overwrite"]),
        (paths.vader("train"), train_sentiment_regressor.main, [*at, "--model", "glove-t5", "--name", "x"]),
    ):
        command = missing(gone, main, *words)
        assert command[0] == "prepare_data.py" and "--overwrite" in command


def test_a_damaged_file_is_made_again_by_a_command_that_replaces_it(place):
    Paths(place).labels("train").write_text("conv_id,utterance_idx\n", encoding="utf-8")
    text = refusal(train_glove_t5.main, *short(place), "--size", "tiny")
    (command,) = commands(text)
    assert command[0] == "label_dialogues.py" and parse(command, place).overwrite


@pytest.mark.parametrize("output", [None, "mine"])
def test_old_exemplars_and_labels_are_made_again_as_they_were_made(place, output, monkeypatch, capsys):
    """Not as they would be by default: of any emotion, by these critics, in that place."""
    paths, at = Paths(place), ["--workdir", str(place), "--device", "cpu"]
    to = ["--output", str(place / output)] if output else ["--overwrite"]
    asked = [
        "--path",
        str(paths.saved / "dpr" / "empd"),
        *"--candidates all --match context --top-k 2".split(),
    ]
    critics = [w for d in ("emo", "exp", "int") for w in (f"--{d}", str(paths.critic(d, "glove-t5")))]
    for main, script, words in (
        (dpr_exemplar_retriever.main, "dpr_exemplar_retriever.py", [*at, *asked, *to]),
        (label_dialogues.main, "label_dialogues.py", [*at, *critics, *to]),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", script, *words])
        main(words)
        assert not main([*words, "--overwrite"] if output else words)  # what made it is not the command
    capsys.readouterr()
    dialogues = paths.dialogues("train")
    dialogues.write_text(dialogues.read_text().replace("the", "that", 1))
    given = ["--exemplars", str(place / output), "--labels", str(place / output)] if output else []
    train_glove_t5.main([*short(place), "--size", "tiny", "--max-steps", "1", *given])
    made = {command[0]: parse(command, place) for command in commands(capsys.readouterr().out)}
    again = made["dpr_exemplar_retriever.py"]
    assert (again.candidates, again.match, again.top_k, again.overwrite) == ("all", "context", 2, True)
    assert made["label_dialogues.py"].emo == critics[1] and made["label_dialogues.py"].overwrite
    assert {a.output for a in (again, made["label_dialogues.py"])} == {to[1] if output else None}


@pytest.mark.parametrize(
    "began", ["--workdir old --path old/saved/dpr/mine", "--path saved/dpr/mine", "--workdir=old"]
)
def test_exemplars_of_a_workdir_that_was_moved_are_made_again_where_it_lies_now(began, tmp_path, monkeypatch):
    file = Paths(tmp_path / "new").exemplars("train")
    command = f"python dpr_exemplar_retriever.py {began} --encoder minilm --candidates all"
    storage.write_json(storage.origin_file(file), {"command": command})
    words = shlex.split(advice.makes(file, ""))
    assert words[words.index("--workdir") + 1] == str(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(advice.makes(file, ""))[1] == str(ROOT / "dpr_exemplar_retriever.py")
    assert words[words.index("--encoder") + 1] == "minilm" and "all" in words and "--overwrite" in words
    if "--path" in began:
        assert words[words.index("--path") + 1] == str(tmp_path / "new" / "saved" / "dpr" / "mine")


def test_a_damaged_run_is_made_again_by_its_own_command(place):
    """With the flags it was trained with, in the place where it lies."""
    run = Paths(place).saved / "dpr" / "empd"
    made = json.loads((run / "environment.json").read_text())
    began = ["python", "-m", "DPR.train_dpr", "--epochs", "7", "--resume", "never", "--workdir", str(place)]
    (run / "environment.json").write_text(json.dumps(made | {"command": shlex.join(began)}))
    at = ["--workdir", str(place), "--device", "cpu", "--overwrite", "--path", str(run)]
    (run / "question_encoder" / "model.safetensors").write_bytes(b"damaged")
    (command,) = commands(refusal(dpr_exemplar_retriever.main, *at))
    args = parse(command, place)
    assert (args.epochs, args.overwrite, args.resume) == (7, True, "auto")
    (run / "question_encoder" / "model.safetensors").unlink()
    assert commands(refusal(dpr_exemplar_retriever.main, *at)) == [command]
    moved = place / "moved"
    shutil.copytree(run, moved / "saved" / "dpr" / "empd")
    at[-1] = str(moved / "saved" / "dpr" / "empd")
    assert "7" not in commands(refusal(dpr_exemplar_retriever.main, *at))[0], "it would train elsewhere"


def test_a_run_that_is_no_generators_gets_no_table_and_no_advice_that_fails(place):
    for run in ("empathy/glove-t5-emo", "dpr/empd"):
        text = refusal(evaluate_responses.main, "--workdir", place, place / "saved" / run)
        assert "not of a generator" in text and not commands(text)


def test_an_unfinished_run_names_the_command_that_goes_on(place):
    run = Paths(place).critic("emo", "glove-t5")
    (run / "result.json").unlink()
    made = json.loads((run / "environment.json").read_text())
    began = ["python", "train_empathy_classifier.py", "--dim", "emo", "--overwrite", "--workdir", str(place)]
    (run / "environment.json").write_text(json.dumps(made | {"command": shlex.join(began)}))
    text = refusal(label_dialogues.main, "--workdir", place, "--family", "glove-t5", "--device", "cpu")
    (command,) = commands(text)
    assert not parse(command, place).overwrite and command[0] == "train_empathy_classifier.py"


@pytest.mark.parametrize(
    ("main", "words", "flags"),
    [
        (train_t5.main, ["--model", "t5-small", *NO_CRITICS, "--add-exemplars", "none"], "--model t5-tiny"),
        (train_empathy_classifier.main, ["--dim", "emo", "--name", "x"], "--model t5 --size tiny"),
        (train_dpr.main, ["--name", "x"], "--encoder"),
        (dpr_exemplar_retriever.main, ["--overwrite"], "--path"),
    ],
)
def test_offline_advice_names_flags_of_that_script(place, main, words, flags):
    text = refusal(main, "--workdir", place, "--device", "cpu", *words)
    assert f"or {flags}" in text.replace("or --model glove-t5, ", "")
    shown = PARSE[next(n for n, f in PARSE.items() if f.__module__ == main.__module__)]
    for flag in re.findall(r"(?:or|,) (--[a-z-]+)", text):
        with pytest.raises(SystemExit):
            shown([flag, "--no-such-flag"])


def test_from_another_folder_scripts_are_named_by_their_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in ("train_t5.py", "DPR.train_dpr"):
        words = shlex.split(advice.command(script, workdir=tmp_path / "a b"))
        assert Path(words[1]).is_file() and words[-1] == str(tmp_path / "a b")
        shown = subprocess.run([sys.executable, words[1], "--help"], capture_output=True, text=True)
        assert shown.returncode == 0 and "--workdir" in shown.stdout


# --------------------------------------------------------------------------------------------- one plain line


def said(parse_args, words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2, lines  # the error, and where all flags are
    return lines[0]


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--learning_rate", "1e-4"], "--lr"),
        (["--num_train_epochs=3"], "--epochs"),
        (["--per_device_train_batch_size", "8"], "--batch-size"),
        (["--output_dir", "x"], "--name"),
        (["--gradient_accumulation_steps", "2"], "--accumulate"),
    ],
)
def test_a_flag_of_another_name_is_told_ours(words, ours, capsys):
    assert f"did you mean {ours}" in said(train_t5.parse_args, words, capsys)


@pytest.mark.parametrize(
    "words", [["--lr", "nan"], ["--name", "../../x"], ["--epochs", "1.5"], ["--workdir", "/no/such"]]
)
def test_a_value_that_cannot_be_is_one_line_with_its_flag(words, capsys):
    assert words[0] in said(train_t5.parse_args, words, capsys)


def test_a_place_that_lies_in_the_workdir_is_named_as_it_is_seen_from_here(place, monkeypatch, capsys):
    monkeypatch.chdir(place.parent)
    at = ["--workdir", place.name]
    emo = "saved/empathy/glove-t5-emo"
    for parse_args, words, seen in (
        (train_glove_t5.parse_args, ["--emo", emo], emo),
        (dpr_exemplar_retriever.parse_args, ["--path=saved/dpr/empd"], "saved/dpr/empd"),
    ):
        assert f"{seen}: not there, but {place.name}/{seen} is" in said(parse_args, [*at, *words], capsys)
    dpr_exemplar_retriever.parse_args([*at, "--output", "saved/dpr/empd"])  # where something is to be written
    score_texts = [*at, "yes/no " + "long " * 2000]
    assert score.parse_args(score_texts).texts == score_texts[2:]


@pytest.mark.parametrize("script", sorted(PARSE))
def test_help_shows_no_default_of_none(script, capsys):
    with pytest.raises(SystemExit):
        PARSE[script](["--help"])
    assert "default: None" not in capsys.readouterr().out


def run_script(main, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["some.py"])
    with pytest.raises(SystemExit) as stop:
        options.run(main)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").write_text("a file where the folder goes")
    text = run_script(lambda: prepare_data.main(["--workdir", str(tmp_path)]), monkeypatch, capsys)
    assert str(tmp_path / "data") in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(("prefix", "remedy"), [("/usr", "bin/activate"), (ROOT / ".venv", "install")])
def test_a_missing_package_says_how_to_get_the_environment(prefix, remedy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "prefix", str(prefix))
    text = run_script(lambda: __import__("no_such_package"), monkeypatch, capsys)
    assert "no_such_package" in text and remedy in text and len(text.splitlines()) == 1
    assert ("bin/activate" in text) == (remedy == "bin/activate")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_line_with_a_remedy(error, monkeypatch, capsys):
    def main():
        raise error

    text = run_script(main, monkeypatch, capsys)
    assert "some.py: error: out of memory" in text and "smaller batches" in text
    assert len(text.splitlines()) == 1


def test_a_full_disk_is_named_whatever_kind_of_error_a_library_makes_of_it(monkeypatch, capsys):
    def main():
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")

    text = run_script(main, monkeypatch, capsys)
    assert "some.py: error: no space left on the disk" in text and len(text.splitlines()) == 1
    with pytest.raises(ValueError, match="another"):
        options.run(lambda: (_ for _ in ()).throw(ValueError("another")))


def test_a_missing_module_of_the_project_is_not_laid_to_the_environment():
    def broken():
        raise ModuleNotFoundError("No module named 'storage'", name="storage")

    with pytest.raises(ModuleNotFoundError):
        options.run(broken)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_an_older_python_is_told_so_before_it_reads_what_it_cannot(script, monkeypatch):
    """The script, and what it imports before the check, parse under 3.8; the check is options' first act."""
    for file in (script, *(ROOT / f"{name}.py" for name in ("options", "advice", "commands", "settings"))):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    for name in ("options", "advice", "commands"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match="Python 3.11 or newer is needed, this is 3.8"):
        runpy.run_path(str(script))


def test_the_recipes_commands_can_be_pasted_from_the_projects_folder(place, capsys):
    for recipe in recipes.RECIPES:
        source = ["--source", str(SAMPLE / "own.jsonl")] if recipe == "own" else []
        reproduce.main(["--recipe", recipe, "--workdir", str(place), "--dry-run", *source])
        lines = re.findall(r"\] python (.*)", capsys.readouterr().out)
        assert len(lines) > (5 if source else 10)
        for line in lines:
            words = shlex.split(line.removeprefix("-m "))
            for word in words:
                if word.startswith(f"{place}/saved/"):
                    Path(word).mkdir(parents=True, exist_ok=True)
            parse(words, place)


def test_no_message_sends_dialogues_without_pairs_round_in_a_circle(tmp_path):
    """Of own dialogues no critic of empathy can be trained, and a retriever is MiniLM as it is."""
    words = ["--min-count", "1", "--glove", str(SAMPLE / "glove.sample.50d.txt")]
    prepare_data.main(["--source", str(SAMPLE / "own.jsonl"), "--workdir", str(tmp_path), *words])
    common = ["--workdir", str(tmp_path), "--device", "cpu"]
    first = ["--empathy-loss-w 0", "--emo RUN --exp RUN --int RUN"]
    again = ["prepare_data.py --overwrite", "pairs beside the dialogues"]
    steps = [
        (train_glove_t5.main, ["--size", "tiny"], first),
        (label_dialogues.main, [], first),
        (train_empathy_classifier.main, ["--dim", "emo", "--model", "glove-t5"], again),
        (control.main, [str(bundled.MINI / "generator")], ["no glove-t5 ranker", "--dim all"]),
        (control.main, [str(bundled.MINI / "emo")], ["a critic, not a generator"]),
        (train_glove_t5.main, ["--size", "tiny", *NO_CRITICS], ["--encoder minilm"]),
    ]
    for main, words, expected in steps:
        with pytest.raises(UserError) as refused:
            main([*common, *words])
        assert all(part in str(refused.value) for part in expected), refused.value
        assert not re.search("train_empathy_classifier.py|DPR.train_dpr", str(refused.value))


def test_the_table_of_another_split_is_asked_for_with_that_split(tmp_path):
    run = tmp_path / "saved" / "t5" / "run"
    words = shlex.split(advice.table(run, "valid", tmp_path))
    assert words[words.index("--split") + 1] == "valid"
    assert "--split" not in shlex.split(advice.table(run, "test", tmp_path))
