"""Flags of a recipe reach the commands that know them, and each command still parses."""

from pathlib import Path

import pytest
from conftest import SAMPLE
from test_scripts import PARSERS

import advice
import prepare_data
import recipes
import reproduce
import storage
from options import CRITICS, DIMENSIONS, Paths, UserError
from settings import generator_command

ALL = {**PARSERS, "prepare_data.py": prepare_data.parse_args}


#: dialogues of one's own, for the recipe that has no other source
OWN = str(SAMPLE / "own.jsonl")


def commands(*words: str) -> list[list[str]]:
    given = ["--source", OWN] if "own" in words else []
    args = reproduce.parse_args([*words, *given, "--dry-run"])
    changes = recipes.Changes(args.seed, args.epochs, args.batch_size, tuple(args.override))
    recipe = recipes.RECIPES[args.recipe](args.source)
    return [stage.command for stage in recipes.plan(recipe, args.workdir, args.source, changes)]


def parsed(command: list[str]):
    """(script, its args) of a command of a recipe."""
    script, *words = command[1:] if command[0] == "-m" else command
    return script, ALL[script](words)


@pytest.mark.parametrize("recipe", list(recipes.RECIPES))
def test_flags_reach_every_training_and_only_trainings(recipe, tmp_path):
    flags = ["--seed", "7", "--epochs", "3", "--batch-size", "5", "--workdir", str(tmp_path)]
    for command in commands("--recipe", recipe, *flags):
        for word in command:
            if word.startswith(str(tmp_path)) and not word.endswith(".jsonl"):
                (tmp_path / word).mkdir(parents=True, exist_ok=True)  # what evaluate_responses is given
        script, args = parsed(command)
        # a teacher is to differ from the judges, whatever the seed of the call
        assert args.seed == 7 or (args.seed == 13 and "minilm" in command)
        if script.removeprefix("DPR.").startswith("train_"):
            assert (args.epochs, args.batch_size) == (3, 5)
        elif hasattr(args, "batch_size"):
            assert args.batch_size == {"label_dialogues.py": 0}.get(script, 128)


def test_an_override_is_of_one_script_and_stands_over_the_other_flags(tmp_path):
    override = ["--override", "train_t5.py --epochs 4 --no-predict", "--override", "DPR.train_dpr --lr=1e-3"]
    found = dict(
        parsed(c)
        for c in commands("--recipe", "t5", "--epochs", "3", "--workdir", str(tmp_path), *override)
        if "evaluate" not in c[0]
    )
    assert (found["train_t5.py"].epochs, found["train_t5.py"].predict) == (4, False)
    assert (found["DPR.train_dpr"].epochs, found["DPR.train_dpr"].lr) == (3, 1e-3)
    assert found["train_sentiment_regressor.py"].epochs == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_t5.py --epoch 3", "train_t5.py has no --epoch"),
        ("train_gpt.py --epochs 3", "the recipe runs"),
        ("train_t5.py", "needs a flag"),
        ("train_t5.py --name mine", "later commands look where this one writes now; leave --name out"),
    ],
)
def test_a_wrong_override_is_refused_before_anything_runs(override, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        commands("--recipe", "t5", "--workdir", str(tmp_path), "--override", override)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("own", "train_causal_lm.py --control marks"),
        ("glove", "train_glove_t5.py --targets all"),
        ("t5", "train_empathy_classifier.py --model mine/encoder"),
    ],
)
def test_an_override_saves_where_later_commands_look(recipe, override, tmp_path):
    """By the commands alone: runs stand where the table and the labels look for them."""
    paths, made, asked = Paths(tmp_path), set(), set()
    stages = {
        "train_empathy_classifier.py": "empathy",
        "train_sentiment_regressor.py": "sentiment",
        "train_t5.py": "t5",
        "train_glove_t5.py": "glove-t5",
        "train_causal_lm.py": "causal-lm",
    }
    for script, *words in commands("--recipe", recipe, "--workdir", str(tmp_path), "--override", override):
        if script in stages and "--name" in words:  # the judges' run has none
            made.add(paths.saved / stages[script] / words[words.index("--name") + 1])
        elif script == "evaluate_responses.py":
            asked |= {Path(word) for word in words if word.startswith(str(paths.saved))}
        elif script == "label_dialogues.py":
            asked |= {paths.critic(kind, words[words.index("--family") + 1]) for kind in CRITICS}
    assert asked == made


def test_figures_of_other_commands_than_the_rows_own_are_not_recorded(tmp_path, capsys):
    asked = ["--table", "retrieval", "--record", "epyc", "--epochs", "1", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit):
        reproduce.parse_args(asked)
    assert "--record: what is recorded are the rows' own commands" in capsys.readouterr().err


def test_no_stage_measures_a_gpu_that_others_are_filling(tmp_path, capsys):
    words = ["--recipe", "t5", "--batch-size", "auto", "--workdir", str(tmp_path)]
    assert reproduce.parse_args(words).batch_size == "auto"
    with pytest.raises(SystemExit):
        reproduce.parse_args([*words, "--parallel", "2"])
    assert "--batch-size auto fills a GPU, and --parallel" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["t5", "glove-t5"])
def test_what_judges_a_recipes_table_has_seen_other_posts_than_its_critics(family, tmp_path):
    """By the commands alone: which critics are trained, of which half, and which of them label and lead."""
    halves, led = {}, {}
    for command in commands("--recipe", family.removesuffix("-t5"), "--workdir", str(tmp_path)):
        if command[0] in ("evaluate_responses.py", "dpr_exemplar_retriever.py"):
            continue
        script, args = parsed(command)
        if script == "train_empathy_classifier.py":
            variant = f"-{args.part}" * (args.part != "all")
            halves[Paths(tmp_path).critic(args.dim, args.model + variant)] = args.part
        elif script == "label_dialogues.py":
            assert args.family == f"{family}-a"
        elif script in ("train_t5.py", "train_glove_t5.py"):
            led |= generator_command(args, family).critics
    assert [halves[led[dim]] for dim in DIMENSIONS] == ["a"] * 3
    assert led["sentiment"] == tmp_path / "saved" / "sentiment" / family
    assert halves[tmp_path / "saved" / "empathy" / "minilm-b-all"] == "b"


def test_critics_of_one_half_are_found_by_what_comes_next(tmp_path):
    paths, run = Paths(tmp_path), tmp_path / "saved" / "glove-t5" / "pool-glove-critics"
    assert "--family" not in advice.table(run, "test", tmp_path)
    storage.write_json(paths.critic("emo", "glove-t5-a") / "result.json", {})
    assert "--family glove-t5-a" in advice.table(run, "test", tmp_path)
    assert "--family glove-t5-a" in advice.label(tmp_path) == advice.label(tmp_path, "glove-t5")
    assert paths.critic("sentiment", "glove-t5-seeker-a").name == "glove-t5", "it knows no halves"


def test_a_critic_of_one_half_is_made_of_that_half():
    said = advice.for_critic(Path("w/saved/empathy/glove-t5-a-exp"), "exp", "glove-t5")
    assert said.endswith("--dim exp --workdir w --model glove-t5 --part a")
    said = advice.for_critic(Path("w/saved/empathy/glove-t5-b-all"), "exp", "glove-t5")
    assert said.endswith("--dim all --workdir w --model glove-t5 --part b")
    said = advice.for_critic(Path("w/saved/empathy/mine-a-exp"), "exp", "glove-t5")
    assert said.endswith("--model glove-t5 --name mine-a-exp")


def test_a_row_that_there_is_not_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="emo-glove-t5"):
        reproduce.parse_args(["--check", "emo-glove-t6", "--workdir", str(tmp_path / "new")])
    with pytest.raises(UserError, match="--check gold: the row has no commands of its own"):
        reproduce.parse_args(["--check", "gold", "--workdir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_source_is_a_place_of_the_users_not_of_the_workdir(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = ["--recipe", "glove", "--workdir", str(tmp_path / "run"), "--source"]
    assert str(tmp_path / "data") in commands(*words, "data")[0]
    monkeypatch.chdir(reproduce.HERE)
    assert str(reproduce.HERE / "data" / "sample") in commands(*words, "data/sample")[0]
    wrong = [("glove", "nowhere"), ("own", "chts.jsonl"), ("own", "download"), ("t5", OWN)]
    for recipe, source in [*wrong, ("sample", str(tmp_path))]:
        with pytest.raises(SystemExit):
            reproduce.parse_args(["--recipe", recipe, "--source", source, "--workdir", str(tmp_path / "no")])
    said = capsys.readouterr().err
    assert "nowhere: neither download, sample, prepared nor a folder" in said
    assert "chts.jsonl: neither prepared nor a file or folder" in said
    assert "the recipe sample is of the bundled sample" in said
    assert "--recipe own: give your dialogues with --source" in said
    assert (
        f"{OWN}: a file; the real corpora are a folder, and dialogues of your own have --recipe own" in said
    )
    assert not (tmp_path / "no").exists() and "no such folder" not in said  # a recipe makes it


def test_a_file_that_is_called_as_a_source_is_does_not_stand_for_it(tmp_path, monkeypatch):
    (tmp_path / "download").touch()
    monkeypatch.chdir(tmp_path)
    assert commands("--recipe", "t5")[0][:3] == ["prepare_data.py", "--source", "download"]


def test_a_call_that_is_refused_leaves_no_folder(tmp_path):
    for flags in ("--seed -1", "--parallel 0", "--minutes 0"):
        with pytest.raises(SystemExit):
            reproduce.parse_args(["--recipe", "sample", "--workdir", str(tmp_path / "new"), *flags.split()])
        assert not (tmp_path / "new").exists()
    reproduce.parse_args(["--recipe", "sample", "--workdir", str(tmp_path / "new")])
    assert (tmp_path / "new").is_dir()
