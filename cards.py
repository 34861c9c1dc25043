"""The card of a finished run, README.md: what it is, how it is used, how it was made, what it is not for."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

import advice
import markup
from bundled import ON_THE_HUB
from hub import HUB_NAME, OF_THE_PUBLISHED, OF_THE_RUN
from options import DIMENSIONS, HERE, JOINT, SENTIMENT, Paths
from storage import read_if_there, read_json, write_text

#: where the data come from (advice.prepared_from) -> licence of the weights, and the sentence about it
LICENCES = {
    "sample": ("mit", "Trained on the bundled sample, which was written for this project (MIT)."),
    "own": ("unknown", "Trained on somebody's own dialogues, whose terms hold for the weights."),
}
DIALOGUES = (
    "cc-by-nc-4.0",
    "Trained on EmpatheticDialogues, whose licence, CC BY-NC 4.0, holds for the weights.",
)
PAIRS = (
    "other",
    "Trained on Empathy Mental Health (Sharma et al. 2020), whose academic, non-commercial terms hold for "
    "the weights.",
)
TURNS_TOO = "So does the licence of EmpatheticDialogues, CC BY-NC 4.0, from which it learnt, too."
OF_THE_BUNDLE = "It stands here in half precision, without logs and predictions."
FIGURES = "## Figures\n\n| | |\n|---|---|\n"
CHOSEN = (
    "`best_step`, of all evaluations the one with the best figure on the validation side, was kept: its "
    "figures there, `valid`, are a little too good."
)
#: how each kind of run is used, in the project's folder
SNIPPETS = {
    "Critic": """from critics import Critic

critic = Critic.from_pretrained({run!r}{which})
(score,) = critic.score(["I am so sorry, you must miss him."], [("My dog died last week.",)])
print(score.value, score.meaning)""",
    "Generator": """from responder import Responder

responder = Responder.from_pretrained({run!r})
print(responder.reply(["My dog died last week."], seed=1).reply)""",
    "Retriever": """from DPR.retriever import Retriever

retriever = Retriever.from_pretrained({run!r})
(hits,) = retriever.search(["My dog died last week."], ["You must miss him.", "Well done!"], k=1)
print(hits[0].text, hits[0].score)""",
}
SNIPPETS["CausalGenerator"] = SNIPPETS["Generator"]
#: (pipeline_tag, what it is) on the hub
TASKS = {
    "Critic": ("text-classification", "A critic: what a reply is like, given what was said before it."),
    "Generator": ("text-generation", "A generator of the listener's next turn in a dialogue of small talk."),
    "Retriever": (
        "sentence-similarity",
        "A retriever (DPR): finds replies that answer a dialogue. sentence-transformers loads its two "
        "folders, `question_encoder` and `context_encoder`, as they are.",
    ),
}
TASKS["CausalGenerator"] = TASKS["Generator"]


def kind_of(folder: Path) -> str:
    """Critic, Generator, CausalGenerator or Retriever; "" for anything else."""
    if (folder / "question_encoder").is_dir():
        return "Retriever"
    kind = advice.kind_of(folder)[0]
    return kind if kind in SNIPPETS else ""


def licence(
    kind: str, critic: str, inputs: Iterable[str], workdir: str, dataset: str = ""
) -> tuple[str, str]:
    """Of the weights: its name on the hub, and a sentence. `critic`: of what, where it is one; `inputs`: the
    names of what it was made from; `dataset`: a retriever's."""
    if known := LICENCES.get(advice.prepared_from(Path(workdir)) or ""):
        return known
    pairs = dataset.endswith("reddit") if kind == "Retriever" else critic in (*DIMENSIONS, JOINT)
    # a teacher has labelled listener turns
    turns = dataset.startswith("empd") if kind == "Retriever" else "dialogues train" in inputs
    if not pairs:
        return DIALOGUES
    return (PAIRS[0], f"{PAIRS[1]} {TURNS_TOO}") if turns else PAIRS


def base_model(kind: str, folder: Path, args: dict[str, Any]) -> str | None:
    """The hub name that a run began from; None where it began from scratch or from a folder."""
    for flag in ("encoder", "model"):
        if args.get(flag) in ON_THE_HUB:
            return ON_THE_HUB[args[flag]]
    for name, entry in read_if_there(folder / "sources.json").items():
        # of a hub name the identity is the name; of an adapter's base it is that of its weights
        # a generator's exemplars were found with an encoder, too
        begun = name == ("question encoder" if kind == "Retriever" else "model")
        named = begun and entry["path"] == entry["sha256"]
        place = entry["path"].partition("@")[0]  # without its revision
        of_hub = HUB_NAME.fullmatch(place) and not Path(entry["path"]).is_dir()
        if named or name == "base" and of_hub and entry["path"] == args["model"]:
            return place
    return None


def front_matter(kind: str, licence_name: str, base: str | None) -> str:
    lines = ["---", "language: en", f"license: {licence_name}"]
    if licence_name == "other":
        lines.append("license_name: academic-non-commercial")
    if base:
        lines.append(f"base_model: {base}")
    lines += ["tags: [empathy, empathetic-dialogues]"]
    if kind:
        lines += [f"pipeline_tag: {TASKS[kind][0]}"]
    return "\n".join([*lines, "---"])


def labels(config: dict[str, Any]) -> str:
    """What a critic's outputs mean."""
    if config["kind"] == SENTIMENT:
        return "One number from -1 (negative) to 1 (positive), learnt from VADER's compound score."
    if config.get("heads"):
        return "\n\n".join(labels({"kind": kind, "outputs": n}) for kind, n in config["heads"].items())
    known = DIMENSIONS[config["kind"]]
    rows = [(str(level), text) for level, text in enumerate(known.meanings.get(config["outputs"], ()))]
    return markup.table([known.name, "the reply"], rows)


def command_to_show(command: str, paths: Paths) -> str:
    """A command as it was typed, without places on this machine: what lies in the workdir is seen from there,
    of other places stands the last name."""
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.rpartition("=")  # --model=PLACE, NAME=PLACE
        elsewhere = Path(value).is_absolute() or ".." in Path(value).parts
        words.append(flag + equals + (paths.name(value) if elsewhere else value))
    return shlex.join(words)


def rows(figures: dict[str, Any]) -> str:
    """A row of a table for each figure."""
    flat = pd.json_normalize(figures, sep=", ").iloc[0].to_dict()
    return "\n".join(
        f"| {k} | {v:.4f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in flat.items()
    )


def bundled_card(card: str, folder: Path, figures: dict[str, Any]) -> str:
    """A run's card where it stands bundled in `folder` (bundling.py), with further figures."""
    card = card.replace(OF_THE_PUBLISHED, OF_THE_BUNDLE)
    if figures:
        card = card.replace(FIGURES, f"{FIGURES}{rows(figures)}\n", 1)
    # in the quotes that the formatter wants of a page in the repository
    card = re.sub(r"(?<=from_pretrained\()'[^']*'", f'"{Paths(HERE).name(folder)}"', card)
    title = f"# {folder.absolute().parent.name}/{folder.name}"
    return re.sub(r"^# .*", title, card, count=1, flags=re.MULTILINE)


def write_card(folder: Path, result: dict) -> None:
    """README.md of a finished run, with what the hub shows of it."""
    known = read_if_there(folder / "environment.json")
    made = {k: known.get(k, "unknown") for k in ("command", "commit", "device", "platform", "started")}
    recorded = read_json(folder / "args.json")
    kind, args = kind_of(folder), recorded["args"]
    config = read_json(folder / "config.json") if kind == "Critic" else {}
    workdir = str(args.get("workdir") or ".")
    made["command"] = command_to_show(made["command"], Paths(workdir))
    licence_name, terms = licence(
        kind, config.get("kind", ""), recorded["inputs"], workdir, args.get("dataset", "")
    )
    resumed = f"; resumed {len(known['resumed'])} times" if "resumed" in known else ""
    versions = known.get("versions", {})
    packages = "".join(f", {name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    inputs = [f"- `{name}` sha256 `{digest[:16]}`" for name, digest in recorded["inputs"].items()]
    parts = [
        front_matter(kind, licence_name, base_model(kind, folder, args))
        + f"\n# {folder.parent.name}/{folder.name}"
    ]
    if kind:
        run = Paths(workdir).note(folder)
        which = ', kind="emo"' if config.get("heads") else ""
        snippet = SNIPPETS[kind].format(run=run, which=which)
        what = TASKS[kind][1]
        if config and not config["context_len"]:
            what = "A critic: what a reply is like, read by itself; no context changes what it says."
        parts.append(
            f"{what}\n\n```python\n{snippet}\n```\n\nRun it in the project's folder, with the "
            "run's place as seen from there, or with its name on the hub."
        )
    if config:
        parts.append(f"## What it says\n\n{labels(config)}")
    parts += [
        f"Made by `{made['command']}` at commit {made['commit']} on {made['device']} ({made['platform']}"
        f"{packages}), {made['started']}{resumed}. {OF_THE_RUN}",
        f"{FIGURES}{rows(result)}" + f"\n\n{CHOSEN}" * ("valid" in result and "best_step" in result),
        "## Made from\n\n" + "\n".join(inputs),
        f"## Licence and limits\n\n{terms} Research code for empathetic replies in small talk in English. "
        "Not a counsellor, and not for people in distress.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")
