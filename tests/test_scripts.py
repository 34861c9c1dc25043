"""Every script in process, on the tiny configs: what it leaves behind, what it prints, how it refuses."""

import importlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Killed, logged, swap_words
from safetensors.torch import load_file, save_file

import app
import control
import dpr_exemplar_retriever
import evaluate_responses
import label_dialogues
import prepare_data
import probe_critics
import recipes
import reproduce
import respond
import retrieve
import score
import settings
import storage
import train_causal_lm
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from corpora import listener_turns, read_exemplars, read_labels
from DPR import evaluate_retriever, prepare_dpr_data, train_dpr
from models import Critic
from options import CRITICS, Paths, UserError
from systems import read_run, require_complete

RUN_FILES = {
    "args.json",
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "model.safetensors",
    "README.md",
    "result.json",
    "sources.json",
    "tokenizer.json",
    "tokenizer_config.json",
    ".lock",
}
FAMILIES = {"t5": (train_t5, ["--model", "t5-tiny"]), "glove-t5": (train_glove_t5, ["--size", "tiny"])}
NO_CRITICS = ["--empathy-loss-w", "0", "--sentiment-loss-w", "0"]


def short(workdir: Path) -> list[str]:
    return [
        "--workdir",
        str(workdir),
        "--device",
        "cpu",
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--max-new-tokens",
        "5",
        "--src-len",
        "40",
        "--tgt-len",
        "12",
        "--exemplar-len",
        "16",
        "--exemplar-model",
        "t5-tiny",
        "--exemplar-layers",
        "1",
    ]


def on(workdir: Path, flags: str) -> list[str]:
    return ["--workdir", str(workdir), *flags.split()]


def files_of(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith("events.out")}


# ---------------------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize("model", ["t5", "glove-t5"])
@pytest.mark.parametrize("kind", ["emo", "exp", "int", "sentiment"])
def test_a_critic_run_is_complete_and_stands_beside_its_baselines(trained, model, kind):
    folder = Paths(trained).critic(kind, model)
    assert files_of(folder) == RUN_FILES
    assert (
        len({p.stat().st_mode for p in folder.rglob("*") if p.is_file()}) == 1
    )  # who may read one file may read all
    result = json.loads((folder / "result.json").read_text())
    if kind == "sentiment":
        assert result["valid"].keys() == result["baselines"]["mean"].keys() == {"mse", "pearson"}
    else:
        assert result["baselines"].keys() == {"majority", "tfidf"}
        known = {"accuracy", "macro_f1", "weighted_f1", "f1_0", "f1_1", "calibration_error"}
        assert known == result["valid"].keys()


def test_three_levels_make_three_outputs(workdir):
    for split in ("train", "valid"):
        file = Paths(workdir).pairs("emo", split)
        table = pd.read_csv(file)
        table.assign(label=table["level"]).to_csv(file, index=False)
    train_empathy_classifier.main(
        on(workdir, "--model glove-t5 --size tiny --dim emo --max-steps 1 --class-weights --pooling first")
    )
    assert (
        load_file(Paths(workdir).critic("emo", "glove-t5") / "model.safetensors")["head.weight"].shape[0] == 3
    )


def test_a_glove_critic_learns_more_than_the_majority_class(workdir):
    """A floor, read back from result.json: questions are easy to tell."""
    train_empathy_classifier.main(
        on(workdir, "--model glove-t5 --size tiny --dim exp --lr 3e-3 --epochs 20 --log-every 100")
    )
    result = json.loads((Paths(workdir).critic("exp", "glove-t5") / "result.json").read_text())
    assert result["valid"]["macro_f1"] > result["baselines"]["majority"]["macro_f1"] + 20


def test_labels_cover_every_listener_turn_and_name_their_critics(trained):
    paths = Paths(trained)
    for split in ("train", "valid", "test"):
        examples = listener_turns(paths.dialogues(split))
        labels = read_labels(paths.labels(split), examples)
        assert len(labels["emo"]) == len(examples)
        origin = json.loads(Path(f"{paths.labels(split)}.origin.json").read_text())
        assert origin["emo"]["critic"].endswith("glove-t5-emo") and len(origin["emo"]["sha256"]) == 64


def test_labelling_again_keeps_what_is_there_and_refuses_other_critics(trained_copy, capsys):
    mixed = [
        "--workdir",
        str(trained_copy),
        "--emo",
        str(Paths(trained_copy).critic("emo", "t5")),
        "--family",
        "t5",
        "--output",
        str(trained_copy),
    ]
    for _ in range(2):
        label_dialogues.main(mixed)
    assert capsys.readouterr().out.count("kept") == 3
    with pytest.raises(UserError, match="another emo.*--overwrite"):
        label_dialogues.main(["--workdir", str(trained_copy), "--family", "t5"])


# -------------------------------------------------------------------------------------------------- retrieval


def test_the_retriever_is_saved_as_two_folders_and_reports_before_and_after(trained):
    folder = trained / "saved" / "dpr" / "empd"
    assert files_of(folder) == RUN_FILES - {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } | {
        "question_encoder",
        "context_encoder",
    }
    result = json.loads((folder / "result.json").read_text())
    assert (
        result["before"].keys()
        == result["after"].keys()
        == {"average_rank", "recall_1", "recall_10", "recall_50", "mrr"}
    )


@pytest.mark.parametrize("dataset", ["reddit", "empd-reddit"])
def test_the_other_dpr_datasets_train(trained_copy, dataset):
    common = ["--workdir", str(trained_copy), "--dataset", dataset]
    prepare_dpr_data.main(common)
    train_dpr.main(
        [
            *common,
            "--encoder",
            str(trained_copy / "data" / "bert-tiny"),
            "--max-steps",
            "1",
            "--batch-size",
            "3",
            "--pooling",
            "mean",
        ]
    )
    assert (trained_copy / "saved" / "dpr" / dataset / "context_encoder" / "model.safetensors").exists()


def test_exemplars_come_from_other_training_conversations(trained):
    paths = Paths(trained)
    corpus = {e.key: e for e in listener_turns(paths.dialogues("train"))}
    for split in ("train", "test"):
        table = pd.read_csv(paths.exemplars(split), keep_default_na=False)
        for row in table.itertuples():
            for (conv, index), text in zip(
                json.loads(row.exemplars_index), json.loads(row.exemplars), strict=True
            ):
                assert (
                    conv != row.conv_id
                    and corpus[conv, index].response == text
                    and corpus[conv, index].emotion == row.emotion
                )


def test_retrieval_without_the_gold_emotion_and_without_fine_tuning(trained_copy):
    dpr_exemplar_retriever.main(
        [
            "--workdir",
            str(trained_copy),
            "--encoder",
            str(trained_copy / "data" / "bert-tiny"),
            "--candidates",
            "all",
            "--top-k",
            "4",
            "--splits",
            "test",
            "--output",
            str(trained_copy / "all"),
        ]
    )
    examples = listener_turns(Paths(trained_copy).dialogues("test"))
    found = read_exemplars(trained_copy / "all" / "test_dpr.csv", examples)
    assert all(len(row) == 4 for row in found)


# ------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exemplars", ["none", "prepend", "t5", "glove-t5"])
@pytest.mark.parametrize("critics", [True, False])
def test_every_combination_trains_and_writes_replies(trained_copy, family, exemplars, critics):
    """x both decodings: sampling after training, beams by --inference."""
    script, flags = FAMILIES[family]
    folder = trained_copy / "saved" / family / "run"
    script.main(
        [
            *short(trained_copy),
            *flags,
            "--name",
            "run",
            "--add-exemplars",
            exemplars,
            *([] if critics else NO_CRITICS),
        ]
    )
    assert files_of(folder) == RUN_FILES | {
        "predictions.tsv",
        "predictions.tsv.origin.json",
        "likelihood.csv",
        "likelihood.csv.origin.json",
        *(["exemplar_words"] if (family, exemplars) == ("t5", "glove-t5") else []),
    }
    examples = listener_turns(Paths(trained_copy).dialogues("test"))
    sampled = (folder / "predictions.tsv").read_text()
    assert len(sampled.splitlines()) == len(examples) + 1
    terms = {"nll", "emo", "exp", "int", "sentiment"} if critics else {"nll"}
    first = logged(folder, "train")[0]
    assert terms == first.keys() - {"step", "epoch", "kind", "loss", "lr", "grad_norm"}
    assert first["loss"] == pytest.approx(sum(first[t] for t in terms), rel=1e-4)
    script.main([*short(trained_copy), "--inference", str(folder), "--beams", "2", "--overwrite"])
    assert len((folder / "predictions.tsv").read_text().splitlines()) == len(examples) + 1
    script.main([*short(trained_copy), "--inference", str(folder), "--overwrite"])
    assert (folder / "predictions.tsv").read_text() == sampled  # the saved run is the trained model


def test_a_finished_run_takes_flags_that_nothing_reads_and_says_how_to_get_its_replies(trained_copy, capsys):
    words = [*short(trained_copy), "--size", "tiny", "--max-steps", "1", "--name", "bare", *NO_CRITICS]
    words += ["--add-exemplars", "none"]
    train_glove_t5.main([*words, "--no-predict"])
    capsys.readouterr()
    train_glove_t5.main([*words, "--samples", "3", "--top-exemplars", "2"])
    out = capsys.readouterr().out
    assert "--top-exemplars, --exemplar-len: ignored" in out and "already finished" in out
    assert f"its replies: python train_glove_t5.py --workdir {trained_copy} --inference" in out


def test_critics_stay_as_they_were_and_are_not_in_the_generator(trained_copy, monkeypatch):
    """The critics that the losses asked, as the last update left them, beside the files they came from."""
    asked = []
    forward_words = Critic.forward_words

    def remembered(critic, *args, **kwargs):
        assert not critic.training
        asked.append(critic)
        return forward_words(critic, *args, **kwargs)

    monkeypatch.setattr(Critic, "forward_words", remembered)
    paths = Paths(trained_copy)
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict"])
    held = [critic.state_dict() for critic in dict.fromkeys(asked)]
    assert len(held) == len(CRITICS)
    for kind in CRITICS:
        saved = load_file(paths.critic(kind, "glove-t5") / "model.safetensors")
        assert [all(torch.equal(state[k], v) for k, v in saved.items()) for state in held].count(True) == 1
    assert not [
        k
        for k in load_file(paths.saved / "glove-t5" / "lempex" / "model.safetensors")
        if "critic" in k or "head" in k
    ]


def test_without_critic_weights_no_critic_is_needed(prepared, tmp_path):
    train_glove_t5.main(
        [
            *on(
                prepared,
                f"--size tiny --max-steps 1 --add-exemplars none --no-predict --name {tmp_path.name}",
            ),
            *NO_CRITICS,
        ]
    )
    assert (prepared / "saved" / "glove-t5" / tmp_path.name / "result.json").exists()


def test_critics_are_asked_about_a_reply_that_says_nothing(trained_copy, capsys):
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict"])
    shown = re.findall(
        r"critic (\w+) on a reply that says nothing: loss ([\d.]+), of a guess by frequency ([\d.]+)",
        capsys.readouterr().out,
    )
    assert [kind for kind, _, _ in shown] == ["emo", "exp", "int", "sentiment"]
    labels = pd.read_csv(Paths(trained_copy).labels("train"))
    for kind, loss, guess in shown:
        shares = labels[kind].value_counts(normalize=True)
        expected = labels[kind].var(ddof=0) if kind == "sentiment" else -(shares * np.log(shares)).sum()
        assert float(guess) == pytest.approx(expected, abs=0.006)
        assert 0 < float(loss) < 20


def test_labels_of_other_critics_than_the_loss_are_named(trained_copy, capsys):
    label_dialogues.main(
        ["--workdir", str(trained_copy), "--family", "t5", "--output", str(trained_copy / "other")]
    )
    train_glove_t5.main(
        [*short(trained_copy), "--size", "tiny", "--no-predict", "--labels", str(trained_copy / "other")]
    )
    assert "note: the emo labels" in (shown := capsys.readouterr().out) and "note: the sentiment" not in shown
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict", "--overwrite"])
    assert "note: the emo labels" not in capsys.readouterr().out


def test_inference_reads_the_exemplars_that_the_run_was_trained_on(trained_copy):
    shutil.copytree(
        Paths(trained_copy).dialogues_dir, trained_copy / "mine", ignore=shutil.ignore_patterns("original")
    )
    words = [*short(trained_copy), "--size", "tiny", *NO_CRITICS]
    train_glove_t5.main([*words, "--no-predict", "--exemplars", str(trained_copy / "mine")])
    folder = trained_copy / "saved" / "glove-t5" / "exemplars"
    train_glove_t5.main([*words, "--inference", str(folder)])
    origin = json.loads((folder / "predictions.tsv.origin.json").read_text())
    assert origin["exemplars"]["path"] == "mine/test_dpr.csv"


def test_a_useless_critic_is_named_in_plain_words(trained_copy, capsys):
    file = Paths(trained_copy).critic("emo", "glove-t5") / "result.json"
    result = json.loads(file.read_text())
    result["valid"] = result["baselines"]["majority"]
    file.write_text(json.dumps(result))
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict"])
    assert re.search(r"critic emo: .*WARNING: no better than guessing", capsys.readouterr().out)


def test_the_loss_falls_and_replies_follow_the_speakers(trained_copy):
    flags = "--size tiny --epochs 10 --lr 3e-3 --batch-size 8 --exemplar-len 16 --max-new-tokens 12"
    train_glove_t5.main(on(trained_copy, f"{flags} --log-every 1 --device cpu"))
    folder = trained_copy / "saved" / "glove-t5" / "lempex"
    rows = logged(folder)
    losses, nlls = ([r[k] for r in rows if r["kind"] == "train"] for k in ("loss", "nll"))
    assert losses[-1] < 0.8 * losses[0] and nlls[-1] < 0.8 * nlls[0]
    held = [r["nll"] for r in rows if r["kind"] == "valid"]
    assert min(held[5:]) < min(held[:5])

    # the same run with speaker and listener exchanged: gold replies are scored and replies written otherwise
    exchanged = folder.with_name("exchanged")
    shutil.copytree(folder, exchanged)
    weights = load_file(exchanged / "model.safetensors")
    weights["speakers.weight"] = weights["speakers.weight"][[0, 2, 1]]
    save_file(weights, exchanged / "model.safetensors")
    again = ["--inference", str(exchanged), "--overwrite"]
    train_glove_t5.main([*on(trained_copy, f"{flags} --device cpu"), *again])
    nll, other_nll = (pd.read_csv(f / "likelihood.csv")["nll"] for f in (folder, exchanged))
    assert (nll != other_nll).all()
    assert (folder / "predictions.tsv").read_text() != (exchanged / "predictions.tsv").read_text()


def test_bf16_on_cpu_trains_to_about_the_same_loss(trained_copy):
    found = []
    for precision in ("fp32", "bf16"):
        train_glove_t5.main(
            [
                *short(trained_copy),
                "--size",
                "tiny",
                "--precision",
                precision,
                "--name",
                precision,
                "--no-predict",
                "--dropout",
                "0",
            ]
        )
        found.append(logged(trained_copy / "saved" / "glove-t5" / precision)[-1]["nll"])
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_dpr_in_two_processes_takes_in_batch_negatives_from_both(trained_copy):
    """Without dropout, the losses of one process with the doubled batch, also in a step of one question."""
    file = Paths(trained_copy).dpr_data("empd", "train")
    file.write_text(json.dumps(json.loads(file.read_text())[:13]))
    bert = trained_copy / "data" / "bert-tiny"
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    common = [
        "--workdir",
        str(trained_copy),
        "--encoder",
        str(bert),
        "--epochs",
        "1",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "DPR.train_dpr",
            *common,
            "--batch-size",
            "3",
            "--name",
            "two",
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        timeout=300,
    )
    train_dpr.main([*common, "--batch-size", "6", "--name", "one"])
    losses = [
        [r["nll"] for r in logged(trained_copy / "saved" / "dpr" / name, "train")] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ----------------------------------------------------------------------------------------------------- tables


def test_the_table_has_gold_runs_and_foreign_predictions(trained_copy):
    train_glove_t5.main([*short(trained_copy), "--size", "tiny"])
    run_folder = trained_copy / "saved" / "glove-t5" / "lempex"
    foreign = trained_copy / "theirs.tsv"
    foreign.write_text(
        (run_folder / "predictions.tsv")
        .read_text()
        .replace("\n", " <b>|</b>\n")
        .replace("response <b>|</b>", "response")
    )
    evaluate_responses.main(
        [
            "--workdir",
            str(trained_copy),
            str(run_folder),
            str(foreign),
            "--family",
            "glove-t5",
            "--cases",
            "99",
            "--untuned-exemplars",  # the same as the tuned ones here
            str(trained_copy / "data" / "empathetic_dialogues"),
        ]
    )
    folder = trained_copy / "results" / "evaluation"
    pages = {"case_studies.md", "case_studies.html"}
    assert (
        files_of(folder)
        == {"metrics.json", "table.md", "items.csv", "pairs.csv", "learning_curves.png", "levels.png"} | pages
    )
    systems = json.loads((folder / "metrics.json").read_text())["systems"]
    assert list(systems) == ["gold", "glove-t5/lempex", "theirs"]
    below = (folder / "table.md").read_text().split("\n\n", 1)[1]
    judged = "glove-t5/lempex was trained against the very critics that judge it here, or on their labels: "
    assert "tok:none" in below and judged + "emo, exp, int, sentiment" in below
    assert (
        systems["gold"]["norm_bleu_4"] == pytest.approx(100)
        and systems["glove-t5/lempex"]["ppl_word"] > 1
        and "ppl_word" not in systems["theirs"]
    )
    page = (folder / "case_studies.md").read_text()
    assert page.count("## ") == 2 * 14 and "exemplar 1" in page and "very small model" in page
    assert "# Top exemplar of each retriever: gold, tuned retriever, untuned retriever" in page
    assert "<b>" not in page and "&lt;b&gt;\\|" in page


def test_perplexity_of_the_table_is_the_sum_of_the_likelihood_file(trained_copy):
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", *NO_CRITICS])
    folder = trained_copy / "saved" / "glove-t5" / "exemplars"
    evaluate_responses.main([*on(trained_copy, "--family glove-t5 --device cpu"), str(folder)])
    sums = pd.read_csv(folder / "likelihood.csv")[["nll", "tokens", "words"]].sum()
    expected = {
        "ppl_token": pytest.approx(np.exp(sums.nll / sums.tokens), rel=1e-6),
        "ppl_word": pytest.approx(np.exp(sums.nll / sums.words), rel=1e-6),
    }
    results = trained_copy / "results" / "evaluation"
    row = json.loads((results / "metrics.json").read_text())["systems"]["glove-t5/exemplars"]
    note = json.loads((folder / "likelihood.csv.origin.json").read_text())["perplexity"]
    for found in (row, note, json.loads((folder / "result.json").read_text())["test"]):
        assert {k: found[k] for k in expected} == expected

    lines = [line.strip("| ").split(" | ") for line in (results / "table.md").read_text().splitlines()]
    shown = next(dict(zip(lines[0], line, strict=True)) for line in lines if line[0] == "glove-t5/exemplars")
    assert shown["PPL/token"] == f"{row['ppl_token']:.2f}" and shown["PPL/word"] == f"{row['ppl_word']:.2f}"


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("script", [train_t5, train_causal_lm, label_dialogues])
def test_flags_that_another_one_makes_void_are_named(script, tmp_path, capsys):
    parse = script.parse_args
    place = ["--workdir", str(tmp_path)]
    named = [word for dim in ("emo", "exp", "int") for word in (f"--{dim}", f"saved/empathy/mine-{dim}")]
    alike = ["--family", "glove-t5-a", *place]
    if script is train_causal_lm:  # whose critics give rewards alone
        alike += ["--sampled-loss-w", "1"]
    parse([*named[:4], *alike])
    assert "ignored" not in capsys.readouterr().out
    if script is label_dialogues:
        parse([*named, *alike])
        assert "note: --family glove-t5-a: ignored" in capsys.readouterr().out
        return
    parse([*named, "--sentiment", "mine", *alike])
    assert "note: --family glove-t5-a: ignored" in capsys.readouterr().out
    parse(["--beams", "4", "--temperature", "0.5", *place])
    assert "note: --temperature: ignored, since --beams 4 samples nothing" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_t5, train_glove_t5])
def test_all_flag_errors_are_reported_together(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(
            [
                "--workdir",
                str(tmp_path / "nowhere"),
                "--lr",
                "-1",
                "--top-k",
                "0",
                "--temperature",
                "0",
                "--batch-size",
                "0",
            ]
        )
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(flag in shown for flag in ("--workdir", "--lr", "--top-k", "--temperature", "--batch-size"))


def test_abbreviated_and_unknown_flags_are_refused(capsys):
    for words in (["--epoch", "3"], ["--learning-rate", "3"]):
        with pytest.raises(SystemExit):
            train_t5.main(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_an_error(trained):
    with pytest.raises(UserError, match="--device cuda"):
        train_glove_t5.main(["--workdir", str(trained), "--device", "cuda"])


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (train_empathy_classifier.main, ["--dim", "emo", "--model", "glove-t5"], "prepare_data.py"),
        (train_sentiment_regressor.main, ["--model", "glove-t5"], "prepare_data.py"),
        (label_dialogues.main, [], "train_empathy_classifier.py"),
        (prepare_dpr_data.main, [], "prepare_data.py"),
        (train_dpr.main, ["--encoder", "x"], "prepare_dpr_data"),
        (train_glove_t5.main, ["--size", "tiny"], "prepare_data.py"),
        (train_t5.main, ["--inference", "nowhere"], "not a run folder"),
        (train_t5.main, ["--model", "t5-tiny"], "prepare_data.py"),
    ],
)
def test_a_missing_input_names_the_command_that_makes_it(tmp_path, main, words, message):
    with pytest.raises(UserError, match=message):
        main(["--workdir", str(tmp_path), *words])


def test_a_generator_without_critics_or_exemplars_says_what_makes_them(workdir):
    with pytest.raises(UserError, match="train_empathy_classifier.py --dim emo"):
        train_glove_t5.main([*short(workdir), "--size", "tiny"])
    with pytest.raises(UserError, match="dpr_exemplar_retriever.py"):
        train_glove_t5.main([*short(workdir), "--size", "tiny", *NO_CRITICS])


def test_a_critic_of_the_other_family_is_refused_as_a_loss(trained_copy):
    with pytest.raises(UserError, match="another tokenizer"):
        train_glove_t5.main(
            [*short(trained_copy), "--size", "tiny", "--emo", str(Paths(trained_copy).critic("emo", "t5"))]
        )


def test_changed_critics_are_refused_on_resume(trained_copy):
    train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict"])
    train_empathy_classifier.main(
        on(trained_copy, "--model glove-t5 --size tiny --dim emo --max-steps 3 --batch-size 8 --overwrite")
    )
    with pytest.raises(UserError, match="critic emo: its content has changed"):
        train_glove_t5.main([*short(trained_copy), "--size", "tiny", "--no-predict"])


def test_changed_words_are_refused_on_resume(trained_copy):
    words = [*short(trained_copy), "--size", "tiny", "--no-predict", *NO_CRITICS, "--add-exemplars", "none"]
    train_glove_t5.main(words)
    swap_words(trained_copy / "data" / "glove", "i", "you")
    with pytest.raises(UserError, match="tokenizer: its content has changed"):
        train_glove_t5.main(words)


def test_precision_is_the_flags_whatever_the_launcher_says():
    code = "from session import Session; print(Session('cpu', 'fp32', 1).accelerator.mixed_precision)"
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
        ).stdout.strip()
        == "no"
    )


def test_a_dpr_folder_without_weights_is_an_error(trained_copy):
    with pytest.raises(UserError, match="train_dpr"):
        dpr_exemplar_retriever.main(
            ["--workdir", str(trained_copy), "--path", str(trained_copy / "data"), "--overwrite"]
        )


@pytest.mark.parametrize(
    ("place", "main", "words"),
    [
        ("empathy/glove-t5-emo", label_dialogues.main, []),
        ("empathy/glove-t5-emo", train_glove_t5.main, ["--size", "tiny"]),
        ("dpr/empd", dpr_exemplar_retriever.main, ["--path", "saved/dpr/empd", "--overwrite"]),
    ],
)
def test_a_run_that_is_not_finished_is_not_built_upon(trained_copy, monkeypatch, place, main, words):
    (trained_copy / "saved" / place / "result.json").unlink()
    words = [str(trained_copy / w) if w.startswith("saved") else w for w in words]
    if main is label_dialogues.main:
        words = ["--family", "glove-t5", "--overwrite"]
    with pytest.raises(UserError, match=f"{place}: this run is not finished"):
        main(["--workdir", str(trained_copy), "--device", "cpu", *words])


def test_predictions_are_not_overwritten_silently(trained_copy):
    train_glove_t5.main([*short(trained_copy), "--size", "tiny"])
    with pytest.raises(UserError, match="--overwrite"):
        train_glove_t5.main(
            [*short(trained_copy), "--inference", str(trained_copy / "saved" / "glove-t5" / "lempex")]
        )


# ------------------------------------------------------------------------------------- commands as documented

#: they use what the stages have made, and are no stages
USE = (respond, score, retrieve, probe_critics, control, app)
PARSERS = {
    **{
        m.__name__ + ".py": m.parse_args
        for m in (
            train_t5,
            train_glove_t5,
            train_causal_lm,
            train_empathy_classifier,
            train_sentiment_regressor,
            label_dialogues,
            dpr_exemplar_retriever,
            evaluate_responses,
            reproduce,
            *USE,
        )
    },
    "DPR.prepare_dpr_data": prepare_dpr_data.parse_args,
    "DPR.train_dpr": train_dpr.parse_args,
    "DPR.evaluate_retriever": evaluate_retriever.parse_args,
}


DOCUMENTED = PARSERS | {"prepare_data.py": prepare_data.parse_args}
for _file in sorted((ROOT / "benchmarks").glob("*.py")):
    if "def parse_args" in _file.read_text(encoding="utf-8"):
        DOCUMENTED[f"benchmarks/{_file.name}"] = importlib.import_module(
            f"benchmarks.{_file.stem}"
        ).parse_args


def on_one_line(match: re.Match) -> str:
    return re.sub(r"\s*\n\s*", " ", match.group())


def documented() -> list[str]:
    """Every command line on the pages and in the scripts' docstrings, and all that the recipes run."""
    texts = [
        p.read_text(encoding="utf-8")
        for p in (ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md"))
    ]
    texts += [sys.modules[f.__module__].__doc__ for f in DOCUMENTED.values()]
    starts = (
        r"(?:python|torchrun \S+ \S+) (?:-m )?((?:"
        + "|".join(re.escape(n) for n in DOCUMENTED)
        + r")(?: [^\n`#·]*)?)"
    )
    found = [
        re.split(r"\s{3,}| \.\.\.| -->|: ", line)[0].strip()
        for text in texts
        for line in re.findall(starts, re.sub(r"(?<!`)`[^`]+`(?!`)", on_one_line, text))
    ]
    for recipe in recipes.RECIPES.values():
        found += [line.removeprefix("-m ") for line in recipes.lines_of(recipe("download"))]
    return sorted(set(found))


def test_every_documented_command_parses(tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    for place in ("demo", "corpora", "RUN", "RUNS", "FOLDER", "SOURCE"):  # these stand for one's own
        (tmp_path / place).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    commands = documented()
    assert len(commands) > 40
    refused = []
    for line in commands:
        name, *words = shlex.split(line)
        words = [str(tmp_path / w[2:]) if w.startswith("~/") else w for w in words]
        words = ["causal" if w == "NAME" else w for w in words]
        if "--workdir" in words:
            (tmp_path / words[words.index("--workdir") + 1]).mkdir(parents=True, exist_ok=True)
        for word in words:
            for place in re.sub(r"^\w+=", "", word).split(","):
                if re.match(r"(own[^/]*/)?saved/|demo/", place):
                    (tmp_path / place).mkdir(parents=True, exist_ok=True)
            if word.endswith((".csv", ".tsv", ".jsonl", ".txt")) and not word.startswith(("saved", "/")):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
        try:
            DOCUMENTED[name](words)
        except SystemExit:
            refused.append(line)
    assert not refused


def test_help_answers_within_a_second_and_where_no_package_is_installed():
    for name in PARSERS:
        script = ["-m", name] if name.startswith("DPR") else [str(ROOT / name)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(
            [sys.executable, "-S", *script, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = (
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        )  # of the processor: other work on the machine does not count
        assert spent < 1.0, name
        assert "default:" in shown


def test_a_recipe_stops_with_the_failing_command_and_goes_on_from_there(tmp_path, monkeypatch, capsys):
    two = {"one": recipes.Group(["-m platform"]), "two": recipes.Group(["label_dialogues.py"], ("one",))}
    monkeypatch.setitem(recipes.RECIPES, "sample", lambda source: two)
    monkeypatch.setattr(
        recipes,
        "settle",
        lambda line, workdir: line.split() + (["--workdir", workdir] if "label" in line else []),
    )
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"failed \(exit code 2\)(?s:.*)train_empathy_classifier(?s:.*)02-label_dialogues.log",
        ):
            reproduce.main(["--recipe", "sample", "--workdir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("[1/2] python -m platform") == 2 and shown.count("finished before") == 1


def test_the_sample_recipe_runs_every_script():
    lines = " ".join(recipes.lines_of(recipes.sample_recipe("download")))
    # a language model takes its base out of a package, and minutes an update on few cores
    others = {
        "reproduce.py",
        "train_causal_lm.py",
        "DPR.evaluate_retriever",
        *(f"{m.__name__}.py" for m in USE),
    }
    assert all(name in lines for name in itertools.filterfalse(others.__contains__, PARSERS))


def test_what_a_run_holds_for_a_table_is_looked_at(home, tmp_path, capsys):
    """Replies to other dialogues, half of a file, a damaged config: each is named, with what helps."""
    shutil.copytree(home, tmp_path / "home")
    paths = Paths(tmp_path / "home")
    folder = paths.saved / "glove-t5" / "exemplars"
    train_glove_t5.main([*short(paths.root), "--inference", str(folder)])
    examples = listener_turns(paths.dialogues("test"))
    assert read_run(folder, examples, "test", paths) and "warning" not in capsys.readouterr().out
    again = f"--workdir {paths.root} --inference {folder} --overwrite"
    dialogues = paths.dialogues("test")
    dialogues.write_text(dialogues.read_text(encoding="utf-8").replace(" my ", " your "), encoding="utf-8")
    read_run(folder, examples, "test", paths)
    said = capsys.readouterr().out
    assert "predictions.tsv: what it was made from has changed since: dialogues" in said and again in said

    predictions = folder / "predictions.tsv"
    lines = predictions.read_bytes().splitlines(keepends=True)
    predictions.write_bytes(b"".join(lines[:5]) + lines[5][:4])  # cut off within a row
    with pytest.raises(UserError, match=f"line 6: .*; a run's own file is damaged.*{re.escape(again)}"):
        read_run(folder, examples, "test", paths)
    predictions.write_bytes(b"".join(lines[:6]))  # cut off between two
    system = read_run(folder, examples, "test", paths)
    with pytest.raises(UserError, match=f"its file is damaged: write it again with: .*{re.escape(again)}"):
        require_complete(system, range(len(examples)), examples)

    config = folder / "config.json"
    config.write_bytes(config.read_bytes()[:30])
    with pytest.raises(UserError, match="config.json: not a readable JSON file"):
        read_run(folder, examples, "test", paths)


def test_several_replies_to_a_context_stand_side_by_side_and_are_read_as_its_samples(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    folder = tmp_path / "home" / "saved" / "glove-t5" / "exemplars"
    again = [*short(tmp_path / "home"), "--inference", str(folder), "--overwrite"]
    train_glove_t5.main([*again, "--replies", "3", "--predict-batch-size", "5"])
    table = pd.read_csv(folder / "predictions.tsv", sep="\t", keep_default_na=False)
    examples = listener_turns(Paths(home).dialogues("test"))
    keys = [(e.conv_id, e.utterance_idx, n) for e in examples for n in range(3)]
    assert list(zip(table["conv_id"], table["utterance_idx"], table["sample"], strict=True)) == keys
    replies = table["response"].to_numpy().reshape(-1, 3)
    assert sum(len(set(row)) > 1 for row in replies) > len(replies) / 2
    system = read_run(folder, examples, "test", Paths(home))
    assert system.samples == replies.tolist() and system.replies == replies[:, 0].tolist()
    for other in (["--beams", "2"], ["--no-predict"]):
        with pytest.raises(SystemExit):
            train_glove_t5.main([*again, "--replies", "2", *other])
    written = []
    for seed in ("1", "1", "2"):
        train_glove_t5.main([*again, "--seed", seed])
        written.append((folder / "predictions.tsv").read_text())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("script", "words", "name"),
    [
        (train_t5, "", "lempex"),
        (train_t5, "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0", "plain"),
        (train_t5, "--empathy-loss-w 0 --sentiment-loss-w 0 --sampled-loss-w 1", "exemplars-energy"),
        (train_glove_t5, "--add-exemplars glove-t5", "pool-glove-critics"),
        (train_causal_lm, "--sampled-loss-w 1 --sampled-reward distance", "plain-distance"),
        (train_causal_lm, "--sampled-loss-w 1 --name mine", "mine"),
    ],
)
def test_a_run_is_called_what_it_learns_from(script, words, name):
    """No two ablations share a name, least of all the paper's plain T5."""
    command = settings.causal_command if script is train_causal_lm else settings.generator_command
    family = [] if script is train_causal_lm else ["t5"]
    assert command(script.parse_args(words.split()), *family).name == name


def test_labels_that_a_killed_call_began_are_not_finished_for_a_critic_that_was_trained_again(
    trained_copy, tmp_path, monkeypatch
):
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--family", "glove-t5", "--splits", "valid"]

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "write_csv", killed)
        label_dialogues.main([*words, "--output", str(tmp_path / "first")])
    file = Paths(trained_copy).critic("emo", "glove-t5") / "model.safetensors"
    save_file({k: -w if "head" in k else w for k, w in load_file(file).items()}, file)
    labels = []
    for name in ("second", "third"):  # what was kept goes with the second
        label_dialogues.main([*words, "--output", str(tmp_path / name)])
        labels.append(pd.read_csv(tmp_path / name / "valid_labels.csv")["emo"].tolist())
    assert labels[0] == labels[1]
