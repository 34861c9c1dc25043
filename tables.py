"""Systems on one table: their replies read, measured, judged, and shown beside the gold ones.

A system is a run's folder or anybody's predictions. The numbers themselves stand in metrics.py, the judges in
critics.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

import advice
import runs
import storage
from critics import judge, load_judges
from dataloaders import Example, listener_turns, read_exemplars, read_predictions
from generators import prediction_files, weights_file
from metrics import SACREBLEU, bleu, perplexity, reply_statistics
from options import CRITICS, Paths, UserError, refuse_existing
from pages import cell, plot_learning, write_cases
from session import Session

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


def load_system(path: Path, examples: list[Example], split: str, paths: Paths) -> dict:
    """One row: its replies, how they were decoded, and for a run also perplexity and number of parameters.

    `path`: a run's folder, one of `--inference --output`, or anybody's predictions.
    """
    if path.is_dir() and not (path / "args.json").exists() and prediction_files(path, split)[0].exists():
        path = prediction_files(path, split)[0]
    if path.is_file():
        return load_predictions(path, examples, paths)
    runs.require_run(path, f"{advice.GIVE_A_GENERATOR}; or a file of predictions")
    trained, _ = advice.kind_of(path)
    if trained not in ("Generator", "CausalGenerator"):
        raise UserError(
            f"{path}: the run of a {trained or 'retriever'}, not of a generator, whose replies are scored"
        )
    predictions, likelihood = prediction_files(path, split)
    if not predictions.exists():
        raise UserError(f"{predictions}: no such file; make it with: {advice.replies(path, split)}")
    storage.warn_if_stale(predictions, {"model": weights_file(path)})
    system: dict = {
        "name": f"{path.parent.name}/{path.name}",
        "folder": str(path),
        "replies": read_predictions(predictions, examples),
        "decoding": decoding_in_words(storage.read_origin(predictions)),
        **perplexities(likelihood),
    }
    with safe_open(weights_file(path), framework="np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (no dict)
    system["parameters"] = sum(math.prod(shape) for shape in shapes)
    system["adapter"] = weights_file(path).name.startswith(
        "adapter"
    )  # its base, which is large, is not there
    return system


def load_predictions(file: Path, examples: list[Example], paths: Paths) -> dict:
    """A row out of a predictions file; what --inference wrote to a folder of its own is named after that."""
    system: dict = {"name": file.stem, "replies": read_predictions(file, examples)}
    origin = storage.read_origin(file)
    if not origin:
        return system
    system["name"] = file.parent.resolve().name
    system["decoding"] = decoding_in_words(origin)
    if isinstance(origin.get("model"), dict):
        run = paths.find(origin["model"]["path"])
        if (run / "args.json").exists():
            system["run"] = str(run)
    return system | perplexities(
        file.with_name(file.name.replace("predictions", "likelihood", 1)[:-4] + ".csv")
    )


def perplexities(likelihood: Path) -> dict[str, float]:
    """Of the gold replies, where the file with their likelihood is there."""
    if not likelihood.exists():
        return {}
    sums = pd.read_csv(likelihood)[["nll", "tokens", "words"]].sum()
    return {
        "ppl_token": perplexity(sums["nll"], sums["tokens"]),
        "ppl_word": perplexity(sums["nll"], sums["words"]),
    }


def decoding_in_words(origin: dict) -> str:
    """How the note beside predictions says that they were decoded; nothing where it does not."""
    how = origin.get("decoding", {})
    if how.get("num_beams", 1) > 1:
        text = f"beam search, {how['num_beams']} beams"
    elif how.get("do_sample"):
        text = f"sampled among the {how['top_k']} likeliest tokens at temperature {how['temperature']}"
        text += f", seed {origin.get('seed')}"
    else:
        return ""
    return f"{text}, at most {how['max_new_tokens']} tokens"


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


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| system | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in rows.items():
        values = [shape.format(row[key]) if key in row else "-" for key, (_, shape) in COLUMNS.items()]
        lines.append(f"| {cell(name)} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def replies(options: TableOptions, paths: Paths) -> tuple[list[Example], list[dict]]:
    """The split's listener turns, and all systems with their replies to them, gold first."""
    examples = listener_turns(paths.dialogues(options.split))
    systems: list[dict] = [{"name": "gold", "replies": [e.response for e in examples]}]
    systems += [load_system(Path(run), examples, options.split, paths) for run in options.runs]
    for n, system in enumerate(systems):  # two files of one name are two rows
        if system["name"] in [s["name"] for s in systems[:n]]:
            system["name"] += f" ({n})"
    return examples, systems


def evaluate(options: TableOptions, paths: Paths, session: Session) -> dict:
    """Write metrics.json, table.md, case_studies.md and .html, and learning_curves.png to results/NAME/."""
    folder = paths.results / options.name
    names = ("metrics.json", "table.md", "case_studies.md", "case_studies.html", "learning_curves.png")
    files = {n: folder / n for n in names}
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # written last
    examples, systems = replies(options, paths)
    gold = [e.response for e in examples]
    folders = {kind: paths.critic(kind, options.family) for kind in CRITICS}
    judges = load_judges(folders, session)
    for system in systems:
        system["scores"] = judge(judges, examples, system["replies"], paths.cache, system["name"])
    rows = {s["name"]: measure(s, gold) for s in systems}
    found = paths.exemplars(options.split)
    shown = read_exemplars(found, examples) if found.exists() else None

    below = notes(systems, {kind: folders[kind] for kind in judges})
    storage.write_text(files["table.md"], table(rows) + below)
    write_cases(folder, systems, examples, options.cases, options.seed, shown)
    plot_learning(systems, files["learning_curves.png"])
    content = {"split": options.split, "replies": len(gold), "judges": options.family, "systems": rows}
    storage.write_json(files["metrics.json"], content)
    print(table(rows) + below)
    print(f"written to {folder}: {', '.join(f.name for f in files.values() if f.exists())}")
    return content
