"""Fixtures: a folder with a small prepared corpus, made once; tiny critics, trained when first asked for."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test touches the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from options import DIMENSIONS  # noqa: E402

SAMPLE = ROOT / "data" / "sample"

# the same generated examples in every run, so that what passes here passes there; others by hand:
# HYPOTHESIS_PROFILE=other pytest
settings.register_profile("same", derandomize=True)
settings.register_profile("other")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


#: minutes in which a guarantee is shown again that a sibling shows in every run; by hand: pytest -m slow
SLOW = {
    "test_stopped_by_the_scheduler_then_killed[t5]",
    "test_stopped_by_the_scheduler_then_killed[classifier]",
    "test_stopped_by_the_scheduler_then_killed[regressor]",
    "test_processes_stop_at_one_step_and_go_on_as_one_run[all by torchrun]",
    "test_a_disk_that_is_full_in_earnest[8000]",
    "test_a_disk_that_is_full_in_earnest[24000]",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


def head_of_dialogues(source: Path, target: Path, conversations: int) -> None:
    """The first conversations of an official file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    kept, seen = [lines[0]], []
    for line in lines[1:]:
        conv = line.split(",", 1)[0]
        if conv not in seen:
            seen.append(conv)
        if len(seen) > conversations:
            break
        kept.append(line)
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder in the official formats, cut from the bundled sample: 20 + 6 + 6 conversations, 80 pairs."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 20), ("valid", 6), ("test", 6)):
        head_of_dialogues(SAMPLE / "empathetic_dialogues" / f"{split}.csv", folder / f"{split}.csv", count)
    for name in (f"{known.official}-reddit.csv" for known in DIMENSIONS.values()):
        with open(SAMPLE / "empathy_mental_health" / name, encoding="utf-8") as handle:
            (folder / name).write_text("".join(itertools.islice(handle, 81)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """A workdir after prepare_data.py. Session-wide: tests that write use `workdir`."""
    import prepare_data

    folder = tmp_path_factory.mktemp("prepared")
    prepare_data.main(
        [
            "--source",
            str(corpus),
            "--workdir",
            str(folder),
            "--split",
            "grouped",
            "--glove",
            str(SAMPLE / "glove.sample.50d.txt"),
            "--min-count",
            "1",
        ]
    )
    return folder


@pytest.fixture
def workdir(prepared, tmp_path) -> Path:
    """A private copy of the prepared workdir."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    return folder


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Path:
    """A workdir with all critics of both families (two steps each), labels and exemplars. Read-only."""
    import dpr_exemplar_retriever
    import label_dialogues
    import train_empathy_classifier
    import train_sentiment_regressor
    from DPR import prepare_dpr_data, train_dpr

    folder = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(prepared, folder)
    common = ["--workdir", str(folder), "--device", "cpu"]
    for model in ("t5", "glove-t5"):
        short = [*common, "--model", model, "--size", "tiny", "--max-steps", "2", "--batch-size", "8"]
        for dim in DIMENSIONS:
            train_empathy_classifier.main([*short, "--dim", dim])
        train_sentiment_regressor.main(short)
    label_dialogues.main([*common, "--family", "glove-t5"])
    prepare_dpr_data.main(["--workdir", str(folder)])
    train_dpr.main(
        [*common, "--encoder", str(folder / "data" / "bert-tiny"), "--max-steps", "2", "--batch-size", "4"]
    )
    dpr_exemplar_retriever.main([*common, "--path", str(folder / "saved" / "dpr" / "empd"), "--top-k", "3"])
    return folder


@pytest.fixture(scope="session")
def home(trained, tmp_path_factory) -> Path:
    """The same with one short GloVe generator that reads exemplars. Read-only."""
    import train_glove_t5

    folder = tmp_path_factory.mktemp("home") / "work"
    shutil.copytree(trained, folder)
    lengths = (
        "--src-len 40 --tgt-len 12 --exemplar-len 16 --max-steps 2 --batch-size 4 --no-predict --size tiny"
    )
    weights = "--empathy-loss-w 0 --sentiment-loss-w 0 --device cpu"
    train_glove_t5.main(["--workdir", str(folder), *lengths.split(), *weights.split()])
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path) -> Path:
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    return folder


# -------------------------------------------------------------------------- runs that are killed and compared


@pytest.fixture(scope="module")
def the_end_is_kept():
    """The newest checkpoint of a run that finishes stays in its `.end` (toy.keep_the_end)."""
    import toy

    import checkpoints

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "drop_checkpoints", checkpoints.drop_checkpoints)  # to be put back
        toy.keep_the_end()
        yield


def newest(folder: Path) -> Path:
    """A run's newest checkpoint, or what was its newest when it finished."""
    finished = (folder / "result.json").exists()
    return sorted((folder / (".end" if finished else "checkpoints")).glob("step-*"))[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(folder) / "model.safetensors")


def logged(folder: Path, kind: str | None = None) -> list[dict]:
    """What a run has logged of one kind (train, valid), or of both."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def swap_words(folder: Path, one: str, other: str) -> None:
    """Gives two words of a tokenizer's folder each other's numbers."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(tokenizer))


def same(a, b) -> bool:
    """Equality of nested plain values and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer, schedule, random streams, loop state, log."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    ends = [newest(f) for f in (a, b)]
    states = [torch.load(e / "state.pt", weights_only=True) for e in ends]
    assert same(*states)
    loops = [json.loads((e / "state.json").read_text()) for e in ends]
    for state in loops:
        state.pop("seconds")
    assert loops[0] == loops[1]
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def kill_at(step: int):
    """For `toy.train(spoil=...)`."""

    def spoil(loop, terms):
        if loop.state.step == step:
            raise Killed
        return terms

    return spoil


def interrupted(folder: Path, step: int = 10, **settings) -> list[Path]:
    """A toy run that was killed at `step`, with checkpoints at 2, 4, ...; those that are left."""
    from toy import train

    with pytest.raises(Killed):
        train(folder, spoil=kill_at(step), save_every=2, **settings)
    return sorted((folder / "checkpoints").glob("step-*"))


def wait_for_step(folder: Path, step: int) -> None:
    for _ in range(4800):  # four minutes: four processes that import torch, on one busy core
        if (folder / "metrics.jsonl").exists() and f'"step": {step},' in (
            folder / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


# ------------------------------------------------------------------------------------------- two processes

#: what torchrun does, with one import of torch in place of three
TWO_PROCESSES = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from {module} import {name}
children = []
for rank in "01":
    if not (child := os.fork()):
        os.environ |= {{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}}
        os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}}
        found = {name}(*{arguments!r}, **{named!r})
        if rank == "0":
            print(found, flush=True)
        os._exit(0)
    children.append(child)
for _ in children:
    ended, status = os.wait()
    if status:  # the other one would wait for it
        os.kill(sum(children) - ended, 9)
        sys.exit("a process failed")
"""


def by_two_processes(function, *arguments, **named) -> str:
    """What a function of a module of the tests gives, asked with plain values by two processes together: as
    the first of them prints it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = TWO_PROCESSES.format(
        tests=str(ROOT / "tests"),
        root=str(ROOT),
        module=function.__module__,
        name=function.__name__,
        arguments=arguments,
        named=named,
    )
    command = [sys.executable, "-c", code, str(port)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return done.stdout.strip().splitlines()[-1]
