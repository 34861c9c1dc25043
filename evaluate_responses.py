"""Score runs' predictions against the gold replies: one table, and a page of case studies.

  python evaluate_responses.py saved/t5/lempex saved/t5/plain                 runs, or predictions.tsv files of anybody
  python evaluate_responses.py saved/glove-t5/lempex --family glove-t5 --name glove

Columns: perplexity of the gold replies per model token and per word (13a words and one end a reply; the same unit for
every model, though a GloVe model pays for an unknown word as for one known word, and not for capitals), BLEU-1..4 on raw
strings (white space, case kept: the paper's), sacreBLEU (13a, lower-cased), Distinct-1/2 (13a, lower-cased), mean length, and
the critics' mean scores (expected label, with two labels the probability of empathy; sentiment from -1 to 1). Matching the
gold row's scores, not topping them, is the aim; a run that was trained against these very critics is named. Writes
metrics.json, table.md, case_studies.md and learning_curves.png to results/NAME/.
"""

import html
import json
import math
import random
from pathlib import Path

import options
from options import CRITICS, SPLITS, Paths, UserError, add_common, add_device, check, make_parser

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
    "Some of these replies were written by a very small model (fewer than two million weights, trained for seconds or minutes). They show "
    "that every part works, not what the method can do: `python reproduce.py --recipe glove` (hours on one GPU) or `--recipe t5` makes better ones."
)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "runs", nargs="+", help="run folders, or tab-separated files with conv_id, utterance_idx, response"
    )
    parser.add_argument(
        "--split", choices=SPLITS[1:], default="test", help="which split the predictions are of"
    )
    parser.add_argument(
        "--family",
        default="t5",
        help="whose critics judge: saved/empathy/FAMILY-DIM and saved/sentiment/FAMILY; those missing are left out",
    )
    parser.add_argument("--name", default="evaluation", help="folder under results/")
    parser.add_argument("--cases", type=int, default=12, help="case studies on the page")
    parser.add_argument(
        "--exemplars",
        metavar="DIR",
        help="folder of {split}_dpr.csv, shown in the case studies (default: data/empathetic_dialogues)",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [f"{r}: no such run folder or file" for r in args.runs if not Path(r).exists()]
    check(parser, args, problems, cases=0)
    return args


def load_system(path: Path, examples: list, split: str) -> dict:
    """One row: its replies, and for a run also perplexity and number of parameters."""
    import pandas as pd
    from safetensors import safe_open

    import runs
    import storage
    from dataloaders import read_predictions
    from inference import prediction_files
    from metrics import perplexity

    if path.is_file():
        return {"name": path.stem, "replies": read_predictions(path, examples)}
    runs.require_run(path, "python train_t5.py, or train_glove_t5.py; or give a predictions file")
    predictions, likelihood = prediction_files(path, split)
    if not predictions.exists():
        raise UserError(
            f"{predictions}: no such file; make it with: python train_t5.py --inference {path} --predict-split {split}"
        )
    storage.warn_if_stale(predictions, {"model": path / "model.safetensors"})
    system = {
        "name": f"{path.parent.name}/{path.name}",
        "folder": str(path),
        "replies": read_predictions(predictions, examples),
    }
    if likelihood.exists():
        sums = pd.read_csv(likelihood)[["nll", "tokens", "words"]].sum()
        system |= {
            "ppl_token": perplexity(sums["nll"], sums["tokens"]),
            "ppl_word": perplexity(sums["nll"], sums["words"]),
        }
    with safe_open(path / "model.safetensors", framework="np") as weights:
        names = weights.keys()
        system["parameters"] = sum(math.prod(weights.get_slice(n).get_shape()) for n in names)
    return system


def load_judges(args, paths: Paths, session) -> dict:
    """{kind: (critic, tokenizer)} of the family's trained critics."""
    from models import Critic, load_tokenizer

    folders = {k: paths.critic(k, args.family) for k in CRITICS}
    missing = [k for k, f in folders.items() if not (f / "result.json").exists()]
    if missing:
        print(f"note: no {', '.join(missing)} critic of family {args.family}; their columns stay empty")
    return {
        k: (Critic.from_pretrained(f).to(session.device), load_tokenizer(f))
        for k, f in folders.items()
        if k not in missing
    }


def judge(
    judges: dict, examples: list, replies: list[str], session, cache: Path, title: str
) -> dict[str, list[float]]:
    """Each critic's score of each reply, given as much of its context as the critic reads: the expected level, or the sentiment."""
    from dataloaders import critic_data
    from inference import critic_scores

    scores = {}
    for kind, (critic, tokenizer) in judges.items():
        contexts = [e.history for e in examples]
        found = critic_scores(
            critic,
            critic_data(contexts, replies, None, tokenizer, critic.settings, cache),
            session,
            f"{title}: {kind}",
        )
        scores[kind] = (found[:, 0] if kind == "sentiment" else found @ range(found.shape[1])).tolist()
    return scores


def notes(systems: list[dict], folders: dict[str, Path]) -> str:
    """What the table's reader must know: how sacreBLEU was computed, and which runs were judged by their own loss."""
    import storage
    from metrics import SACREBLEU

    lines = [
        f"sacreBLEU: {SACREBLEU.get_signature()}. Parameters, perplexity, BLEU, Distinct: `python evaluate_responses.py --help`."
    ]
    judges = {k: storage.sha256(f / "model.safetensors") for k, f in folders.items()}
    for system in systems:
        inputs = (
            storage.read_json(Path(system["folder"]) / "args.json").get("inputs", {})
            if "folder" in system
            else {}
        )
        own = [k for k, digest in judges.items() if inputs.get(f"critic {k}") == digest]
        if own:
            lines.append(
                f"{cell(system['name'])} was trained against the very critics that judge it here: {', '.join(own)}."
            )
    return "".join(f"\n{line}\n" for line in lines)


def measure(system: dict, gold: list[str]) -> dict[str, float]:
    """The automatic columns of one row."""
    import numpy as np

    from metrics import bleu, reply_statistics

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


def case_studies(systems: list[dict], examples: list, exemplars: list | None, count: int, seed: int) -> str:
    """A page: context, exemplars, each system's reply with its critics' scores, the gold reply."""
    chosen = sorted(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))
    small = any(s.get("parameters", 10**9) < 2_000_000 for s in systems)
    lines = ["# Case studies", "", *([SMALL_MODEL, ""] if small else [])]
    for n, i in enumerate(chosen, start=1):
        example = examples[i]
        lines += [
            f"## {n}. {example.emotion} ({cell(example.conv_id)}, utterance {example.utterance_idx})",
            "",
        ]
        lines += [
            f"- **{('speaker', 'listener')[t % 2]}:** {cell(turn)}" for t, turn in enumerate(example.history)
        ]
        if exemplars is not None:
            lines += [
                "",
                *(f"> exemplar {r}: {cell(text)}" + "  " for r, text in enumerate(exemplars[i][:3], start=1)),
            ]
        kinds = list(systems[0]["scores"])
        lines += ["", "| | reply | " + " | ".join(kinds) + " |", "|---" * (2 + len(kinds)) + "|"]
        for s in systems:
            scores = " | ".join(f"{s['scores'][k][i]:.2f}" for k in kinds)
            lines.append(f"| {cell(s['name'])} | {cell(s['replies'][i])} | {scores} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def plot_learning(systems: list[dict], target: Path) -> bool:
    """Loss terms over the updates, from each run's metrics.jsonl; False where no system is a run."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    from matplotlib import pyplot

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


def main(argv=None):
    args = parse_args(argv)
    import storage
    from dataloaders import listener_turns, read_exemplars
    from session import Session

    paths = Paths(args.workdir)
    session = Session(args)
    folder = paths.results / args.name
    files = {n: folder / n for n in ("metrics.json", "table.md", "case_studies.md", "learning_curves.png")}
    options.refuse_existing([files["metrics.json"]], args.overwrite)  # written last
    examples = listener_turns(paths.dialogues(args.split))
    gold = [e.response for e in examples]
    systems = [{"name": "gold", "replies": gold}] + [
        load_system(Path(r), examples, args.split) for r in args.runs
    ]
    for n, system in enumerate(systems):  # two files of one name are two rows
        if system["name"] in [s["name"] for s in systems[:n]]:
            system["name"] += f" ({n})"
    judges = load_judges(args, paths, session)
    for system in systems:
        system["scores"] = judge(judges, examples, system["replies"], session, paths.cache, system["name"])
    rows = {s["name"]: measure(s, gold) for s in systems}
    found = paths.exemplars(args.split, args.exemplars)
    exemplars = read_exemplars(found, examples) if found.exists() else None

    below = notes(systems, {k: paths.critic(k, args.family) for k in judges})
    storage.write_text(files["table.md"], table(rows) + below)
    storage.write_text(
        files["case_studies.md"], case_studies(systems, examples, exemplars, args.cases, args.seed)
    )
    plot_learning(systems, files["learning_curves.png"])
    storage.write_json(
        files["metrics.json"],
        {"split": args.split, "replies": len(gold), "judges": args.family, "systems": rows},
    )
    print(table(rows) + below)
    print(f"written to {folder}: {', '.join(f.name for f in files.values() if f.exists())}")
    return json.loads(files["metrics.json"].read_text(encoding="utf-8"))


if __name__ == "__main__":
    options.run(main)
