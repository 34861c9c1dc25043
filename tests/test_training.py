"""The loop: one objective whatever the split into micro-batches and processes, exact resume, nothing lost."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed, assert_same_run, interrupted, kill_at, logged, newest, wait_for_step, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import DEFAULTS, Net, toy_data, toy_loop, train

import checkpoints
import quick
import runs
import session
import training
from dataloaders import Data
from options import UserError
from session import Session, memory_advice

TOY = Path(__file__).with_name("toy.py")
pytestmark = pytest.mark.usefixtures("the_end_is_kept")
GOLDEN = [3.7121, 3.6842, 3.7728, 3.6733, 3.5745, 3.6718]  # measured with torch 2.13


def losses(folder: Path, kind: str = "train") -> list[float]:
    found = [r["loss"] for r in logged(folder, kind)]
    assert found
    return found


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, capsys):
    for steps, said in ((3, False), (4, True), (99, True)):
        train(tmp_path / str(steps), data=toy_data(count=8), batch_size=2, warmup_steps=steps, epochs=1)
        assert ("so its rate never reaches --lr" in capsys.readouterr().out) == said


# ---------------------------------------------------------------------------------------------- the objective


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_splitting_a_step_changes_neither_loss_nor_weights(tmp_path, size, accumulate):
    data = toy_data(count=9 if size == 3 else 8)
    whole = train(tmp_path / "whole", data=data, batch_size=len(data), dropout=0.0, epochs=3)
    split = train(
        tmp_path / "split", data=data, batch_size=size, accumulate=accumulate, dropout=0.0, epochs=3
    )
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    common = ["dropout=0.0", "epochs=2"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(TOY),
            str(tmp_path / "two"),
            "batch_size=3",
            *common,
        ],
        check=False,
        capture_output=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    train(tmp_path / "one", batch_size=6, dropout=0.0, epochs=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "two", "valid") == pytest.approx(losses(tmp_path / "one", "valid"), rel=1e-5)


def test_a_stand_in_for_a_process_without_an_example_counts_for_nothing(tmp_path):
    loop = toy_loop(tmp_path / "run")
    loop._prepare()
    real, stand_in = (loop.update.collate([0], stand_in=stand_in) for stand_in in (False, True))
    assert loop.update.count_units([real, stand_in]) == loop.update.count_units([real])


def test_on_the_processor_nothing_is_opened_on_a_gpu(monkeypatch):
    def opened(*_):
        raise AssertionError("a context on the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state", "init"):
        monkeypatch.setattr(torch.cuda, name, opened)
    with session.own_random_stream(3):
        torch.rand(1)
    state = session.random_state()
    session.set_random_state(state | {"cuda": state["torch"]})  # of a checkpoint from a GPU


def test_a_stream_of_ones_own_leaves_all_others_where_they_were_whatever_happens_in_it():
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    begun = session.random_state()
    expected = draws()
    session.set_random_state(begun)
    with pytest.raises(KeyboardInterrupt), session.own_random_stream(3):
        own = draws()
        raise KeyboardInterrupt
    assert draws() == expected
    with session.own_random_stream(3):
        assert draws() == own
    with session.own_random_stream(4):
        assert all(a != b for a, b in zip(draws(), own, strict=True))


def test_after_a_training_a_signal_ends_what_it_ended_before():
    before = [signal.getsignal(number) for number in runs.signals_to_stop()]
    with session.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in runs.signals_to_stop()] == before


def test_same_seed_same_losses_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(seed)
        train(tmp_path / name, seed=seed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_the_numbers_do_not_drift(tmp_path):
    """Losses of this very run, stored once: a change of the loop's mathematics shows here."""
    train(tmp_path / "run", epochs=1, accumulate=2, batch_size=2, dropout=0.0)
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN, rel=1e-3)


def test_where_memory_will_end_is_said_once_and_what_takes_less(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "memory_held", lambda: (21.2, 23.4))
    train(tmp_path / "full")
    said = capsys.readouterr().out
    assert said.count("up to 21.2 of the machine's 23.4 GiB of memory") == 1
    assert "--batch-size 2 --accumulate 2, as many examples an update, take less" in said
    monkeypatch.setattr(session, "memory_held", lambda: (12.0, 23.4))
    train(tmp_path / "roomy")
    assert "GiB" not in capsys.readouterr().out
    monkeypatch.undo()
    held, there = session.memory_held()
    assert 0.01 < held < there


@pytest.mark.parametrize(
    ("schedule", "rates"), [("constant", [1, 2, 3, 3, 3, 3, 3]), ("linear", [1, 2, 3, 2.25, 1.5, 0.75, 0])]
)
def test_every_schedule_warms_up(tmp_path, schedule, rates):
    train(tmp_path / "run", schedule=schedule, warmup_steps=3, lr=0.03, max_steps=7)
    assert [row["lr"] for row in logged(tmp_path / "run", "train")] == pytest.approx(
        [rate / 100 for rate in rates], abs=1e-9
    )


def test_no_limit_limits_no_gradient(tmp_path):
    def large(loop, terms):
        return {name: 100 * term for name, term in terms.items()}

    for name, clip in (("none", 0.0), ("high", 1e9), ("low", 1.0)):
        train(tmp_path / name, spoil=large, clip=clip, max_steps=6)
    assert losses(tmp_path / "none") == losses(tmp_path / "high") != losses(tmp_path / "low")


def test_one_batch_can_be_learned_by_heart(tmp_path):
    data = toy_data(count=4)
    train(tmp_path / "run", data=data, epochs=300, lr=0.05, dropout=0.0, schedule="constant", log_every=100)
    assert losses(tmp_path / "run")[-1] < 0.05


def test_evaluation_in_between_changes_nothing_in_training(tmp_path):
    train(tmp_path / "seldom")
    train(tmp_path / "often", eval_every=1)
    assert losses(tmp_path / "seldom") == losses(tmp_path / "often")


def test_an_evaluation_keeps_nothing_for_gradients(tmp_path):
    kept = []

    def evaluate(loop):
        kept.append(loop.model(torch.ones(1, 2, dtype=torch.long))[1].requires_grad)
        return {"loss": 1.0}

    train(tmp_path / "run", evaluate=evaluate)
    assert kept == [False] * 3


def test_each_batch_is_made_once_and_in_the_order_of_the_plan(tmp_path):
    """Also those that are made while the update before is at work."""
    data, made = toy_data(), []
    noted = Data(data.lengths, lambda numbers: made.append(list(numbers)) or data.collate(numbers))
    loop = train(tmp_path / "run", data=noted, epochs=2)
    updates = [numbers for epoch in (0, 1) for numbers in loop.plan(epoch)]
    assert [numbers for numbers in made if len(numbers) < len(data)] == updates


def test_weight_decay_leaves_vectors_alone(tmp_path):
    loop = toy_loop(tmp_path / "run")
    loop._prepare()
    decayed, free = loop.update.optimizer.param_groups
    assert (
        {p.ndim for p in free["params"]} == {1} and free["weight_decay"] == 0 and decayed["weight_decay"] > 0
    )


# ----------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 4, 6, 9, 12])  # six steps an epoch: inside and at the end of epochs
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, step, accumulate):
    settings = {
        "save_every": 1,
        "accumulate": accumulate,
        "batch_size": 4 // accumulate,
        "log_every": 4,
        "patience": 9,
    }
    train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "cut", spoil=kill_at(step), **settings)
    train(tmp_path / "cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_says_so_and_trains_no_more(tmp_path, capsys):
    train(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert toy_loop(tmp_path / "run").train()["already_finished"]
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "part", ["model.safetensors", "state.pt", "state.json", "args.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys, part, how):
    train(tmp_path / "whole", save_every=2)
    newest = interrupted(tmp_path / "cut")[-1]
    if how == "missing":
        (newest / part).unlink()
    elif how == "truncated":
        (newest / part).write_bytes((newest / part).read_bytes()[:-9])
    else:
        flip(newest / part)
        if part == "manifest.json":
            (newest / part).write_text("{}")
    loop = toy_loop(tmp_path / "cut", save_every=2)
    result = loop.train()
    shown = capsys.readouterr().out
    assert f"{newest} is damaged" in shown and f"{newest}: set aside as damaged-{newest.name}-" in shown
    assert list(newest.parent.glob(f"damaged-{newest.name}-*"))
    loop.finish(result)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_an_explicit_checkpoint_that_is_damaged_is_an_error(tmp_path):
    newest = interrupted(tmp_path / "run")[-1]
    flip(newest / "model.safetensors")
    with pytest.raises(UserError, match="sha256"):
        train(tmp_path / "run", save_every=2, resume=str(newest))
    with pytest.raises(UserError, match="no such folder"):
        train(tmp_path / "run", save_every=2, resume=str(tmp_path / "nowhere"))


def test_where_no_good_checkpoint_is_left_nothing_is_begun_anew_unasked(tmp_path):
    for checkpoint in interrupted(tmp_path / "run"):
        flip(checkpoint / "state.pt")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(UserError, match="no good checkpoint is left; --overwrite"):
            train(tmp_path / "run", save_every=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
    train(tmp_path / "run", save_every=2, overwrite=True)


def test_a_damaged_best_checkpoint_is_said_before_more_time_is_spent(tmp_path):
    best = interrupted(tmp_path / "run")[0]
    assert best.name == "step-0000006"
    flip(best / "model.safetensors")
    with pytest.raises(UserError, match=f"{best}: the best checkpoint so far is damaged"):
        train(tmp_path / "run", save_every=2)


def test_the_best_of_the_checkpoint_before_is_kept_too(tmp_path):
    """The newest is the new best and damaged: the one before still has the best that it knows."""
    better = [3.0, 2.0, 1.0]
    train(tmp_path / "whole", save_every=2, evaluate=values_of(*better))
    newest = interrupted(tmp_path / "cut", step=13, evaluate=values_of(*better))[-1]
    assert newest.name == "step-0000012"
    flip(newest / "state.pt")
    train(tmp_path / "cut", save_every=2, evaluate=values_of(*better))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_in_an_evaluation(tmp_path):
    """No update before it is lost, though nothing asked for checkpoints in between."""

    def evaluate(loop):
        if loop.state.step == 12 and not spared:
            raise Killed
        return {"loss": 1.0 / loop.state.step}

    spared = False
    with pytest.raises(Killed):
        train(tmp_path / "cut", evaluate=evaluate)
    assert sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1].name == "step-0000012"
    spared = True
    train(tmp_path / "cut", evaluate=evaluate)
    train(tmp_path / "whole", evaluate=evaluate)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_between_an_evaluation_and_its_checkpoint(tmp_path, monkeypatch):
    """The evaluation is logged, then made again: the log has it once."""
    real = checkpoints.write_checkpoint

    def write(folder, step, *args, **kwargs):
        if step == 12 and (folder / "step-0000012").exists():
            raise Killed
        return real(folder, step, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "write_checkpoint", write)
        train(tmp_path / "cut")
    train(tmp_path / "cut")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_after_its_last_evaluation_a_run_is_saved_without_dropout(tmp_path):
    def stop(folder):
        raise Killed

    def reload(folder):
        copy = Net(0.5)
        copy.load_state_dict(loop.model.state_dict())
        return copy

    loop = toy_loop(tmp_path / "run", max_steps=2, dropout=0.5)
    loop.export = stop
    with pytest.raises(Killed):
        loop.train()
    loop = toy_loop(tmp_path / "run", max_steps=2, dropout=0.5)
    loop.reload, loop.probe = reload, lambda net: net(torch.ones(9, 2, dtype=torch.long))[0]
    assert loop.train()["steps"] == 2  # else the saved model would answer otherwise than the trained one


def test_more_max_steps_than_there_are_end_with_the_last_update(tmp_path):
    loop = train(tmp_path / "run", schedule="constant", max_steps=1000, eval_every=1000)
    assert loop.state.step == 18 and loop.state.best_step == 18


def test_another_split_of_an_update_bound_by_tokens(tmp_path):
    """Twice the micro-batches of half the tokens are the same updates; of as many tokens they are not."""
    settings = {"save_every": 2, "batch_size": 4, "batch_tokens": 24, "dropout": 0.0}
    train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "cut", spoil=kill_at(4), **settings)
    with pytest.raises(UserError, match="--batch-tokens x --accumulate: 24 then, 48 now"):
        train(tmp_path / "cut", **settings | {"batch_size": 2, "accumulate": 2})
    train(tmp_path / "cut", **settings | {"batch_size": 2, "accumulate": 2, "batch_tokens": 12})
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_an_older_checkpoint_leaves_no_other_future_in_place(tmp_path):
    loop = toy_loop(tmp_path / "run", save_every=2)
    loop.train()
    loop.run.close()
    (tmp_path / "run" / "result.json").write_text("{}")  # finished, by a version that kept the checkpoints
    older = tmp_path / "run" / "checkpoints" / "step-0000016"
    with pytest.raises(Killed):
        train(tmp_path / "run", save_every=2, resume=str(older), spoil=kill_at(17))
    assert not (tmp_path / "run" / "result.json").exists()
    assert [p.name[:18] for p in sorted(older.parent.glob("later-*"))] == ["later-step-0000018"]
    train(tmp_path / "run", save_every=2)
    train(tmp_path / "whole", save_every=2)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_what_was_set_aside_can_be_gone_on_from(tmp_path):
    settings = {"save_every": 1, "eval_every": 3}
    train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "run", spoil=kill_at(12), **settings)
    kept = tmp_path / "run" / "checkpoints"
    older, _, last = sorted(kept.iterdir())  # the best before, and the newest two
    assert json.loads((last / "state.json").read_text())["best_step"] == int(last.name[5:]) == 12
    with pytest.raises(Killed):  # back, and on to another one in its place
        train(tmp_path / "run", resume=str(older), spoil=kill_at(13), **settings)
    [later] = kept.glob(f"later-{last.name}-*")
    train(tmp_path / "run", resume=str(later), **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_command_that_goes_on_neither_begins_anew_nor_goes_back(monkeypatch):
    monkeypatch.setattr(
        sys,
        "orig_argv",
        ["python", "-u", "train_t5.py", "--overwrite", "--resume", "a b/step-1", "--name", "x y"],
    )
    assert runs.command_line(again=True) == "python train_t5.py --name 'x y'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-u", "-m", "DPR.train_dpr", "--resume=x", "--epochs", "2"]
    )
    assert (
        runs.command_line(again=True)
        == "torchrun --standalone --nproc-per-node=2 -m DPR.train_dpr --epochs 2"
    )
    assert (
        runs.command_line()
        == "torchrun --standalone --nproc-per-node=2 -m DPR.train_dpr --resume=x --epochs 2"
    )


def test_a_row_of_the_log_is_the_mean_of_the_steps_since_the_one_before(tmp_path):
    train(tmp_path / "each", max_steps=6)
    train(tmp_path / "some", max_steps=6, log_every=4)
    each, some = losses(tmp_path / "each"), losses(tmp_path / "some")
    assert some == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 2])


def test_the_seconds_of_a_training_are_without_its_evaluations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes_a_second(loop, terms):
        clock[0] += 1
        return terms

    def takes_long(loop):
        clock[0] += 100
        return {"loss": 1.0}

    loop = train(tmp_path / "run", spoil=takes_a_second, evaluate=takes_long)
    assert loop.state.evaluations == 3 and loop.state.seconds == loop.state.step


def test_after_a_resume_tensorboard_shows_each_step_once(tmp_path):
    interrupted(tmp_path / "run", step=9)
    train(tmp_path / "run", save_every=2)
    shown = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")
    assert [event.step for event in shown] == [row["step"] for row in logged(tmp_path / "run", "train")]


def test_the_rest_of_a_run_is_on_record(tmp_path, capsys, monkeypatch):
    interrupted(tmp_path / "run")
    monkeypatch.setattr(runs, "package_versions", lambda: {"torch": "99"})
    train(tmp_path / "run", save_every=2)
    made = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [r["step"] for r in made["resumed"]] == [10] and made["resumed"][0]["versions"] == {
        "torch": "99"
    } != made["versions"]
    assert re.search(r"note: torch was \S+, is now 99", capsys.readouterr().out)
    assert "resumed 1 times" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("point", range(4))
def test_killed_before_the_first_checkpoint(tmp_path, monkeypatch, point):
    """At any write of the run folder's first files: the same command begins again."""
    real, left = Path.replace, [point]

    def replace(self, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        train(tmp_path / "run")
    (tmp_path / "run" / ".args.json.0a1b2c3d.part").write_text(
        "{"
    )  # what a kill leaves, where an exception cleans up
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.part"))


@pytest.mark.parametrize("deletions", [1, 2, 4])
def test_killed_while_overwriting(tmp_path, monkeypatch, deletions):
    """What is left half deleted is neither a finished run nor a stranger's folder."""
    train(tmp_path / "run")
    left = [deletions]

    def counted(function):
        def delete(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return delete

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        train(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "result.json").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(tmp_path / "other")  # without the flag: nothing of the old run is taken for a beginning
    train(tmp_path / "usual")
    assert_same_run(tmp_path / "usual", tmp_path / "other")
    train(tmp_path / "run", overwrite=True, lr=0.02)
    train(tmp_path / "fresh", lr=0.02)
    assert_same_run(tmp_path / "fresh", tmp_path / "run")


def test_resuming_from_an_explicit_older_checkpoint(tmp_path):
    train(tmp_path / "whole", save_every=2)
    older = interrupted(tmp_path / "cut")[-2]
    train(tmp_path / "cut", save_every=2, resume=str(older))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_resume_whose_examples_come_in_another_order_is_refused(tmp_path):
    """As after a change of this code: the rest of the epoch would hold examples that were learnt before."""
    interrupted(tmp_path / "run")
    same = toy_data()
    other = replace(same, bare_lengths=[-length for length in same.lengths])
    with pytest.raises(UserError, match="the examples came in another order then"):
        train(tmp_path / "run", save_every=2, data=other)
    train(tmp_path / "run", save_every=2, data=same)
    assert toy_loop(tmp_path / "run", data=other).train()["already_finished"]  # no rest to learn


def test_changed_mathematics_is_refused_with_both_values_and_the_rest_is_listed(tmp_path, capsys):
    interrupted(tmp_path / "run")
    with pytest.raises(UserError, match=r"--lr: 0.01 then, 0.02 now"):
        train(tmp_path / "run", save_every=2, lr=0.02)
    train(tmp_path / "run", save_every=3)
    assert "--save-every was 2, is now 3" in capsys.readouterr().out


def test_a_flag_that_the_code_of_then_did_not_have_is_no_other_setting(tmp_path, capsys, monkeypatch):
    train(tmp_path / "run")
    file = tmp_path / "run" / "args.json"
    saved = json.loads(file.read_text())
    del saved["args"]["clip"]
    file.write_text(json.dumps(saved))
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_t5.py", "--clip=1"])
    with pytest.raises(UserError, match="--clip: None then, .* now"):  # one that is given may be one
        toy_loop(tmp_path / "run").train()
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_t5.py"])
    assert toy_loop(tmp_path / "run").train()["already_finished"]
    assert "note: --clip: not recorded when the run began" in capsys.readouterr().out


def test_resume_never_refuses_what_is_there_and_overwrite_begins_anew(tmp_path):
    interrupted(tmp_path / "run")
    with pytest.raises(UserError, match="--overwrite"):
        train(tmp_path / "run", resume="never")
    train(tmp_path / "run", lr=0.02, overwrite=True)
    train(tmp_path / "fresh", lr=0.02)
    assert losses(tmp_path / "run") == losses(tmp_path / "fresh")
    train(tmp_path / "run", lr=0.01, resume="never", overwrite=True)
    assert losses(tmp_path / "run") != losses(tmp_path / "fresh")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="choose another --name"):
            train(tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_weights_of_another_shape_are_refused(tmp_path):
    newest = interrupted(tmp_path / "run")[-1]
    loop = toy_loop(tmp_path / "other")
    loop.model.kind = torch.nn.Linear(16, 3)
    with pytest.raises(UserError, match="do not fit"):
        loop._load_weights(newest)


def test_a_malicious_checkpoint_runs_no_code(tmp_path):
    class Touch:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    newest = interrupted(tmp_path / "run")[-1]
    torch.save({"optimizer": Touch()}, newest / "state.pt")
    listing = json.loads((newest / "manifest.json").read_text())
    listing["files"]["state.pt"] = {
        "bytes": (newest / "state.pt").stat().st_size,
        "sha256": checkpoints.sha256(newest / "state.pt"),
    }
    (newest / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match="state.pt: not plain tensors"):
        train(tmp_path / "run", save_every=2)
    assert not (tmp_path / "pwned").exists()


# --------------------------------------------------------------------------------- best, rotation, not finite


def values_of(*values):
    """An evaluation that gives these values, one after the other."""
    return lambda loop: {"loss": values[loop.state.evaluations]}


def test_nan_is_never_best(tmp_path):
    loop = train(tmp_path / "run", evaluate=values_of(math.nan, 0.5, 0.7))
    assert loop.state.best == 0.5 and loop.state.best_step == 12


def test_all_nan_is_said(tmp_path):
    with pytest.raises(UserError, match="not finite in any of 3 evaluations"):
        train(tmp_path / "run", evaluate=lambda loop: {"loss": math.nan})


def test_the_best_and_the_last_two_checkpoints_are_kept_and_the_best_is_loaded(tmp_path):
    seen = {}

    def evaluate(loop):
        seen[loop.state.step] = {k: v.clone() for k, v in loop.model.state_dict().items()}
        return {"loss": [3.0, 1.0, 2.0, 2.0, 2.0, 2.0][loop.state.evaluations]}

    loop = toy_loop(tmp_path / "run", epochs=6, evaluate=evaluate)
    loop.train()
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-0000012",
        "step-0000030",
        "step-0000036",
    ]
    assert all(torch.equal(v, seen[12][k]) for k, v in loop.model.state_dict().items())
    assert (tmp_path / "run" / "exported").read_text() == "12"


def test_of_equally_good_evaluations_the_first_is_the_best_and_patience_runs_out(tmp_path):
    loop = train(tmp_path / "run", epochs=9, patience=2, evaluate=lambda loop: {"loss": 1.0})
    assert (loop.state.best_step, loop.state.step) == (6, 18)


def test_patience_stops_early_and_survives_a_resume(tmp_path):
    settings = {"epochs": 9, "patience": 2}
    values = [1.0, 2.0, 3.0, 4.0]
    loop = train(tmp_path / "whole", evaluate=values_of(*values), **settings)
    assert loop.state.step == 18
    with pytest.raises(Killed):
        train(tmp_path / "cut", evaluate=values_of(*values), spoil=kill_at(13), **settings)
    assert train(tmp_path / "cut", evaluate=values_of(*values), **settings).state.step == 18


@pytest.mark.parametrize("term", ["word", "class"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_term_that_is_not_finite_stops_before_the_update_and_is_named(tmp_path, term, bad):
    def spoil(loop, terms):
        if loop.state.step == 7:
            terms[term] = terms[term] * bad
        return terms

    loop = toy_loop(tmp_path / "run", spoil=spoil, save_every=1)
    with pytest.raises(UserError, match=rf"step 8: not finite: {term} on .*row \d"):
        loop.train()
    stored = weights(tmp_path / "run")
    assert all(torch.equal(v, stored[k]) for k, v in loop.model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    def spoil(loop, terms):
        if loop.state.step == 3:
            terms["class"] = terms["class"] + 0 * (terms["class"] - terms["class"].detach()).sqrt()
        return terms

    with pytest.raises(UserError, match="step 4: not finite: gradient"):
        train(tmp_path / "run", spoil=spoil)


# ---------------------------------------------------------------------------------------------------- signals


def start(folder: Path, **settings) -> subprocess.Popen:
    words = [f"{k}={v}" for k, v in settings.items()]
    return subprocess.Popen(
        [sys.executable, str(TOY), str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the suite may run under nohup
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number, code):
    process = start(tmp_path / "cut", epochs=4, pause=0.1)
    wait_for_step(tmp_path / "cut", 3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and "goes on from here" in out
    train(tmp_path / "cut", epochs=4)
    train(tmp_path / "whole", epochs=4)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_under_nohup_the_end_of_the_terminal_ends_nothing(tmp_path):
    words = ["nohup", sys.executable, str(TOY), str(tmp_path / "run"), "epochs=4", "pause=0.05"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "run", 2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and (tmp_path / "run" / "result.json").exists()


def test_a_signal_saves_also_where_nobody_reads_the_output_any_more(tmp_path):
    process = start(tmp_path / "run", epochs=4, pause=0.1)
    wait_for_step(tmp_path / "run", 2)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert not (tmp_path / "run" / "result.json").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_second_signal_exits_at_once(tmp_path):
    process = start(tmp_path / "run", pause=12)
    wait_for_step(tmp_path / "run", 1)  # the second takes twelve seconds, longer than a busy machine stalls
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # within a second: the same wish, delivered twice
    time.sleep(1.2)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 2
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_second_run_in_the_same_folder_is_refused_and_the_lock_dies_with_its_process(tmp_path):
    process = start(tmp_path / "run", pause=0.3)
    wait_for_step(tmp_path / "run", 1)
    with pytest.raises(UserError, match="another process"):
        train(tmp_path / "run")
    process.kill()
    process.communicate()
    train(tmp_path / "run")


# ---------------------------------------------------------------------------------------- damage while saving


KILLER = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import checkpoints, pathlib
from toy import train
def counted(function):
    def wrapped(*args, **kwargs):
        global left
        if armed:
            left -= 1
            if left < 0:
                os._exit(9)
        return function(*args, **kwargs)
    return wrapped
armed = False
os.fsync, os.rename = counted(os.fsync), counted(os.rename)
pathlib.Path.rename, pathlib.Path.replace = counted(pathlib.Path.rename), counted(pathlib.Path.replace)
pathlib.Path.write_text, pathlib.Path.mkdir = counted(pathlib.Path.write_text), counted(pathlib.Path.mkdir)
checkpoints.shutil.rmtree = counted(checkpoints.shutil.rmtree)
def spoil(loop, terms):
    global armed
    armed = loop.state.step >= 7
    return terms
for point, folder in enumerate(sys.argv[1:]):
    pid = os.fork()  # what is imported once serves all
    if not pid:
        left = point
        train(pathlib.Path(folder), spoil=spoil, save_every=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
"""


def test_a_kill_at_any_write_point_of_a_save_loses_nothing(tmp_path):
    """os._exit before the n-th write operation after step 7, for every n of two saves."""
    train(tmp_path / "whole", save_every=2)
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(tests=str(TOY.parent), root=str(TOY.parent.parent)))
    interrupted(tmp_path / "start", step=6)
    folders = [tmp_path / f"cut-{point}" for point in range(24)]
    for folder in folders:
        shutil.copytree(tmp_path / "start", folder)
    subprocess.run(
        [sys.executable, str(script), *map(str, folders)], capture_output=True, timeout=300, check=True
    )
    for point, folder in enumerate(folders):
        good = [c for c in (folder / "checkpoints").glob("step-*") if not checkpoints.faults(c)]
        assert len(good) >= 2
        if point % 3 == 0:
            train(folder, save_every=2)
            assert_same_run(tmp_path / "whole", folder)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    before = interrupted(tmp_path / "run")

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", full)
        with pytest.raises(UserError, match="No space left"):
            checkpoints.write_checkpoint(
                tmp_path / "run" / "checkpoints", 99, lambda folder: (folder / "x").write_text("y")
            )
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before
    assert all(not checkpoints.faults(c) for c in before)


def test_a_save_that_cannot_be_written_whole_leaves_the_last_good_checkpoint(tmp_path):
    """A file size limit stands for the full disk: the library's own error arrives as one plain message."""
    before = interrupted(tmp_path / "run")
    code = f"""
import resource, sys
sys.path[:0] = [{str(TOY.parent)!r}, {str(TOY.parent.parent)!r}]
import pathlib, signal
from toy import train
from options import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    train(pathlib.Path({str(tmp_path / "run")!r}), save_every=2)
except UserError as error:
    sys.exit("refused: " + str(error))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stderr
    assert "refused: " in shown and "cannot be written" in shown
    assert [c for c in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))] == before
    assert all(not checkpoints.faults(c) for c in before)


FULL_DISK = """
import os, pathlib, shutil, sys
sys.path[:0] = [{tests!r}, {root!r}]
import checkpoints
import quick
from dataloaders import Data
from options import UserError
from toy import keep_the_end, train
keep_the_end()
disk, room = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def fill(loop, terms):
    if loop.state.step == 8:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(free - room))
    return terms
try:
    train(disk / "run", spoil=fill, save_every=1)
    sys.exit("the disk was never full")
except UserError as error:
    assert "No space left" in str(error) or "cannot be written" in str(error), error
stand = sorted((disk / "run" / "checkpoints").iterdir())
# the best and the last two, no litter
assert [c.name for c in stand] == ["step-0000006", "step-0000007", "step-0000008"], stand
assert not any(checkpoints.faults(c) for c in stand)
(disk / "ballast").unlink()
train(disk / "run", save_every=1)
shutil.copytree(disk / "run", sys.argv[3])
"""


@pytest.mark.parametrize("room", [0, 8_000, 24_000, 40_000])
def test_a_disk_that_is_full_in_earnest(tmp_path, room):
    """A tmpfs fills up before a save, but for some `room`: the run says why it stops, and later goes on."""
    (tmp_path / "disk").mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.format(tests=str(TOY.parent), root=str(TOY.parent.parent)))
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=2m tmpfs {tmp_path / 'disk'}"
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    train(tmp_path / "whole", save_every=1)
    command = f"{mount} && {sys.executable} {script} {tmp_path / 'disk'} {room} {tmp_path / 'cut'}"
    done = subprocess.run([*inside, command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_an_unwritable_folder_is_a_plain_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        train(tmp_path / "file" / "run")


def test_a_checkpoint_that_is_saved_again_is_never_away(tmp_path):
    """The step's first copy (evaluation due) gives way to the second; a kill between renames is mended."""
    folder = tmp_path / "checkpoints"
    for content in ("first", "second"):
        checkpoints.write_checkpoint(folder, 5, lambda f, c=content: (f / "x").write_text(c))
    assert (folder / "step-0000005" / "x").read_text() == "second" and len(list(folder.iterdir())) == 1
    (folder / "step-0000005").rename(folder / ".old-step-0000005")
    checkpoints.sweep(folder)
    assert checkpoints.newest_good(folder) == folder / "step-0000005"


# ----------------------------------------------------------------------------------------------------- device


def test_a_process_that_computes_on_one_device_takes_no_other_in_silence(monkeypatch):
    Session("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "auto"):
        with pytest.raises(UserError, match=f"--device {device}: this process already computes on another"):
            Session(device)


def test_fp32_is_fp32_whatever_the_environment_asks_for():
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    Session("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_gaps_between_what_a_cpu_holds_are_given_back():
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [torch.ones(25_000) for _ in range(2_000)]  # 200 MB in small pieces
    kept = blocks[::50]
    del blocks
    before = held()
    Session("cpu").release_gaps()
    assert before - held() > 100e6 and all(bool((block == 1).all()) for block in kept)


def test_out_of_memory_names_the_flags_to_change(tmp_path):
    with pytest.raises(UserError, match="--batch-size 4 --accumulate 1; try --batch-size 2 --accumulate 2"):
        train(tmp_path / "run", memory=3)
    # where another micro-batch is another loss the run cannot go on with them
    with pytest.raises(
        UserError, match="try --batch-size 2 --accumulate 2 in a new run .this one's loss"
    ) as no:
        train(tmp_path / "other", memory=3, micro_batches_matter=True)
    assert "--batch-size auto" not in str(no.value)


def test_several_processes_are_not_sent_to_a_flag_that_is_refused_to_them(tmp_path, monkeypatch):
    for world, told in (("1", True), ("2", False)):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match="--batch-size 2 --accumulate 2") as no:  # noqa: SIM117
            with memory_advice("step 1", SimpleNamespace(**DEFAULTS)):
                raise torch.OutOfMemoryError("CUDA out of memory.")
        assert ("--batch-size auto" in str(no.value)) == told


def test_the_advice_can_be_followed_on_resume(tmp_path, capsys):
    interrupted(tmp_path / "run")
    saved = newest(tmp_path / "run").name
    train(tmp_path / "run", save_every=2, batch_size=2, accumulate=2)
    assert f"{saved} (step" in capsys.readouterr().out  # from which it went on


def test_batch_size_auto_finds_what_fits_and_keeps_the_update(tmp_path):
    loop = train(tmp_path / "auto", memory=3, batch_size="auto", effective_batch=8, dropout=0.0)
    assert (loop.options.batch_size, loop.options.accumulate) == (2, 4)
    train(tmp_path / "given", batch_size=8, dropout=0.0)
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "given"), rel=1e-5)


def test_batch_size_auto_tries_the_longest_examples_of_each_kind(tmp_path):
    """A text can be long in what is read, in what is written, and in what is read apart."""
    asked, data = [], toy_data()
    kinds = [[n == 7 for n in range(len(data))], [n == 11 for n in range(len(data))]]
    recorded = Data(data.lengths, lambda numbers: asked.append(numbers) or data.collate(numbers), kinds)
    train(tmp_path / "auto", data=recorded, batch_size="auto", effective_batch=1, max_steps=1)
    assert asked[:3] == [[data.lengths.index(max(data.lengths))], [7], [11]]


def test_where_not_even_one_example_fits_that_is_said_and_another_error_is_no_lack_of_memory():
    tried: list[int] = []

    def fails(error: Exception):
        def try_out(size: int) -> int:
            tried.append(size)
            raise error

        return try_out

    with pytest.raises(UserError, match="--batch-size auto: not even one example fits; shorter sequences"):
        session.largest_that_fits(6, fails(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(RuntimeError, match="shapes"):
        session.largest_that_fits(6, fails(RuntimeError("shapes")))
    assert tried == [6, 3, 2, 1, 6]


def test_batch_size_auto_tries_beside_the_gradients_of_a_batch_before(tmp_path, monkeypatch):
    beside, forward = [], Net.forward
    monkeypatch.setattr(
        Net, "forward", lambda net, ids: beside.append(net.kind.bias.grad is not None) or forward(net, ids)
    )
    train(tmp_path / "run", batch_size="auto", effective_batch=8, max_steps=1)
    assert beside[:2] == [False, True]


def test_batch_size_auto_seeks_anew_where_the_run_is_begun_anew(tmp_path):
    auto = {"batch_size": "auto", "effective_batch": 8, "max_steps": 1}
    train(tmp_path / "run", memory=3, **auto)
    loop = train(tmp_path / "run", memory=5, overwrite=True, **auto)
    assert (loop.options.batch_size, loop.options.accumulate) == (4, 2)


#: as a GPU says it, where it is not torch's own allocator that fails
ELSEWHERE = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory",
]


@pytest.mark.parametrize("said", ELSEWHERE)
def test_memory_that_ends_elsewhere_is_out_of_memory_too(tmp_path, said):
    short = {"memory": 3, "memory_error": RuntimeError(said)}
    loop = train(tmp_path / "auto", **short, batch_size="auto", effective_batch=8, max_steps=1)
    assert (loop.options.batch_size, loop.options.accumulate) == (2, 4)
    with pytest.raises(
        UserError, match="out of memory with --batch-size 4 .* try --batch-size 2 --accumulate 2"
    ):
        train(tmp_path / "run", **short)


def test_batch_size_auto_has_the_frozen_weights_as_they_are_in_training(tmp_path, monkeypatch):
    seen = []

    class Frozen(Net):
        def __init__(self, dropout):
            super().__init__(dropout)
            self.body[0].requires_grad_(False)

        def forward(self, ids):
            seen.append(self.body[0].weight.dtype)
            return super().forward(ids)

    monkeypatch.setattr("toy.Net", Frozen)
    auto = {"batch_size": "auto", "effective_batch": 8, "max_steps": 1, "precision": "bf16"}
    train(tmp_path / "run", **auto, evaluate=lambda _: {"loss": 1.0})
    assert set(seen) == {torch.bfloat16}


def test_what_was_saved_is_checked_without_the_trained_models_memory(tmp_path):
    held = []

    def reload(folder):
        held.append(
            len(loop.update.optimizer.state) + sum(p.grad is not None for p in loop.model.parameters())
        )
        copy = Net(0.1)
        copy.load_state_dict(loop.model.state_dict())
        return copy

    loop = toy_loop(tmp_path / "run", max_steps=2)
    loop.reload, loop.probe = reload, lambda net: net(torch.ones(1, 2, dtype=torch.long))[0]
    loop.train()
    assert held == [0]


def test_what_answers_with_no_numbers_once_it_is_saved_does_not_finish(tmp_path):
    def reload(folder):
        spoilt = Net(0.1)
        torch.nn.init.constant_(spoilt.words.weight, math.nan)
        return spoilt

    loop = toy_loop(tmp_path / "run", max_steps=2)
    loop.reload, loop.probe = reload, lambda net: net(torch.ones(1, 2, dtype=torch.long))[0]
    with pytest.raises(UserError, match="answers otherwise than the trained model"):
        loop.train()


def test_batch_size_auto_tries_the_kernels_that_will_train(tmp_path, monkeypatch):
    tried, forward = [], Net.forward
    monkeypatch.setattr(Net, "forward", lambda net, ids: tried.append(type(net.body[2])) or forward(net, ids))
    train(tmp_path / "run", batch_size="auto", effective_batch=8, max_steps=1)
    assert set(tried) == {quick.Dropout}


def test_another_seed_drops_others_out(tmp_path):
    """Of one example there is one order, and both begin with the same weights."""

    begin, found = Net(0.5).state_dict(), []
    for seed in (3, 4):
        loop = toy_loop(tmp_path / str(seed), seed=seed, dropout=0.5, data=toy_data(1))
        loop.model.load_state_dict(begin)
        loop.train()
        found.append([row["loss"] for row in logged(tmp_path / str(seed), "train")])
    assert found[0] != found[1]


def test_what_another_process_may_be_saving_is_swept_a_day_later(tmp_path):
    part = tmp_path / ".tmp-step-0000004-0a1b2c3d"
    part.mkdir()
    checkpoints.sweep(tmp_path, alone=False)
    assert part.exists()
    os.utime(part, (0, 0))
    checkpoints.sweep(tmp_path, alone=False)
    assert not part.exists()
