"""Stages of a plan: in an order that holds, several at once, within a box of time, remembered by command."""

import json
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bundled
import gathering
import reproduce
import stages
import storage
from DPR import biencoder
from gathering import gather, half
from options import Paths, UserError
from recipes import Changes, Group, plan

#: stands for a training: waits, and at a SIGTERM saves and leaves with 143; goes on from what it saved
STAGE = """
import pathlib, signal, sys, time
place, name, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
saved, log = place / f"{name}.saved", place / "order.txt"
def stop(*_):
    saved.touch()
    print("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open(log, "a") as out:
    out.write(f"begin {name}\\n")
if name == "bad":
    sys.exit("no such thing")
time.sleep(0.0 if saved.exists() else seconds)
with open(log, "a") as out:
    out.write(f"end {name}\\n")
"""


@pytest.fixture
def make(tmp_path):
    """Stages of a recipe {name: (seconds, names before)}."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE, encoding="utf-8")

    def stages_of(recipe):
        groups = {
            name: Group([f"{script} {tmp_path} {name} {seconds}"], after)
            for name, (seconds, after) in recipe.items()
        }
        return plan(groups, ".", "download", Changes())

    return stages_of


def run(todo, folder, **box):
    return stages.run(todo, stages.Record(folder / "stages.json"), folder / "logs", stages.Box(**box))


def order(folder) -> list[str]:
    return (folder / "order.txt").read_text(encoding="utf-8").splitlines()


def test_stages_run_at_once_where_none_needs_the_other(make, tmp_path):
    todo = make({"a": (0.5, ()), "b": (0.5, ()), "c": (0, ("a", "b"))})
    assert run(todo, tmp_path, parallel=2).left == []
    lines = order(tmp_path)
    assert set(lines[:2]) == {"begin a", "begin b"}  # neither waits for the other
    assert lines[-2:] == ["begin c", "end c"]


def test_stages_that_run_at_once_share_the_gpus(make, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    for parallel, seen in ((2, ["3", "5"]), (1, ["3, 5", "3, 5"])):
        todo = make({"a": (0, ()), "b": (0, ())})
        for stage in todo:  # both run at once
            said = "import os, time; time.sleep(2); print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
            stage.command[:] = ["-c", said]
        logs = tmp_path / str(parallel) / "logs"
        assert run(todo, logs.parent, parallel=parallel).left == []
        found = [line for file in logs.iterdir() for line in file.read_text().splitlines()]
        assert sorted(found) == [f"sees {gpus}" for gpus in seen]


def test_at_the_end_of_the_time_a_stage_saves_and_the_next_call_goes_on(make, tmp_path, capsys):
    todo = make({"a": (60, ()), "b": (0, ("a",))})
    began = time.monotonic()
    outcome = run(todo, tmp_path, seconds=2)
    assert time.monotonic() - began < 30 and outcome.left == [0, 1] and (tmp_path / "a.saved").exists()
    with pytest.raises(SystemExit) as end:
        stages.settle_outcome(outcome, todo)
    assert end.value.code == 143
    assert run(todo, tmp_path, seconds=60).left == []
    seconds = json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))[todo[0].key]["seconds"]
    assert seconds > 1.5  # of both calls


def test_a_second_run_in_a_box_whose_time_is_over_starts_nothing(make, tmp_path):
    box = replace(stages.Box(seconds=5, began=time.monotonic() - 6), keep_going=True)
    record = stages.Record(tmp_path / "stages.json")
    outcome = stages.run(make({"a": (0, ())}), record, tmp_path / "logs", box)
    assert outcome.left == [0] and outcome.stopped and not (tmp_path / "order.txt").exists()


def test_what_failed_is_shown_at_the_end_of_the_time_too(make, tmp_path, capsys):
    todo = make({"bad": (0, ()), "slow": (30, ())})
    outcome = run(todo, tmp_path, parallel=2, seconds=4)
    with pytest.raises(SystemExit):
        stages.settle_outcome(outcome, todo)
    said = capsys.readouterr().err
    assert "no such thing" in said and said.index("no such thing") < said.index("stopped with 0 of 2 stages")


def test_what_was_made_of_other_data_has_not_finished(make, tmp_path):
    (todo,) = make({"a": (0, ())})
    (tmp_path / "data").mkdir()
    prepared = tmp_path / "data" / "prepared.json"
    prepared.write_text('{"levels": 2}')
    file = tmp_path / "results" / "sample" / "stages.json"
    stages.Record(file).add(todo, 1.0, True)
    assert stages.Record(file).finished(todo)
    prepared.write_text('{"levels": 3}')
    assert not stages.Record(file).finished(todo)
    made = replace(todo, command=["prepare_data.py"])
    assert stages.Record(file).finished(made)  # it compares its sources by itself


@pytest.mark.parametrize("folder", [False, True])
def test_own_dialogues_that_were_edited_are_not_taken_for_those_of_then(tmp_path, monkeypatch, folder):
    ran = []

    def without_work(todo, record, logs, box):
        ran.append([stage.command[0] for stage in todo if not record.finished(stage)])
        for stage in todo:
            record.add(stage, 1.0, True)
        storage.write_json(record.prepared, {})
        return stages.Outcome()

    monkeypatch.setattr(stages, "run", without_work)
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "chats.jsonl"
    source = ["--source", str(file.parent if folder else file), "--workdir", str(tmp_path / "work")]
    for content in ("a", "a", "another"):
        file.write_text(content)
        reproduce.main(["--recipe", "own", *source])
    assert [len(commands) for commands in ran] == [6, 0, 1]
    assert ran[-1] == ["prepare_data.py"]  # the others go by what that makes


def test_what_does_not_build_on_a_failed_stage_goes_on_where_that_is_asked(make, tmp_path):
    todo = make({"bad": (0, ()), "on it": (0, ("bad",)), "other": (0, ())})
    outcome = run(todo, tmp_path, keep_going=True)
    assert outcome.left == [0, 1] and "no such thing" in outcome.failed[0]
    assert run(make({"bad": (0, ()), "late": (0, ())}), tmp_path).left == [0, 1]  # else it ends there
    with pytest.raises(UserError, match="the same call goes on from here"):
        stages.settle_outcome(outcome, todo)


@pytest.mark.parametrize("full", ["log", "screen", "ascii"])
def test_a_stage_ends_though_nothing_takes_its_output(make, tmp_path, full, monkeypatch):
    todo = make({"talk": (0, ()), "b": (0, ("talk",))})
    todo[0].command[:] = ["-c", "print('word\\n' * 100_000)"]  # more than a pipe holds
    if full == "log":
        (tmp_path / "logs" / "01--c.log").mkdir(parents=True)
    else:
        end, said = threading.main_thread(), print

        def only_in_main(*words, **more):
            if threading.current_thread() is not end:
                if full == "ascii":
                    "\u2639".encode("ascii")  # raises as print does
                raise BrokenPipeError(32, "Broken pipe")
            said(*words, **more)

        monkeypatch.setattr("builtins.print", only_in_main)
    assert run(todo, tmp_path, seconds=100).left == []
    assert order(tmp_path)[-1] == "end b"


RECIPE = {"critic": Group(["train_t5.py --lr 1"]), "labels": Group(["label_dialogues.py"], ("critic",))}


def test_a_stage_is_remembered_by_its_command_after_the_flags_of_the_call(tmp_path):
    record = stages.Record(tmp_path / "stages.json")
    first = plan(RECIPE, ".", "download", Changes(epochs=3))
    for stage in first:
        record.add(stage, 5, True)
    again = stages.Record(tmp_path / "stages.json")
    elsewhere = plan(RECIPE, str(tmp_path), "download", Changes(epochs=3))
    assert all(again.finished(stage) for stage in [*first, *elsewhere])  # wherever the workdir lies
    other = plan(RECIPE, ".", "download", Changes(epochs=4))
    assert not any(again.finished(stage) for stage in other)  # nor the labels, which build on it
    assert "python train_t5.py --lr 1 --epochs 3" in again.another(other[0])
    assert "what it builds on is another today" in again.another(other[1])


#: keeps what a file held when it was first read, as the scripts do
KEEP = """
import pathlib, sys
made, asked = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[1]).read_text()
if made.exists() and made.read_text() != asked and "--overwrite" not in sys.argv:
    sys.exit(2)
made.write_text(asked)
"""


def test_what_was_made_of_other_inputs_is_replaced_where_that_is_asked(tmp_path):
    (tmp_path / "keep.py").write_text(KEEP, encoding="utf-8")
    file, one, two = (str(tmp_path / name) for name in ("mine.txt", "one", "two"))
    lines = {"one": Group([f"{tmp_path / 'keep.py'} {file} {one}"])}
    lines |= {"two": Group([f"{tmp_path / 'keep.py'} {one} {two}"], ("one",))}

    def again(**box) -> stages.Outcome:
        """As a call after the file was edited: its digest is what the first stage reads."""
        first, second = plan(lines, ".", "download", Changes())
        content = Path(file).read_text()
        todo = [replace(first, reads=(content,)), replace(second, identity=content)]
        outcome = run(todo, tmp_path, **box)
        if outcome.failed:
            with pytest.raises(UserError) as found:
                stages.settle_outcome(outcome, todo)
            outcome.failed[-1] = str(found.value)
        return outcome

    Path(file).write_text("then")
    assert again().left == []
    Path(file).write_text("now")
    for _ in range(2):  # the same call is of no help, however often
        said = again().failed[-1]
        assert "the same call with --overwrite replaces it" in said and "goes on from here" not in said
    assert Path(two).read_text() == "then"
    assert again(overwrite=True).left == [] and Path(two).read_text() == "now"
    assert again().left == []  # and has finished
    Path(file).write_text("then")
    # refused for another reason before it wrote: once that is mended the same call is of use
    (tmp_path / "keep.py").write_text("raise SystemExit(2)", encoding="utf-8")
    assert "the same call goes on from here" in again(overwrite=True).failed[-1]
    (tmp_path / "keep.py").write_text(KEEP, encoding="utf-8")
    assert again(overwrite=True).left == [] and Path(two).read_text() == "then"
    Path(file).write_text("now")
    (tmp_path / "keep.py").write_text("raise SystemExit(1)", encoding="utf-8")
    assert "the same call goes on from here" in again(overwrite=True).failed[-1]
    (tmp_path / "keep.py").write_text(KEEP.replace("--overwrite", "never"), encoding="utf-8")
    Path(one).unlink()
    # what was begun on these inputs goes on, and is not begun anew
    assert again(overwrite=True).left == [1] and Path(one).read_text() == "now"


def test_other_data_in_a_workdir_take_the_place_of_those_prepared_before(tmp_path):
    record = stages.Record(tmp_path / "results" / "own" / "stages.json")
    then, now = (
        plan({"data": Group([f"prepare_data.py --source {name}"])}, ".", name, Changes())[0]
        for name in ("/a.jsonl", "/b.jsonl")
    )
    assert not record.replaces(then)
    record.add(then, 1.0, True)
    assert record.replaces(now) and "python prepare_data.py --source /a.jsonl" in record.another(now)


#: writes an empty mark below a workdir, with a note of its command where the stage is to have one
MAKE = """
import json, pathlib, sys, time
file, noted = pathlib.Path(sys.argv[1]), sys.argv[2:] == ["noted"]
file.parent.mkdir(parents=True, exist_ok=True)
time.sleep(0.5)  # others begin and end beside it
file.write_text("{}")
if noted:
    name = "environment.json" if file.name == "result.json" else f"{file.name}.origin.json"
    command = " ".join(["python", *sys.orig_argv[1:]])
    file.with_name(name).write_text(json.dumps({"command": command}))
"""
MADE = ("saved/t5/a/result.json", "data/empathetic_dialogues/train_labels.csv", "results/b/metrics.json")


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_stage_has_finished_only_while_what_it_made_stands(tmp_path, parallel, capsys):
    script, record = tmp_path / "make.py", tmp_path / "results" / "sample" / "stages.json"
    script.write_text(MAKE, encoding="utf-8")
    lines = [f"{script} {tmp_path / mark}{' noted' * (parallel > 1)}" for mark in MADE]
    todo = plan({"all": Group(lines)}, ".", "download", Changes())

    def again() -> str:
        outcome = stages.run(todo, stages.Record(record), tmp_path / "logs", stages.Box(parallel))
        assert outcome.left == []
        return capsys.readouterr().out

    again()
    assert again().count("  finished before, in") == 3
    for mark in MADE:
        (tmp_path / mark).unlink()
        said = again()
        assert f"finished before, but {tmp_path / mark} is gone: it runs again" in said
        assert (tmp_path / mark).exists() and said.count("  finished before, in") == 2
    entries = json.loads(record.read_text(encoding="utf-8"))
    assert {key.split()[1].removeprefix(f"{tmp_path}/"): e["made"] for key, e in entries.items()} == {
        mark: [mark] for mark in MADE
    }
    for entry in entries.values():  # as older records are
        del entry["made"]
    record.write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / MADE[0]).unlink()
    assert again().count("  finished before, in") == 3


def test_data_that_were_deleted_are_prepared_again_though_other_stages_ran_beside(tmp_path):
    record = stages.Record(tmp_path / "results" / "sample" / "stages.json")
    stage = plan({"data": Group(["prepare_data.py --source sample"])}, ".", "sample", Changes())[0]
    storage.write_json(tmp_path / "data" / "prepared.json", {})
    record.add(stage, 1.0, True)  # and nothing of what it made: another ran at once
    assert record.finished(stage)
    (tmp_path / "data" / "prepared.json").unlink()
    assert not record.finished(stage) and "prepared.json is gone: it runs again" in record.another(stage)


def test_what_stages_beside_each_other_made_without_a_note_is_laid_to_none_of_them(tmp_path):
    script, record = tmp_path / "make.py", tmp_path / "results" / "sample" / "stages.json"
    script.write_text(MAKE, encoding="utf-8")
    lines = [f"{script} {tmp_path / mark}" for mark in MADE]
    todo = plan({"all": Group(lines)}, ".", "download", Changes())
    assert stages.run(todo, stages.Record(record), tmp_path / "logs", stages.Box(3)).left == []
    assert not any("made" in entry for entry in json.loads(record.read_text(encoding="utf-8")).values())


def test_marks_are_found_behind_links_while_folders_go_and_are_no_record_of_another_recipe(tmp_path):
    elsewhere = tmp_path / "disk" / "run"
    elsewhere.mkdir(parents=True)
    (elsewhere / "result.json").write_text("{}")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "run").symlink_to(elsewhere)
    other = tmp_path / "results" / "t5" / "stages.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    going, over = tmp_path / "saved" / "going", threading.Event()

    def come_and_go():
        while not over.is_set():
            (going / "checkpoints" / "step-1").mkdir(parents=True)
            shutil.rmtree(going)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        record = stages.Record(tmp_path / "results" / "sample" / "stages.json")
        assert all(list(record.standing()) == ["saved/run/result.json"] for _ in range(200))
    finally:
        over.set()
        thread.join()


def test_a_sample_whose_case_studies_are_gone_says_how_they_come_back(tmp_path):
    with pytest.raises(UserError, match="case_studies.md: gone; remove metrics.json and stages.json"):
        reproduce.sample_page(tmp_path)


def test_what_has_finished_is_gathered_while_the_others_run(make, tmp_path):
    todo, seen = make({"a": (0, ()), "b": (3, ()), "c": (0, ("a",))}), []
    run(todo, tmp_path, parallel=2, gather=lambda: seen.append(order(tmp_path)))
    assert seen and all("end b" not in lines for lines in seen) and "end a" in seen[0]


def test_a_disk_that_is_full_of_what_was_gathered_stops_no_stage(make, tmp_path, capsys):
    def full():
        raise OSError(28, "No space left on device")

    todo = make({"a": (0, ()), "b": (1, ())})
    assert run(todo, tmp_path, parallel=2, gather=full).left == []
    assert "not gathered: " in capsys.readouterr().out


def test_an_error_leaves_no_stage_running(make, tmp_path):
    def broken():
        while "begin b" not in order(tmp_path):
            time.sleep(0.05)
        raise RuntimeError("not foreseen")

    todo = make({"a": (0, ()), "b": (60, ())})
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="not foreseen"):
        run(todo, tmp_path, parallel=2, gather=broken)
    assert time.monotonic() - began < 30 and (tmp_path / "b.saved").exists()


def test_weights_that_cannot_be_read_are_left_out_and_the_rest_is_gathered(tmp_path):
    for name in ("cut", "good"):
        (tmp_path / "saved" / "t5" / name).mkdir(parents=True)
        (tmp_path / "saved" / "t5" / name / "result.json").write_text("{}", encoding="utf-8")
        save_file({"w": torch.rand(9)}, tmp_path / "saved" / "t5" / name / "model.safetensors")
    cut = tmp_path / "saved" / "t5" / "cut" / "model.safetensors"
    cut.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    target = tmp_path / "results" / "gathered"
    (left,) = gather(Paths(tmp_path), target)
    assert left.startswith("saved/t5/cut/model.safetensors (cannot be read: ")
    assert (target / "saved/t5/good/model.safetensors").exists()
    assert (target / "saved/t5/cut/result.json").exists()


def test_what_is_gathered_stays_below_its_limit_small_things_first(tmp_path):
    for name, numbers in (("small", 1_000), ("large", 2_000_000)):
        run_folder = tmp_path / "saved" / "t5" / name
        (run_folder / "checkpoints" / "step-1").mkdir(parents=True)
        (run_folder / "result.json").write_text("{}", encoding="utf-8")
        (run_folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        (run_folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        for place in (run_folder, run_folder / "checkpoints" / "step-1"):
            save_file({"w": torch.rand(numbers)}, place / "model.safetensors")
    target = tmp_path / "results" / "glove" / "gathered"
    for _ in range(2):  # what it has gathered itself is not gathered again
        left = gather(Paths(tmp_path), target, limit=10**6)
        assert left == ["saved/t5/large/model.safetensors (at least 4.0 MB in half precision)"]
        assert (target / "saved/t5/large/metrics.jsonl").exists()
        assert (target / "saved/t5/large/chat_template.jinja").exists()  # else a run speaks another language
        assert load_file(target / "saved/t5/small/model.safetensors")["w"].dtype == torch.float16
        assert not list(target.rglob("checkpoints")) and not list(target.parent.glob(".gathered"))
        assert sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) < 10**6


def test_two_calls_in_one_workdir_do_not_share_what_they_note(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RECIPES", {"sample": lambda source: {"a": Group(["python none.py"])}})
    with (
        storage.locked(tmp_path / "results" / "sample", "held"),
        pytest.raises(UserError, match="another reproduce.py is at work there; wait for it"),
    ):
        reproduce.main(["--recipe", "sample", "--workdir", str(tmp_path)])


def test_what_a_machine_without_a_network_needs_is_packed_and_found_there(
    trained_copy, tmp_path, monkeypatch, capsys
):
    package = tmp_path / "site" / bundled.MINILM_PACKAGE
    shutil.copytree(trained_copy / "data" / "bert-tiny", package / "model")
    monkeypatch.setattr(gathering, "package_folder", lambda name: package)
    (trained_copy / "data" / "downloads").mkdir()
    (trained_copy / "data" / "glove").rename(tmp_path / "glove")  # on a larger disk
    (trained_copy / "data" / "glove").symlink_to(tmp_path / "glove")
    words = ["--take", str(tmp_path / "lent.tar.gz"), "--workdir", str(trained_copy)]
    reproduce.main(words)
    assert "MB; unpack it there: tar -xzf lent.tar.gz" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([*words, "--seed", "7"])
    shown = capsys.readouterr().err
    assert "lent.tar.gz: already there" in shown and "--seed: --take runs no command" in shown

    there = tmp_path / "there"
    with tarfile.open(tmp_path / "lent.tar.gz") as packed:
        packed.extractall(there, filter="data")
    for file in [Paths(trained_copy).dialogues("train"), trained_copy / "data" / "prepared.json"]:
        assert (there / file.relative_to(trained_copy)).read_bytes() == file.read_bytes()
    assert not (there / "data" / "downloads").exists() and not (there / "data" / "glove").is_symlink()
    vectors = Path("glove", "vectors.safetensors")
    assert (there / "data" / vectors).read_bytes() == (tmp_path / vectors).read_bytes()
    for module in (bundled, biencoder):
        monkeypatch.setattr(module, "TAKEN", there / "packages")
    monkeypatch.setattr(bundled, "find_spec", lambda name: None)  # the package is not installed there
    found = there / "packages" / bundled.MINILM_PACKAGE / "model"
    assert bundled.package_folder(bundled.MINILM_PACKAGE) == found.parent
    whole = load_file(package / "model" / "model.safetensors")
    smaller = load_file(found / "model.safetensors")
    assert {w.dtype for w in smaller.values()} == {torch.float16} and smaller.keys() == whole.keys()
    assert all(torch.equal(smaller[name].float(), w.half().float()) for name, w in whole.items())
    with pytest.raises(UserError, match="not all-MiniLM-L6-v2 as it was.* --take again"):
        biencoder.resolve("minilm")
    known = (storage.sha256(found / "model.safetensors"),)
    monkeypatch.setattr(biencoder, "MINILM_SHA256", known)
    begun = biencoder.load_side("minilm", "question")  # and counts in full precision again
    assert begun.config.pooling == "cls" and {w.dtype for w in begun.parameters()} == {torch.float32}


def test_of_what_is_gathered_checkpoints_are_no_part(tmp_path):
    run = tmp_path / "saved" / "t5" / "run"
    for folder in (run, run / "checkpoints" / "step-00000002"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text("{}")
    assert gather(Paths(tmp_path), tmp_path / "results" / "gathered") == []
    there = [f.relative_to(tmp_path) for f in (tmp_path / "results").rglob("args.json")]
    assert [f.as_posix() for f in there] == ["results/gathered/saved/t5/run/args.json"]


def test_only_fp32_becomes_half_precision():
    for tensor in (torch.tensor([70_001]), torch.tensor([1e5], dtype=torch.bfloat16)):
        assert half(tensor).dtype == tensor.dtype and torch.equal(half(tensor), tensor)
    assert half(torch.ones(1)).dtype == torch.float16
