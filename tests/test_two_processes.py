"""Two processes on halves of each batch make the updates that one makes on the whole, by each fast path."""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, by_two_processes, logged
from test_causal_models import make_tokenizer, save_llama
from toy import train

import options
from options import Paths

SHORT = "--device cpu --max-steps 3 --epochs 9 --batch-tokens 0 --log-every 1 --no-predict".split()


def run_script(script: str, words: list[str]) -> None:
    importlib.import_module(script).main(words)


def losses_of(folder: Path, kind: str) -> list[dict]:
    return [{k: v for k, v in r.items() if "loss" in k or k == "nll"} for r in logged(folder, kind)]


@pytest.mark.parametrize("way", ["packed conversations", "pooled exemplars, critics cast to bf16"])
def test_two_processes_train_as_one(way, trained_copy, tmp_path):
    near = 1e-4
    if way == "packed conversations":
        script, room = "train_causal_lm", "causal-lm"
        words = ["--model", save_llama(tmp_path / "llama", make_tokenizer()), "--lora-rank", "2"]
        words += ["--valid-conversations", "3"]
    else:
        script, room, near = "train_t5", "t5", 5e-3  # bf16 has 8 bits
        words = "--model t5-tiny --dropout 0 --add-exemplars t5 --exemplar-model t5-tiny".split()
        words += "--src-len 40 --tgt-len 12 --precision bf16".split()
    words += ["--workdir", str(trained_copy), *SHORT]
    by_two_processes(run_script, script, [*words, "--name", "two", "--batch-size", "2"])
    run_script(script, [*words, "--name", "one", "--batch-size", "4"])
    two, one = (trained_copy / "saved" / room / name for name in ("two", "one"))
    for kind, steps in (("train", 3), ("valid", 1)):
        found, expected = losses_of(two, kind), losses_of(one, kind)
        assert len(found) >= steps and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=near)


def test_two_processes_finish_an_update_too_small_for_all_its_micro_batches(trained_copy):
    """The last one of an epoch, of a retriever, whose micro-batches share their negatives."""
    questions = json.loads(Paths(trained_copy).dpr_data("empd", "train").read_text())
    assert len(questions) % 6 == 1, "the last of 6 = 2 processes x 3 micro-batches has one example"
    words = [
        "--workdir",
        str(trained_copy),
        "--encoder",
        str(Paths(trained_copy).bert_tiny),
        "--device",
        "cpu",
    ]
    words += "--epochs 1 --batch-size 1 --accumulate 3 --log-every 1 --name ragged".split()
    by_two_processes(run_script, "DPR.train_dpr", words)
    losses = losses_of(trained_copy / "saved" / "dpr" / "ragged", "train")
    assert len(losses) == len(questions) // 6 + 1 and all(row["nll"] > 0 for row in losses[:-1])


def train_where_a_barrier_takes_a_gpu(folder: str) -> None:
    def barrier(*args, **named):
        raise RuntimeError("invalid device ordinal")  # as torch says where there is one GPU, to the second

    torch.distributed.barrier = barrier
    train(folder, epochs=1)


def test_two_processes_on_the_processor_leave_the_gpu_alone(tmp_path):
    by_two_processes(train_where_a_barrier_takes_a_gpu, str(tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


class Left(Exception):
    pass


def train_until_the_second_leaves(folder: str) -> str:
    def spoil(loop, terms):
        if loop.session.rank == 1 and loop.state.step == 2:
            raise Left
        return terms

    said = StringIO()
    with contextlib.suppress(Left, SystemExit), contextlib.redirect_stderr(said):
        options.run(lambda: train(Path(folder), spoil=spoil))
    return said.getvalue().splitlines()[-1] if said.getvalue() else ""


def test_a_process_that_is_left_alone_says_so_in_a_line(tmp_path):
    said = by_two_processes(train_until_the_second_leaves, str(tmp_path / "run"))
    assert "error: another process has ended" in said and "the same command goes on" in said


def test_one_process_under_torchrun_does_what_one_without_does(trained_copy):
    """Where a script starts as many processes as there are GPUs, of which there is one."""
    words = [
        "train_glove_t5.py",
        "--workdir",
        str(trained_copy),
        "--size",
        "tiny",
        *SHORT,
        "--max-steps",
        "1",
    ]
    words += "--add-exemplars none --sampled-loss-w 1 --samples 3 --sampled-examples 1".split()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_embed_and_find_what_one_does(trained_copy):
    files = [Paths(trained_copy).exemplars(split) for split in ("train", "valid", "test")]
    alone = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    words = ["--workdir", str(trained_copy), "--path", str(trained_copy / "saved" / "dpr" / "empd")]
    words += "--top-k 3 --batch-size 2 --device cpu".split()
    by_two_processes(run_script, "dpr_exemplar_retriever", words)
    for file, expected in zip(files, alone, strict=True):
        assert (
            pd.read_csv(file)["exemplars"].tolist() == pd.read_csv(StringIO(expected))["exemplars"].tolist()
        )
