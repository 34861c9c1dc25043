"""Systems on one table: their replies read, measured, judged, and shown beside the gold ones.

A system is a run's folder or anybody's predictions. The numbers themselves stand in metrics.py, the judges in
critics.py.
"""

import html
import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

import storage
from critics import judge, load_judges
from dataloaders import Example, listener_turns, read_exemplars
from metrics import SACREBLEU, bleu, reply_statistics
from options import CRITICS, Paths, refuse_existing
from session import Session
from systems import read_system, require_complete

matplotlib.use("Agg")  # draws into files, with no screen
from matplotlib import pyplot  # noqa: E402

COLUMNS = {
    "parameters": ("#params", "{:,.0f}"),
    "ppl_token": ("PPL/token", "{:.2f}"),
    "ppl_word": ("PPL/word", "{:.2f}"),
    "bleu_1": ("BLEU-1", "{:.2f}"),
    "bleu_2": ("BLEU-2", "{:.2f}"),
    "bleu_3": ("BLEU-3", "{:.2f}"),
    "bleu_4": ("BLEU-4", "{:.2f}"),
    "sacrebleu": ("sacreBLEU", "{:.2f}"),
    "distinct_1": ("Distinct-1 %", "{:.2f}"),
    "distinct_2": ("Distinct-2 %", "{:.2f}"),
    "length": ("words", "{:.1f}"),
    **{f"critic_{k}": (k, "{:.3f}") for k in CRITICS},
}
SMALL_MODEL = (
    "Some of these replies were written by a very small model (fewer than two million weights, trained for "
    "seconds or minutes). They show that every part works, not what the method can do: `python "
    "reproduce.py --recipe glove` (hours on one GPU) or `--recipe t5` makes better ones."
)


@dataclass(frozen=True)
class TableOptions:
    """What the table's command was asked for (evaluate_responses.py explains each)."""

    runs: list[str]
    split: str
    family: str
    name: str
    cases: int
    seed: int
    overwrite: bool


def load_systems(path: Path, examples: list[Example], split: str, paths: Paths) -> list[dict]:
    """The rows of a run's folder or of anybody's predictions, which must cover the split."""
    rows = []
    for system in read_system(path, examples, split, paths):
        require_complete(system, range(len(examples)), examples)
        row: dict = {"name": system.name, "replies": system.replies, **system.perplexities}
        row |= {k: v for k in ("folder", "run") if (v := getattr(system, k))}
        if system.decoding:
            row["decoding"] = system.decoding
        if system.parameters is not None:
            row |= {"parameters": system.parameters, "adapter": system.adapter}
        rows.append(row)
    return rows


def notes(systems: list[dict], folders: dict[str, Path]) -> str:
    """What the table's reader must know: how sacreBLEU was computed, how replies were decoded, and which runs
    were judged by their own loss."""
    lines = [
        f"sacreBLEU: {SACREBLEU.get_signature()}. Parameters, perplexity, BLEU, Distinct: "
        "`python evaluate_responses.py --help`."
    ]
    judges = {k: storage.sha256(f / "model.safetensors") for k, f in folders.items()}
    for system in systems:
        name = cell(system["name"])
        if system.get("decoding"):
            lines.append(f"Replies of {name}: {system['decoding']}.")
        inputs = {}
        if run := system.get("folder", system.get("run")):
            inputs = storage.read_json(Path(run) / "args.json").get("inputs", {})
        own = [k for k, digest in judges.items() if inputs.get(f"critic {k}") == digest]
        if own:
            lines.append(f"{name} was trained against the very critics that judge it here: {', '.join(own)}.")
    return "".join(f"\n{line}\n" for line in lines)


def measure(system: dict, gold: list[str]) -> dict[str, float]:
    """The automatic columns of one row."""
    row = {k: system[k] for k in ("parameters", "ppl_token", "ppl_word") if k in system}
    row |= bleu(system["replies"], gold) | reply_statistics(system["replies"])
    return row | {f"critic_{k}": float(np.mean(v)) for k, v in system["scores"].items()}


def cell(text: str) -> str:
    """Text that is safe in a markdown table or page: no HTML, no column breaks, one line."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| system | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in rows.items():
        values = [shape.format(row[key]) if key in row else "-" for key, (_, shape) in COLUMNS.items()]
        lines.append(f"| {cell(name)} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


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


def evaluate(options: TableOptions, paths: Paths, session: Session) -> dict:
    """Write metrics.json, table.md, case_studies.md and learning_curves.png to results/NAME/."""
    folder = paths.results / options.name
    files = {n: folder / n for n in ("metrics.json", "table.md", "case_studies.md", "learning_curves.png")}
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # written last
    examples = listener_turns(paths.dialogues(options.split))
    gold = [e.response for e in examples]
    systems: list[dict] = [{"name": "gold", "replies": gold}]
    for run in options.runs:
        systems += load_systems(Path(run), examples, options.split, paths)
    for n, system in enumerate(systems):  # two files of one name are two rows
        if system["name"] in [s["name"] for s in systems[:n]]:
            system["name"] += f" ({n})"

    folders = {kind: paths.critic(kind, options.family) for kind in CRITICS}
    judges = load_judges(folders, session)
    for system in systems:
        system["scores"] = judge(judges, examples, system["replies"], paths.cache, system["name"])
    rows = {s["name"]: measure(s, gold) for s in systems}
    found = paths.exemplars(options.split)
    shown = read_exemplars(found, examples) if found.exists() else None

    below = notes(systems, {kind: folders[kind] for kind in judges})
    storage.write_text(files["table.md"], table(rows) + below)
    page = case_studies(systems, examples, shown, options.cases, options.seed)
    storage.write_text(files["case_studies.md"], page)
    plot_learning(systems, files["learning_curves.png"])
    content = {"split": options.split, "replies": len(gold), "judges": options.family, "systems": rows}
    storage.write_json(files["metrics.json"], content)
    print(table(rows) + below)
    print(f"written to {folder}: {', '.join(f.name for f in files.values() if f.exists())}")
    return content
