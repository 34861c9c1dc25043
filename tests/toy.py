"""A toy stage on the real loop: a small network with dropout, two loss terms of different units, uneven rows.

As a program it is the run that the tests kill: python tests/toy.py FOLDER key=value ...
"""

import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import checkpoints
from dataloaders import Data
from session import Session
from settings import TrainingOptions
from training import Loop
from updates import Objective

DEFAULTS = {
    "device": "cpu",
    "precision": "fp32",
    "seed": 3,
    "deterministic": False,
    "epochs": 3,
    "max_steps": 0,
    "lr": 0.01,
    "batch_size": 4,
    "batch_tokens": 0,
    "accumulate": 1,
    "schedule": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "clip": 1.0,
    "patience": 0,
    "eval_every": 0,
    "save_every": 0,
    "log_every": 1,
    "resume": "auto",
    "overwrite": False,
    "effective_batch": 4,
    "workdir": ".",
    "name": None,
    "dropout": 0.1,
    "compile": False,
}


class Net(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout))
        self.next, self.kind = nn.Linear(16, 30), nn.Linear(16, 2)

    def forward(self, ids):
        hidden = self.body(self.words(ids))  # (B, L, 16)
        real = (ids > 0).float()[..., None]
        return self.next(hidden), self.kind((hidden * real).sum(1) / real.sum(1))


def toy_data(count: int = 22, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(1, 30, (int(n),), generator=generator)
        for n in torch.randint(2, 9, (count,), generator=generator)
    ]

    def collate(numbers):
        width = max(len(rows[i]) for i in numbers)
        ids = torch.stack(
            [torch.cat([rows[i], torch.zeros(width - len(rows[i]), dtype=torch.long)]) for i in numbers]
        )
        return {
            "names": [f"row {i}" for i in numbers],
            "input": ids,
            "kind": torch.tensor([len(rows[i]) % 2 for i in numbers]),
        }

    return Data([len(r) for r in rows], collate)


def toy_loop(
    folder: Path,
    spoil=None,
    evaluate=None,
    memory: int = 0,
    memory_error: Exception | None = None,
    data: Data | None = None,
    micro_batches_matter: bool = False,
    **changes,
) -> Loop:
    """`spoil(loop, terms) -> terms` may damage a step's loss terms; `evaluate(loop)` replaces the real
    evaluation; `memory`: the most examples that fit, `memory_error`: what more of them raise."""
    flags = DEFAULTS | changes
    options = TrainingOptions(**{f.name: flags[f.name] for f in dataclasses.fields(TrainingOptions)})
    session = Session(flags["device"], flags["precision"], flags["seed"], flags["deterministic"])
    model = Net(flags["dropout"])
    data = data or toy_data()

    class ToyObjective(Objective):
        weights = {"word": 1.0, "class": 0.5}

        def units(self, batch):
            return {"word": int((batch["input"] > 0).sum()), "class": len(batch["kind"])}

        def terms(self, net, batch):
            if memory and len(batch["kind"]) > memory:
                raise memory_error or torch.OutOfMemoryError("CUDA out of memory.")
            words, kind = net(batch["input"])
            real = batch["input"] > 0
            out = {
                "word": nn.functional.cross_entropy(words[real], batch["input"][real], reduction="sum"),
                "class": nn.functional.cross_entropy(kind, batch["kind"], reduction="sum"),
            }
            return spoil(loop, out) if spoil else out

    def measure():
        if evaluate:
            return evaluate(loop)
        torch.rand(3)  # an evaluation may draw; the training must not notice
        batch = data.collate(list(range(len(data))))
        words, kind = model(batch["input"])
        return {"loss": float(nn.functional.cross_entropy(kind, batch["kind"]))}

    def export(target):
        (Path(target) / "exported").write_text(str(loop.state.best_step))

    loop = Loop(
        options,
        session,
        model,
        ToyObjective(),
        data,
        measure,
        export,
        Path(folder),
        metric="loss",
        mode="min",
        flags=flags,
        inputs={"data": "fixed"},
        micro_batches_matter=micro_batches_matter,
    )
    return loop


def keep_the_end() -> None:
    """A finished run drops its checkpoints; the newest stays in `.end`, for the tests to compare bit for
    bit."""
    drop = checkpoints.drop_checkpoints

    def keep_and_drop(folder: Path) -> None:
        newest = list(checkpoints.steps(folder).values())[-1]
        end = folder.parent / ".end" / newest.name
        end.mkdir(parents=True)
        for file in newest.iterdir():
            shutil.copyfile(file, end / file.name)
        drop(folder)

    checkpoints.drop_checkpoints = keep_and_drop


def train(folder: str | Path, **changes) -> Loop:
    loop = toy_loop(Path(folder), **changes)
    loop.finish(loop.train())
    return loop


if __name__ == "__main__":
    import time

    keep_the_end()

    kind = {k: type(v) for k, v in DEFAULTS.items() if v is not None}
    given = dict(a.split("=", 1) for a in sys.argv[2:])
    pause, slow_save = float(given.pop("pause", 0)), float(given.pop("slow_save", 0))
    write_checkpoint = checkpoints.write_checkpoint

    def write_slowly(*args, **kwargs):
        time.sleep(slow_save)
        return write_checkpoint(*args, **kwargs)

    checkpoints.write_checkpoint = write_slowly

    def slow(loop, terms):
        time.sleep(pause)
        return terms

    train(
        Path(sys.argv[1]),
        spoil=slow,
        **{k: kind[k](v) if kind[k] is not bool else v == "True" for k, v in given.items()},
    )
    print("finished")
