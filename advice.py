"""The commands that messages print: composed in one place, so that each one runs when it is pasted.

Nothing heavy is imported. What a command needs to know stands in the path that is missing or was made: a
default place (options.Paths) tells its workdir, and mostly what makes it.
"""

import json
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

from options import DATASETS, DIMENSIONS, FAMILIES, HERE, JOINT, SENTIMENT, Paths, with_halves

#: flags of prepare_data.py that its note holds beside --glove, as they are where nothing is said
PREPARED_WITH = {
    "levels": 2,
    "split": "paper",
    "test_split": "official",
    "test_conversations": 0,
    "glove_dim": 300,
    "min_count": 0,
    "seed": 42,
}
#: the script of each family of generators (their folders under saved/)
GENERATORS = {"t5": "train_t5.py", "glove-t5": "train_glove_t5.py", "causal-lm": "train_causal_lm.py"}


def command(script: str, *words: object, workdir: str | Path = ".", **flags: object) -> str:
    """A line for the shell: a script (`train_t5.py`) or module (`DPR.train_dpr`), its words and its flags.

    A flag that is None or False is left out, one that is True stands alone; `workdir` is left out where it is
    the current folder. From elsewhere than the project's folder the script is named by its full path.
    """
    if script.endswith(".py"):
        line = ["python", script_at(script)]
    elif Path.cwd() == HERE:
        line = ["python", "-m", script]
    else:
        line = ["python", str(HERE / (script.replace(".", os.sep) + ".py"))]
    line += map(str, words)
    if Path(workdir) != Path("."):
        flags = {"workdir": workdir, **flags}
    for name, value in flags.items():
        if value is True:
            line.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            line += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line)


def script_at(name: str) -> str:
    """A script's name, from elsewhere than the project's folder its full path."""
    return name if Path.cwd() == HERE else str(HERE / name)


def without_anew(words: list[str]) -> list[str]:
    """A command without the flags that would begin its run anew or elsewhere."""
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if word != "--overwrite" and not word.startswith("--resume") and before != "--resume":
            kept.append(word)
    return kept


# ------------------------------------------------------------------------------------------- what makes what


def preparation(workdir: Path) -> dict:
    """What prepare_data.py has noted of a workdir; empty: not yet prepared."""
    try:
        made = json.loads((Paths(workdir).data / "prepared.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def prepared_from(workdir: Path) -> str | None:
    """What prepare_data.py has prepared a workdir from: sample, download, folder or own; None: not yet."""
    return preparation(workdir).get("source")


def candidates(workdir: Path) -> str | None:
    """Whose replies are exemplars, where it is not the default: own dialogues may have no emotions."""
    own = preparation(workdir).get("own")
    return "all" if isinstance(own, dict) and not own.get("emotions") else None


#: what to do without pairs: own dialogues mostly come without
NO_PAIRS = "these dialogues came without pairs of a post and a reply, from which a critic of empathy learns"


def lacks_pairs(workdir: Path) -> bool:
    """Whether no critic of empathy can be trained in a workdir: of own dialogues, prepared without pairs."""
    return prepared_from(workdir) == "own" and not Paths(workdir).pairs_dir.exists()


def prepare(workdir: Path) -> str:
    """What makes the prepared data of a workdir, again where some of it is there."""
    paths, source = Paths(workdir), prepared_from(workdir)
    again = any(p.exists() for p in (paths.dialogues_dir, paths.pairs_dir, paths.glove, paths.t5_tiny))
    noted = preparation(workdir)
    words = noted.get("glove", "auto")
    # the note does not say which folder or file, and without it others would take its place
    if source in ("folder", "own") or words not in ("auto", "package", "download"):
        return "prepare_data.py --overwrite, and the --source and --workdir it was made with"
    kept = {name: noted[name] for name, usual in PREPARED_WITH.items() if noted.get(name, usual) != usual}
    kept |= {"glove": words} if words != "auto" else {}
    line = command("prepare_data.py", workdir=workdir, source=source, overwrite=again, **kept)
    return line if source else f"{line}; that is the bundled sample: --source names other dialogues"


def variant_of(model: str) -> re.Match[str] | None:
    """The family, "seeker" and the half in a default name of a critic (minilm-seeker-a); None: a name of
    one's own."""
    return re.fullmatch(r"(t5|glove-t5|minilm)(?:-(seeker))?(?:-([ab]))?", model)


def train_critic(kind: str, model: str, workdir: Path, name: str | None = None) -> str:
    """What trains a critic: of the sample a small one, which needs no model hub.

    `model`: a family, or one with the data that train_empathy_classifier.py puts behind it (minilm-seeker-a).
    """
    if variant := re.fullmatch(r"(.+?)(?:-(seeker))?(?:-([ab]))?", model):
        model, split_by, part = variant.groups()
    small = prepared_from(workdir) == "sample" and model in FAMILIES
    size = "tiny" if small else None
    if kind == SENTIMENT:
        return command("train_sentiment_regressor.py", workdir=workdir, model=model, size=size, name=name)
    flags = {"model": model, "size": size, "split_by": split_by, "part": part, "name": name}
    return command("train_empathy_classifier.py", "--dim", kind, workdir=workdir, **flags)


def for_critic(folder: Path, kind: str, family: str) -> str:
    """What to do where `folder` holds no critic of a kind."""
    if not makes(folder, ""):
        return f"--{kind} takes the run folder of a finished {kind} critic"
    if kind != SENTIMENT and lacks_pairs(workdir_of(folder)):
        flags = " ".join(f"--{dim} RUN" for dim in DIMENSIONS)
        return (
            f"{NO_PAIRS}: give one of another workdir ({flags}), or in a "
            "training leave it out of the loss with --empathy-loss-w 0 (docs/own-dialogues.md)"
        )
    name = Path(folder).name
    if own := re.fullmatch(rf"({re.escape(family)}(?:-seeker)?(?:-[ab])?)-({kind}|{JOINT})", name):
        family, kind, name = own[1], own[2], ""
    elif kind == SENTIMENT and name == family:
        name = ""
    line = train_critic(kind, family, workdir_of(folder), name or None)
    whole = "; --model takes its whole name on the hub, or its folder" * (not variant_of(family))
    return f"make it with: {line}{whole}"


def with_critics(paths: Paths, *models: str) -> list[str]:
    """The families that have finished critics of empathy, among those of `models` and of their halves."""
    names = [name for model in models for name in with_halves(model)]
    return [name for name in names if (paths.find_critic("emo", name) / "result.json").exists()]


def label(workdir: Path, family: str | None = None, output: Path | None = None, again: bool = False) -> str:
    """What labels the dialogues. `family`: whose critics do, if need be those of one half of the posts; by
    default one whose critics are there."""
    paths = Paths(workdir)
    models = [family] if family else list(FAMILIES)
    family = next(iter(with_critics(paths, *models)), models[0])
    output = None if output == paths.dialogues_dir else output
    return command("label_dialogues.py", workdir=workdir, family=family, output=output, overwrite=again)


def retrieve(workdir: Path, output: Path | None = None, again: bool = False) -> str:
    """What finds exemplars, by the retriever that is there or would be by default; for own dialogues, which
    may be too few to train one, by MiniLM as it is."""
    paths = Paths(workdir)
    there = sorted(run.parent for run in (paths.saved / "dpr").glob("*/result.json"))
    default = paths.saved / "dpr" / "empd"
    own = prepared_from(workdir) == "own" and not there
    path = None if own else default if default in there or not there else there[0]
    return command(
        "dpr_exemplar_retriever.py",
        workdir=workdir,
        path=path,
        encoder="minilm" if own else None,
        candidates=candidates(workdir),
        output=None if output == paths.dialogues_dir else output,
        overwrite=again,
    )


def train_retriever(workdir: Path, name: str = "empd") -> str:
    """What trains a retriever: of the sample a small one, which needs no model hub."""
    encoder = Paths(workdir).bert_tiny if prepared_from(workdir) == "sample" else None
    if name in DATASETS:
        return command("DPR.train_dpr", workdir=workdir, dataset=name, encoder=encoder)
    return command("DPR.train_dpr", workdir=workdir, name=name, encoder=encoder)


#: default places below a workdir, by what makes them
PREPARED = r"empathetic_dialogues/(?:original/.*|\w+_vader\.csv)|empathy_mental_health/.*"
PLACES = {
    "prepared": rf"data/(?:{PREPARED}|(?:glove|t5-tiny|bert-tiny)(?:/.*)?)",
    "labels": r"data/empathetic_dialogues/\w+_labels\.csv",
    "exemplars": r"data/empathetic_dialogues/\w+_dpr\.csv",
    "questions": r"data/dpr/(?P<name>.+)_\w+\.json",
    "critic": rf"saved/empathy/(?P<name>.+)-(?P<dim>{'|'.join([*DIMENSIONS, JOINT])})",
    "regressor": rf"saved/{SENTIMENT}/(?P<name>[^/]+)",
    "retriever": r"saved/dpr/(?P<name>[^/]+)(?:/(?:question|context)_encoder)?",
}


def noted_command(note: Path) -> tuple[list[str], dict[str, str]]:
    """The command in a note of what was made, and its flags that name a place; empty where it says none."""
    try:
        words = shlex.split(json.loads(note.read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], {}
    if words[:1] not in (["python"], ["torchrun"]):  # a file that came from elsewhere may say anything
        return [], {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    places = ("--workdir", "--output")
    return words, {flag: value for flag, value in pairwise([*words, ""]) if flag in places}


def anew(run: Path, workdir: Path) -> str:
    """The very command that a run was begun with, to begin it anew; empty where its folder does not say, or
    was moved to another workdir."""
    words, given = noted_command(run / "environment.json")
    if not words or Path(given.get("--workdir", ".")).absolute() != workdir.absolute():
        return ""
    return shlex.join([*without_anew(words), "--overwrite"])


def written_by(file: Path) -> str:
    """The very command that wrote a file of labels or exemplars, to write it again; empty where the note
    beside it does not say, or where that command would write elsewhere. Of a workdir that has been moved it
    is the command for where that is now."""
    words, given = noted_command(file.with_name(f"{file.name}.origin.json"))
    scripts = ("dpr_exemplar_retriever.py", "label_dialogues.py")
    if not any(Path(word).name in scripts for word in words):
        return ""  # called from elsewhere, as by a test
    words = [script_at(Path(word).name) if Path(word).name in scripts else word for word in words]
    here, output = file.absolute().parent, given.get("--output")
    root = here.parent.parent
    if output and Path(output).absolute() != here:
        return ""
    if not output and Paths(root).dialogues_dir != here:
        return ""
    if not output:
        words = moved(words, given.get("--workdir", "."), root)
    return shlex.join([*without_anew(words), "--overwrite"])


def moved(words: list[str], old: str, workdir: Path) -> list[str]:
    """A command that was given in the workdir `old`, for where that lies now: what lay below it, too."""
    if Path(old).absolute() == workdir:
        return words
    below = [old] if old != "." else ["saved", "data"]  # where none was named, its places were seen from it
    out = []
    for word in words:
        inside = any(Path(word).is_relative_to(folder) for folder in below)
        out.append(str(workdir / (word if old == "." else Path(word).relative_to(old))) if inside else word)
    return out if "--workdir" in words else [*out, "--workdir", str(workdir)]


def makes(path: str | Path, otherwise: str) -> str:
    """The command that makes what stands, or would stand, at a default place; elsewhere `otherwise`.

    What is there already (damaged, say) is to be replaced.
    """
    path = Path(path)
    if line := written_by(path):
        return line
    matches = {p: re.fullmatch(rf"(?:(?P<root>.*)/)?{r}", path.as_posix()) for p, r in PLACES.items()}
    place, found = next(((p, m) for p, m in matches.items() if m), ("", None))
    if found is None:
        return otherwise
    workdir, again = Path(found["root"] or "."), path.exists()
    if place == "prepared":
        if "empathy_mental_health" in path.parts and lacks_pairs(workdir):
            return f"{prepare(workdir)}, pairs beside the dialogues (docs/own-dialogues.md)"
        return prepare(workdir)
    if place == "labels":
        return label(workdir, again=again)
    if place == "exemplars":
        return retrieve(workdir, again=again)
    if place == "questions":
        return command("DPR.prepare_dpr_data", workdir=workdir, dataset=found["name"], overwrite=again)
    run = path.parent if path.name.endswith("_encoder") else path
    if again and (line := anew(run, workdir)):
        return line
    if place == "retriever":
        return train_retriever(workdir, found["name"])
    return train_critic(found["dim"] if place == "critic" else SENTIMENT, found["name"], workdir)


# ------------------------------------------------------------------------------------------ of a finished run


def workdir_of(run: Path) -> Path:
    """The workdir of a run in its default place; of any other the current folder."""
    found = re.fullmatch(r"(?:(?P<root>.*)/)?saved/[^/]+/[^/]+", Path(run).as_posix())
    return Path(found["root"] or ".") if found else Path(".")


def kind_of(run: Path) -> tuple[str, str]:
    """(what a run has trained: Generator, Critic ...; family of a generator), as its config.json says."""
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        return str(config["model"]), str(config.get("family", Path(run).absolute().parent.name))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return "", Path(run).absolute().parent.name


#: where a run of a generator is asked for
GIVE_A_GENERATOR = "give the folder of a run of train_t5.py, train_glove_t5.py or train_causal_lm.py"


def after_training(run: Path, split: str | None, workdir: Path) -> str:
    """What comes after the training of a generator; `split`: whose predictions it has written, if any."""
    return table(run, split, workdir) if split else replies(run, "test", workdir)


def replies(run: Path, split: str, workdir: Path | None = None, **flags: object) -> str:
    """What writes a finished generator's predictions for a split. `flags`: of the decoding."""
    model, family = kind_of(run)
    script = GENERATORS.get("causal-lm" if model == "CausalGenerator" else family, GENERATORS["t5"])
    file = "predictions.tsv" if split == "test" else f"predictions_{split}.tsv"
    return command(
        script,
        workdir=workdir_of(run) if workdir is None else workdir,
        inference=run,
        predict_split=None if split == "test" else split,
        overwrite=(Path(run) / file).exists(),
        **flags,
    )


def table(run: Path, split: str, workdir: Path) -> str:
    """What scores a generator's predictions, by critics that are there: its own family's first."""
    paths, family = Paths(workdir), Path(run).absolute().parent.name
    name = None
    if (paths.results / "evaluation" / "metrics.json").exists():  # of other runs: left as it is
        name = f"{family}-{Path(run).name}"
    return command(
        "evaluate_responses.py",
        run,
        workdir=workdir,
        family=next(iter(with_critics(paths, family, *FAMILIES)), None),
        split=None if split == "test" else split,
        name=name,
        overwrite=bool(name) and (paths.results / str(name) / "metrics.json").exists(),
    )
