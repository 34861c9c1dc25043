"""What people look at: case studies, which show replies beside each other, and learning curves."""

import html
import random
from pathlib import Path

import matplotlib
import pandas as pd

from dataloaders import Example
from options import CRITICS

matplotlib.use("Agg")  # draws into files, with no screen
from matplotlib import pyplot  # noqa: E402

SMALL_MODEL = (
    "Some of these replies were written by a very small model (fewer than two million weights, trained for "
    "seconds or minutes). They show that every part works, not what the method can do: `python "
    "reproduce.py --recipe glove` (hours on one GPU) or `--recipe t5` makes better ones."
)


def cell(text: str) -> str:
    """Text that is safe in a markdown table or page: no HTML, no column breaks, one line."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def case_studies(
    systems: list[dict], examples: list[Example], shown: list[list[str]] | None, count: int, seed: int
) -> str:
    """A page: context, exemplars, each system's reply with its critics' scores, the gold reply."""
    chosen = sorted(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))
    lines = ["# Case studies", ""]
    if any(s.get("parameters", 10**9) < 2_000_000 and not s.get("adapter") for s in systems):
        lines += [SMALL_MODEL, ""]
    for n, i in enumerate(chosen, start=1):
        exemplars = shown[i][:3] if shown is not None else []
        lines += one_case(n, i, systems, examples[i], exemplars)
    return "\n".join(lines) + "\n"


def one_case(n: int, i: int, systems: list[dict], example: Example, exemplars: list[str]) -> list[str]:
    """The `n`-th case study, of example number `i`."""
    title = f"## {n}. {example.emotion} ({cell(example.conv_id)}, utterance {example.utterance_idx})"
    lines = [title, ""]
    for t, turn in enumerate(example.history):
        lines.append(f"- **{('speaker', 'listener')[t % 2]}:** {cell(turn)}")
    if exemplars:
        lines.append("")
    for rank, text in enumerate(exemplars, start=1):
        lines.append(f"> exemplar {rank}: {cell(text)}  ")
    kinds = list(systems[0]["scores"])
    lines += ["", "| | reply | " + " | ".join(kinds) + " |", "|---" * (2 + len(kinds)) + "|"]
    for system in systems:
        scores = " | ".join(f"{system['scores'][k][i]:.2f}" for k in kinds)
        lines.append(f"| {cell(system['name'])} | {cell(system['replies'][i])} | {scores} |")
    return [*lines, ""]


def plot_learning(systems: list[dict], target: Path) -> bool:
    """Loss terms over the updates, from each run's metrics.jsonl; False where no system is a run."""
    logs = {s["name"]: Path(s["folder"]) / "metrics.jsonl" for s in systems if "folder" in s}
    logs = {k: v for k, v in logs.items() if v.exists()}
    if not logs:
        return False
    figure, axes = pyplot.subplots(1, len(logs), figsize=(5.5 * len(logs), 4), squeeze=False)
    for axis, (name, file) in zip(axes[0], logs.items(), strict=True):
        rows = pd.read_json(file, lines=True)
        for kind, style in (("train", "-"), ("valid", "o--")):
            part = rows[rows["kind"] == kind]
            for term in ("nll", *CRITICS):
                if term in part and part[term].notna().any():
                    axis.plot(part["step"], part[term], style, label=f"{term}, {kind}")
        axis.set(title=name, xlabel="updates", ylabel="loss (nats, or squared error)")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return True
