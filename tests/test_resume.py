"""Every training script, killed and stopped: what goes on then is the uninterrupted run, bit for bit."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Killed, assert_same_run, newest, wait_for_step
from toy import __file__ as TOY

import dpr_exemplar_retriever
import label_dialogues
import recipes
import stages
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from DPR import train_dpr

GENERATOR = [
    "--src-len",
    "40",
    "--tgt-len",
    "12",
    "--exemplar-len",
    "16",
    "--exemplar-model",
    "t5-tiny",
    "--no-predict",
]
#: name: (module, how it is started, its flags, where its runs are)
STAGES = {
    "classifier": (
        train_empathy_classifier,
        ["train_empathy_classifier.py"],
        ["--model", "glove-t5", "--size", "tiny", "--dim", "emo"],
        "empathy",
    ),
    "regressor": (
        train_sentiment_regressor,
        ["train_sentiment_regressor.py"],
        ["--model", "t5", "--size", "tiny"],
        "sentiment",
    ),
    "t5": (
        train_t5,
        ["train_t5.py"],
        ["--model", "t5-tiny", "--add-exemplars", "t5", "--strategy", "1", *GENERATOR],
        "t5",
    ),
    "glove-t5": (
        train_glove_t5,
        ["train_glove_t5.py"],
        ["--size", "tiny", "--strategy", "2", *GENERATOR],
        "glove-t5",
    ),
    "dpr": (train_dpr, ["-m", "DPR.train_dpr"], ["--encoder", "{workdir}/data/bert-tiny"], "dpr"),
}


class Stage:
    """One script on the tiny corpus: two epochs, two micro-batches an update, a save every second update."""

    def __init__(self, name: str, workdir: Path):
        self.module, self.start, flags, place = STAGES[name]
        self.workdir, self.saved = workdir, workdir / "saved" / place
        self.flags = [f.format(workdir=workdir) for f in flags]
        self.flags += [
            "--workdir",
            str(workdir),
            "--device",
            "cpu",
            "--batch-size",
            "4",
            "--accumulate",
            "2",
            "--epochs",
            "2",
            "--lr",
            "1e-3",
        ]
        self.flags += ["--log-every", "1", "--save-every", "2"]

    def run(self, name: str) -> Path:
        self.module.main([*self.flags, "--name", name])
        return self.saved / name

    def spawn(self, name: str) -> subprocess.Popen:
        command = [sys.executable, *self.start, *self.flags, "--name", name]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=STAGES)
def stage(request, trained, tmp_path_factory, the_end_is_kept) -> Stage:
    """With an uninterrupted run to compare with."""
    workdir = tmp_path_factory.mktemp("resume") / request.param
    shutil.copytree(trained, workdir)
    stage = Stage(request.param, workdir)
    stage.run("whole")
    return stage


def updates(folder: Path) -> int:
    return torch.load(newest(folder) / "state.pt", weights_only=True)["scheduler"]["last_epoch"]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8], ids=["in the first epoch", "at its end", "in the second"])
def test_killed_inside_an_update(stage, monkeypatch, capsys, share):
    """After the gradients of all micro-batches, before the update is made."""
    last = int(share * updates(stage.saved / "whole"))
    made = []

    class Dying(torch.optim.AdamW):
        def step(self, closure=None):
            if len(made) == last:
                raise Killed
            made.append(1)
            return super().step(closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Dying)
        with pytest.raises(Killed):
            stage.run(f"cut-{share}")
    assert_same_run(stage.saved / "whole", stage.run(f"cut-{share}"))
    resumed = int(re.search(r"resuming from .* \(step (\d+)\)", capsys.readouterr().out).group(1))
    assert 0 < resumed <= last


def test_stopped_by_the_scheduler_then_killed(stage):
    """SIGTERM: exit 143 and a command that goes on; that one is killed, and the third start finishes."""
    process = stage.spawn("stopped")
    wait_for_step(stage.saved / "stopped", 1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    step, shown = re.search(r"stopped at step (\d+); this goes on from here: (.*)", out).groups()
    process = subprocess.Popen(
        [sys.executable, *shlex.split(shown)[1:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(stage.saved / "stopped", int(step) + 1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_same_run(stage.saved / "whole", stage.run("stopped"))


# --------------------------------------------------------------------------------- stages other than training


def labelling(workdir: Path, name: str) -> tuple:
    words = [
        "--family",
        "glove-t5",
        "--batch-size",
        "2",
        "--splits",
        "train",
        "--output",
        str(workdir / name),
    ]
    return label_dialogues.main, words, workdir / name / "train_labels.csv"


def retrieving(workdir: Path, name: str) -> tuple:
    words = [
        "--path",
        str(workdir / "saved" / "dpr" / "empd"),
        "--batch-size",
        "2",
        "--splits",
        "train",
        "--output",
        str(workdir / name),
    ]
    return dpr_exemplar_retriever.main, words, workdir / name / "train_dpr.csv"


def replying(workdir: Path, name: str) -> tuple:
    folder = workdir / "saved" / "glove-t5" / name
    if not folder.exists():
        plain = [
            "--add-exemplars",
            "none",
            "--empathy-loss-w",
            "0",
            "--sentiment-loss-w",
            "0",
            "--no-predict",
        ]
        train_glove_t5.main(
            ["--workdir", str(workdir), "--size", "tiny", "--max-steps", "1", "--name", name, *plain]
        )
    words = [
        "--inference",
        str(folder),
        "--predict-split",
        "test",
        "--predict-batch-size",
        "1",
        "--max-new-tokens",
        "4",
    ]
    return train_glove_t5.main, words, folder / "predictions.tsv"


@pytest.mark.parametrize("stage", [labelling, retrieving, replying])
def test_an_interrupted_stage_does_the_rest_only(trained_copy, monkeypatch, stage):
    """Killed after its second chunk; the next call makes the others, and the output is as if undisturbed."""
    common = ["--workdir", str(trained_copy), "--device", "cpu"]
    main, words, expected = stage(trained_copy, "undisturbed")
    chunks = []
    real = np.savez

    def savez(handle, **arrays):
        if len(chunks) == limit and "numbers" in arrays:
            raise Killed
        chunks.extend([1] * ("numbers" in arrays))
        real(handle, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    limit = -1
    main([*common, *words])
    in_all = len(chunks)
    main, words, output = stage(trained_copy, "cut")
    chunks.clear()
    limit = 2
    with pytest.raises(Killed):
        main([*common, *words])
    assert not output.exists()
    limit = -1
    main([*common, *words])
    assert len(chunks) == in_all > 2
    assert output.read_bytes() == expected.read_bytes()


def test_a_recipe_that_is_stopped_lets_its_stage_save(tmp_path):
    def stop():
        wait_for_step(tmp_path / "run", 2)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        todo = [recipes.Stage("toy", [TOY, str(tmp_path / "run"), "epochs=4", "pause=0.2"], "toy", "", ())]
        record = stages.Record(tmp_path / "stages.json")
        stages.settle_outcome(stages.run(todo, record, tmp_path, stages.Box()), todo)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "stopped at step" in next(tmp_path.glob("01-*.log")).read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


# ------------------------------------------------------------------------------------------ several processes


def torchrun(folder: Path, **settings) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        TOY,
        str(folder),
    ]
    command += [f"{k}={v}" for k, v in {"epochs": 4, "batch_size": 2, **settings}.items()]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def workers(process: subprocess.Popen) -> list[int]:
    """The training processes under torchrun, first rank first."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, found) if TOY in Path(f"/proc/{pid}/cmdline").read_text()]


def test_none_leaves_while_one_is_saving(tmp_path):
    """Both hit, not by torchrun: it would end the one that saves as soon as the other has left."""
    process = torchrun(tmp_path / "cut", pause=1.5, slow_save=4)
    wait_for_step(tmp_path / "cut", 1)
    for worker in workers(process):
        os.kill(worker, signal.SIGTERM)
    process.communicate(timeout=120)
    assert list((tmp_path / "cut" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("hit", ["all by torchrun", "the second only"])
def test_processes_stop_at_one_step_and_go_on_as_one_run(tmp_path, hit):
    whole = torchrun(tmp_path / "whole")
    process = torchrun(tmp_path / "cut", pause=0.2)
    wait_for_step(tmp_path / "cut", 3)
    os.kill(process.pid if hit == "all by torchrun" else workers(process)[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    stopped = int(
        re.search(r"stopped at step (\d+); .*: torchrun --standalone --nproc-per-node=2 ", out).group(1)
    )
    assert newest(tmp_path / "cut").name == f"step-{stopped:07d}"
    assert not (tmp_path / "cut" / "result.json").exists()
    torchrun(tmp_path / "cut").communicate(timeout=120)
    whole.communicate(timeout=120)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
