"""--targets all: the speaker's turns are learnt beside the listener's, which alone are measured."""

import json
from pathlib import Path

import pytest
from conftest import Killed, assert_same_run

import train_glove_t5
import updates
from corpora import all_turns, listener_turns
from options import Paths, UserError

PLAIN = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0".split()
SHORT = "--device cpu --size tiny --batch-size 8 --src-len 40 --tgt-len 12 --epochs 1".split()


def train(workdir: Path, *flags: str) -> dict:
    return train_glove_t5.main(["--workdir", str(workdir), *SHORT, *PLAIN, *flags])


def test_the_speakers_turns_are_learnt_and_the_listeners_measured(workdir, capsys):
    every = train(workdir, "--targets", "all", "--lr", "1e-9", "--no-predict", "--log-every", "1")
    shown = capsys.readouterr().out
    plain = train(workdir, "--lr", "1e-9", "--no-predict")
    # at a rate that moves nothing only what is measured could make a difference
    assert every["valid"] == pytest.approx(plain["valid"], abs=1e-3)
    file = Paths(workdir).dialogues("train")
    turns, listeners = len(all_turns(file)), len(listener_turns(file))
    assert f"{turns:,} training turns, {listeners:,} of them the listener's" in shown
    assert turns > listeners
    folder = Paths(workdir).saved / "glove-t5"
    # named apart by default, and an epoch is of all turns
    assert every["steps"] == -(-turns // 8) > plain["steps"] == -(-listeners // 8)
    flags = json.loads((folder / "plain-all-turns" / "args.json").read_text())["args"]
    assert flags["targets"] == "all"
    # the listener's last, from there
    train(workdir, "--name", "last", "--init-from", str(folder / "plain-all-turns"), "--max-steps", "1")
    assert (folder / "last" / "predictions.tsv").exists()


def test_targets_are_part_of_a_run_that_goes_on_as_if_never_stopped(workdir, monkeypatch, the_end_is_kept):
    flags = ["--targets", "all", "--no-predict", "--save-every", "2", "--max-steps", "6", "--log-every", "1"]
    train(workdir, *flags, "--name", "whole")
    update, done = updates.Update.__call__, []

    def killed_in_the_fifth(self, numbers):
        done.append(0)
        if len(done) == 5:
            raise Killed
        return update(self, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(updates.Update, "__call__", killed_in_the_fifth)
        with pytest.raises(Killed):
            train(workdir, *flags, "--name", "parts")
    with pytest.raises(UserError, match="--targets: 'all' then, None now"):
        train(workdir, *flags[2:], "--name", "parts")
    train(workdir, *flags, "--name", "parts")
    folder = Paths(workdir).saved / "glove-t5"
    assert_same_run(folder / "whole", folder / "parts")


def test_what_the_speakers_turns_lack_is_refused_with_the_flags_that_leave_it_out(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_glove_t5.main(["--workdir", str(tmp_path), "--targets", "all", "--control", "marks"])
    shown = capsys.readouterr().err
    needed = "needs --add-exemplars none, --empathy-loss-w 0, --sentiment-loss-w 0, no --control"
    assert needed in shown
