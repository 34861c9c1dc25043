"""train_causal_lm.py on a tiny Llama: what it leaves behind, and that it goes on bit for bit."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Killed, swap_words
from helpers import chat_ids
from safetensors.torch import load_file
from test_causal_models import make_tokenizer, save_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import causal_generators
import evaluate_responses
import runs
import storage
import train_causal_lm
import updates
from causal_generators import load, read_split, require_positions
from causal_models import CausalGenerator, load_base
from corpora import listener_turns, read_exemplars
from dataloaders import Data
from exemplars import matched_by
from options import Paths, UserError
from responder import Responder
from session import Session
from storage import weights_hash
from systems import read_file, read_run


@pytest.fixture
def flags(trained_copy, tmp_path) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token  # one token for both, as in GPT-2
    base = save_llama(tmp_path / "llama", tokenizer)
    short = "--device cpu --max-steps 4 --batch-size 4 --batch-tokens 0 --save-every 1 --log-every 1"
    decoding = "--max-new-tokens 5 --predict-batch-size 8 --valid-conversations 3 --lora-rank 2 --epochs 9"
    return ["--workdir", str(trained_copy), "--model", base, *short.split(), *decoding.split()]


def test_a_control_without_exemplars_learns_the_same_turns_in_the_same_order(flags, monkeypatch):
    """Packed, an example is a dialogue; `--no-pack` makes it a turn, as it is with exemplars before it."""
    learnt: list[list[tuple[str, int]]] = []
    made = causal_generators.causal_data

    def watched(examples, tokenizer, **layout):
        data = made(examples, tokenizer, **layout)
        if layout["tgt_len"] is None:  # not the training's
            return data

        def collate(numbers):
            batch = data.collate(numbers)
            learnt[-1].extend(examples[n].key for n in batch["examples"])
            return batch

        return replace(data, collate=collate)

    monkeypatch.setattr(causal_generators, "causal_data", watched)
    for more in ("--add-exemplars prepend", "--add-exemplars none --no-pack", "--add-exemplars none"):
        learnt.append([])
        train_causal_lm.main([*flags, *more.split(), "--no-predict", "--name", f"run-{len(learnt)}"])
    with_exemplars, control, packed = learnt
    assert len(control) >= 16 and control == with_exemplars  # four updates of four turns
    assert len(packed) > len(control)


@pytest.mark.parametrize("exemplars", ["none", "prepend"])
def test_a_run_is_complete_and_stands_on_the_table(trained_copy, flags, exemplars):
    train_causal_lm.main([*flags, "--add-exemplars", exemplars])
    folder = trained_copy / "saved" / "causal-lm" / ("plain" if exemplars == "none" else "exemplars")
    examples = listener_turns(Paths(trained_copy).dialogues("test"))
    assert read_run(folder, examples, "test", Paths(trained_copy)).numbers == list(range(len(examples)))
    likelihood = pd.read_csv(folder / "likelihood.csv")
    assert likelihood["utterance_idx"].tolist() == [e.utterance_idx for e in examples]
    assert (likelihood["tokens"] > 1).all() and (likelihood["nll"] > 0).all()
    assert (likelihood["unknown"] == 0).all() and (likelihood["nll_class"] == 0).all()
    if exemplars == "none":
        model = load(folder, Paths(trained_copy), Session("cpu"))
        for example, row in list(zip(examples, likelihood.itertuples(), strict=True))[:4]:
            reply = model.tokenizer(example.response, add_special_tokens=False)["input_ids"]
            before = chat_ids(model.tokenizer, example.history, src_len=model.settings.src_len)
            ids = [*before.tolist(), *reply]
            with torch.no_grad():
                last = model.lm(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert row.nll_end == pytest.approx(-float(last[model.chat.end_id]), rel=1e-3)
    evaluate_responses.main(["--workdir", str(trained_copy), str(folder), "--family", "glove-t5"])
    systems = json.loads((trained_copy / "results" / "evaluation" / "metrics.json").read_text())["systems"]
    sums, row = likelihood.sum(numeric_only=True), systems[f"causal-lm/{folder.name}"]
    assert row["ppl_word"] == pytest.approx(math.exp(sums.nll / sums.words), rel=1e-6)
    said = (sums.nll - sums.nll_end) / (sums.words - len(examples))
    assert row["ppl_word_open"] == pytest.approx(math.exp(said), rel=1e-6)
    assert row["ppl_word_class"] == row["ppl_word"]
    items = pd.read_csv(trained_copy / "results" / "evaluation" / "items.csv")
    own = items[items["system"] == f"causal-lm/{folder.name}"].reset_index()
    each = np.exp(likelihood["nll"] / likelihood["words"])
    assert own["ppl_word"].tolist() == pytest.approx(each.tolist(), rel=1e-5)


def test_the_likelihood_alone_is_that_of_a_run_with_replies(trained_copy, flags):
    """--no-predict reads packed conversations, and each turn's figures are those of turn by turn."""
    train_causal_lm.main([*flags, "--lora-dropout", "0.1"])
    folder = trained_copy / "saved" / "causal-lm" / "plain"
    alone = trained_copy / "alone"
    train_causal_lm.main([*flags, "--inference", str(folder), "--no-predict", "--output", str(alone)])
    assert {f.name for f in alone.iterdir()} == {"likelihood.csv", "likelihood.csv.origin.json"}
    found, whole = (pd.read_csv(place / "likelihood.csv") for place in (alone, folder))
    pd.testing.assert_frame_equal(found, whole, rtol=1e-4, atol=2e-5)


def test_some_conversations_of_a_split_are_its_first_with_as_many_exemplars_as_are_read(trained):
    paths, settings = Paths(trained), SimpleNamespace(exemplars="prepend", top_exemplars=2)
    examples, found = read_split(SimpleNamespace(settings=settings), "valid", paths, 2)
    whole, every = read_split(SimpleNamespace(settings=settings), "valid", paths)
    assert len({e.conv_id for e in examples}) == 2 and len({e.conv_id for e in whole}) > 2
    assert examples == whole[: len(examples)] and found == every[: len(examples)]
    assert every == read_exemplars(paths.exemplars("valid"), whole, 2) and max(map(len, every)) == 2


def test_a_validation_is_of_whole_replies(trained_copy, flags):
    """--tgt-len cuts replies in training, and nowhere else."""
    words = [*flags, "--tgt-len", "4", "--valid-conversations", "0", "--no-predict"]
    result = train_causal_lm.main(words)
    folder, output = trained_copy / "saved" / "causal-lm" / "plain", trained_copy / "alone"
    train_causal_lm.main(
        [*words, "--inference", str(folder), "--predict-split", "valid", "--output", str(output)]
    )
    table = pd.read_csv(output / "likelihood_valid.csv")
    assert table["tokens"].max() > 4  # else nothing was there to cut
    assert result["nll"] == pytest.approx(table["nll"].sum() / table["tokens"].sum(), rel=2e-3)


def test_the_seed_alone_decides_what_is_written(trained_copy, flags):
    train_causal_lm.main([*flags, "--no-predict"])
    folder, written = trained_copy / "saved" / "causal-lm" / "plain", []
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        output = ["--seed", seed, "--output", str(trained_copy / name)]
        train_causal_lm.main([*flags, "--inference", str(folder), *output])
        written.append((trained_copy / name / "predictions.tsv").read_text())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("exemplars", ["none", "prepend"])
def test_a_base_of_few_positions_is_refused_before_the_training(trained_copy, flags, tmp_path, exemplars):
    """Learnt positions, as GPT-2's: a longer sequence is an IndexError in the middle of the run."""
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    flags = [*flags, "--model", str(tmp_path / "gpt"), "--add-exemplars", exemplars]
    wanted = r"gpt: reads 256 tokens, and the longest sequence of the train split has \d+; lower --src-len"
    with pytest.raises(UserError, match=wanted) as refused:
        train_causal_lm.main(flags)
    assert ("--exemplar-len" in str(refused.value)) == (exemplars == "prepend")
    short = ["--src-len", "12", "--tgt-len", "8", "--exemplar-len", "12"]
    with pytest.raises(UserError, match="test split has [0-9]+ with --max-new-tokens 250; lower --max"):
        train_causal_lm.main([*flags, *short, "--max-new-tokens", "250"])
    assert not list(trained_copy.glob("saved/causal-lm/*/checkpoints"))
    train_causal_lm.main([*flags, *short])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_gold_reply_that_the_base_cannot_read_is_missed_before_the_training(trained_copy, flags, split):
    """--tgt-len cuts it in training, but it is measured whole."""
    file = Paths(trained_copy).dialogues(split)
    table = pd.read_csv(file, keep_default_na=False, dtype=str)
    table.loc[table["utterance_idx"] == "2", "utterance"] = "so " * 2100
    table.to_csv(file, index=False)
    wanted = (
        rf"reads 2,048 tokens, and the longest sequence of the {split} split has \d,\d+; lower --src-len "
    )
    wanted += r"\(gold replies are measured whole\), where --inference keeps the lengths of its run$"
    with pytest.raises(UserError, match=wanted):
        train_causal_lm.main(flags)
    assert not list(trained_copy.glob("saved/causal-lm/*/checkpoints"))


def test_a_sampled_reply_that_the_base_cannot_read_is_missed_before_the_training(flags):
    words = "--sampled-loss-w 1 --tgt-len 2040 --src-len 20 --no-predict".split()
    wanted = r"the train split has 2,\d+ with --tgt-len 2040; lower --tgt-len or --src-len$"
    with pytest.raises(UserError, match=wanted):
        train_causal_lm.main([*flags, *words])


@pytest.mark.parametrize("more", [0, 6])
def test_a_base_reads_as_many_tokens_as_it_has_positions_and_not_one_more(more):
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=20, n_embd=4, n_layer=1, n_head=1))
    model = SimpleNamespace(lm=lm, settings=SimpleNamespace(base="gpt", exemplars="none"))
    flag = "--max-new-tokens" if more else ""
    require_positions(model, Data([3, 20 - more], None), "train", flag, more)
    with pytest.raises(UserError, match="gpt: reads 20 tokens, and .* of the train split has 21"):
        require_positions(model, Data([3, 21 - more], None), "train", flag, more)


def other_exemplars(home):
    """A folder with one and the same exemplar for every turn of `home`."""
    other = home / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        table = pd.read_csv(Paths(home).exemplars(split), keep_default_na=False, dtype=str)
        table = table.assign(exemplars=json.dumps(["My dog ran away last night."]))
        table.to_csv(other / f"{split}_dpr.csv", index=False)
    return other


def test_a_run_knows_its_exemplars_and_is_measured_with_the_weights_that_it_kept(trained_copy, flags):
    """--inference writes again what the training wrote, wherever its exemplars lay."""
    other = other_exemplars(trained_copy)
    storage.write_json(storage.origin_file(other / "train_dpr.csv"), {"match": "context"})
    train_causal_lm.main([*flags, "--add-exemplars", "prepend", "--exemplars", str(other)])
    folder, again = trained_copy / "saved" / "causal-lm" / "exemplars", trained_copy / "again"
    train_causal_lm.main([*flags, "--inference", str(folder), "--output", str(again)])
    for name in ("predictions.tsv", "likelihood.csv"):
        assert (again / name).read_text() == (folder / name).read_text()
    found = runs.sources(folder, Paths(trained_copy))
    assert found["exemplars train"].path.samefile(other / "train_dpr.csv")
    assert found["pool"].path.samefile(Paths(trained_copy).dialogues("train"))
    (folder / "sources.json").unlink()  # as from the hub
    assert matched_by(folder, Paths(trained_copy)) == "context"


def test_all_that_a_run_learns_from_is_compared_when_it_is_called_again(trained_copy, flags):
    words = [*flags, "--add-exemplars", "prepend", "--control", "marks", "--max-steps", "1", "--no-predict"]
    train_causal_lm.main(words)
    train_causal_lm.main([*words, "--top-k", "3", "--max-new-tokens", "7"])  # how it replies is no part of it
    paths = Paths(trained_copy)
    files = {"labels train": paths.labels("train")}
    for split in ("train", "valid"):
        files |= {f"dialogues {split}": paths.dialogues(split), f"exemplars {split}": paths.exemplars(split)}
    for file in files.values():
        file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="was begun with other settings") as refused:
        train_causal_lm.main(words)
    for name in files:
        assert f"{name}: its content has changed" in str(refused.value)


def test_what_a_base_in_another_precision_wrote_is_not_taken_for_the_runs_own(
    trained_copy, flags, tmp_path, capsys
):
    train_causal_lm.main([*flags, "--max-steps", "1"])
    folder, paths = trained_copy / "saved" / "causal-lm" / "plain", Paths(trained_copy)
    rounded, tokenizer = load_base(flags[flags.index("--model") + 1], tmp_path)
    rounded.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    examples = listener_turns(paths.dialogues("test"))
    assert read_run(folder, examples, "test", paths).likelihoods
    again = [*flags, "--inference", str(folder), "--base-in-other-precision", str(tmp_path / "rounded")]
    train_causal_lm.main([*again, "--output", str(tmp_path / "out")])
    noted = json.loads((tmp_path / "out" / "predictions.tsv.origin.json").read_text())
    assert noted["base"] == weights_hash(load_base(str(tmp_path / "rounded"), tmp_path)[0])
    [system] = read_file(tmp_path / "out" / "predictions.tsv", examples, paths)
    assert system.likelihoods
    train_causal_lm.main([*again, "--no-predict", "--overwrite"])
    capsys.readouterr()
    assert not read_run(folder, examples, "test", paths).likelihoods
    assert "likelihood.csv: read with another base than the replies beside it" in capsys.readouterr().out


def test_another_chat_template_or_tokenizer_is_another_training(trained_copy, flags):
    train_causal_lm.main(flags)
    base = Path(flags[flags.index("--model") + 1])
    template = base / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before.replace("<|im_start|>", "<|im_start|>the "))
    with pytest.raises(UserError, match="chat format: its content has changed"):
        train_causal_lm.main(flags)
    template.write_text(before)
    swap_words(base, "a", "b")
    with pytest.raises(UserError, match="tokenizer: its content has changed"):
        train_causal_lm.main(flags)


def test_no_epoch_leaves_the_base_as_it_stands(trained_copy, flags, capsys):
    train_causal_lm.main([*flags, "--epochs", "0", "--name", "zero-shot"])
    folder = trained_copy / "saved" / "causal-lm" / "zero-shot"
    model = load(folder, Paths(trained_copy), Session("cpu"))
    base = AutoModelForCausalLM.from_pretrained(flags[flags.index("--model") + 1])
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(model.lm(ids).logits, base(ids).logits, atol=1e-5)
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 0 and result["test"]["ppl_word"] > 1
    trains, frozen = updates.count_parameters(model)
    assert f"parameters: {trains:,} trained / {trains + frozen:,} total" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--empathy-loss-w", "1"),
        ("--empathy-losses", "emo"),
        ("--sentiment-loss-w", "1"),
        ("--strategy", "2"),
        ("--critic-targets", "soft"),
        ("--critic-ramp", "100"),
        ("--balance", "0.1"),
    ],
)
def test_what_shapes_a_critics_soft_loss_is_refused_with_what_serves_instead(flag, value, capsys):
    with pytest.raises(SystemExit):
        train_causal_lm.parse_args([flag, value])
    said = capsys.readouterr().err
    assert f"{flag}: a critic as a loss reads soft replies of its own vocabulary" in said
    assert "--sampled-loss-w" in said and "respond.py --target" in said


def test_exemplars_really_enter(trained_copy, flags):
    """The same run with other exemplars has other likelihoods of the same replies."""
    words = [*flags, "--add-exemplars", "prepend"]
    train_causal_lm.main([*words, "--no-predict"])
    folder = trained_copy / "saved" / "causal-lm" / "exemplars"
    other = other_exemplars(trained_copy)
    found = []
    for number, extra in enumerate(([], ["--exemplars", str(other)])):
        output = trained_copy / f"out{number}"
        train_causal_lm.main([*flags, "--inference", str(folder), "--output", str(output), *extra])
        found.append(pd.read_csv(output / "likelihood.csv")["nll"])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_killed_in_an_update_it_ends_as_an_uninterrupted_run(trained_copy, flags, monkeypatch):
    words = [*flags, "--no-predict", "--lora-dropout", "0.1"]
    train_causal_lm.main([*words, "--name", "whole"])
    update, made = updates.Update.__call__, []

    def killed(self, numbers):
        made.append(numbers)
        if len(made) == 3:
            raise Killed
        return update(self, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(updates.Update, "__call__", killed)
        with pytest.raises(Killed):
            train_causal_lm.main([*words, "--name", "cut"])
    saved = trained_copy / "saved" / "causal-lm"
    newest = sorted((saved / "cut" / "checkpoints").glob("step-*"))[-1]
    assert all("lora" in name for name in load_file(newest / "model.safetensors"))  # without the frozen base
    train_causal_lm.main([*words, "--name", "cut"])
    left, right = (load_file(saved / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    logs = [(saved / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and '"step": 4' in logs[0]


def test_another_base_under_the_same_name_is_refused_on_resume(trained_copy, flags, tmp_path):
    train_causal_lm.main([*flags, "--no-predict"])
    shutil.rmtree(tmp_path / "llama")
    save_llama(tmp_path / "llama", make_tokenizer(), seed=1)
    with pytest.raises(UserError, match="base: its content has changed"):
        train_causal_lm.main([*flags, "--no-predict"])


def test_a_base_is_named_without_its_place_and_found_again_where_it_was_moved(trained_copy, flags, tmp_path):
    train_causal_lm.main([*flags, "--no-predict"])
    folder, workdir = trained_copy / "saved" / "causal-lm" / "plain", str(trained_copy)
    for name in ("config.json", "adapter_config.json", "README.md"):
        assert str(tmp_path) not in (folder / name).read_text()
    assert json.loads((folder / "config.json").read_text())["base"] == "llama"
    asked = {"turns": ["My dog died."], "n_candidates": 2, "seed": 1}
    first = Responder.from_pretrained(folder, session=Session("cpu"), workdir=workdir).reply(**asked)
    words = [*flags, "--inference", str(folder), "--max-new-tokens", "2"]
    moved = (tmp_path / "llama").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="adapter of llama, which is missing: .* with --base FOLDER"):
        Responder.from_pretrained(folder, session=Session("cpu"), workdir=workdir)
    again = Responder.from_pretrained(folder, session=Session("cpu"), workdir=workdir, base=str(moved))
    assert again.reply(**asked) == first
    train_causal_lm.main([*words, "--base", str(moved)])
    place = flags.index("--model")
    rest = [*flags[:place], *flags[place + 2 :], "--no-predict", "--init-from", str(folder)]
    for flag in ("--base", "--model"):  # either says where it lies
        train_causal_lm.main([*rest, flag, str(moved), "--name", f"on-{flag[2:]}"])
    moved.rename(trained_copy / "data" / "llama")  # inside the workdir its place is named as seen from there
    words[words.index("--model") + 1] = str(trained_copy / "data" / "llama")
    train_causal_lm.main([*words[: words.index("--inference")], "--no-predict", "--name", "inside"])
    inside = folder.with_name("inside")
    assert json.loads((inside / "config.json").read_text())["base"] == "data/llama"
    (inside / "sources.json").unlink()  # as from the hub
    assert load(inside, Paths(trained_copy), Session("cpu")).settings.base == "data/llama"


@pytest.mark.parametrize("moment", ["load", "move"])
def test_a_base_too_large_for_memory_names_the_flag_that_helps(flags, moment, monkeypatch):
    def ends(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if moment == "load":
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ends)
    else:
        monkeypatch.setattr(CausalGenerator, "to", ends)
    with pytest.raises(UserError, match="does not fit into memory; give a smaller --model"):
        train_causal_lm.main(flags)
