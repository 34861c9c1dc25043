"""--init-from: a new run begins with the weights of a finished one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_causal_models import make_tokenizer, save_llama
from torch import nn

import generators
import train_causal_lm
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from causal_models import load_base
from options import UserError
from pretrained import begin_from
from storage import weights_hash

#: one update that moves nothing that can be seen
STILL = "--device cpu --max-steps 1 --batch-size 8 --lr 1e-9".split()
PLAIN = "--size tiny --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --no-predict".split()


def test_a_generator_goes_on_from_another_ones_weights(trained_copy):
    common = ["--workdir", str(trained_copy), *PLAIN, "--device", "cpu", "--batch-size", "8"]
    first = train_glove_t5.main([*common, "--max-steps", "4", "--lr", "1e-2"])
    run = str(trained_copy / "saved" / "glove-t5" / "plain")
    still = ["--workdir", str(trained_copy), *STILL, "--size", "tiny", "--no-predict"]
    plain = [*PLAIN[2:6], *PLAIN[6:8]]
    again = train_glove_t5.main([*still, *plain, "--name", "again", "--init-from", run])
    anew = train_glove_t5.main([*still, *plain, "--name", "anew"])
    assert again["valid"]["nll"] == pytest.approx(first["valid"]["nll"], abs=1e-4)
    assert anew["valid"]["nll"] > first["valid"]["nll"] + 0.1
    # another way of exemplars adds layers, which begin as new ones do
    pooled = ["--add-exemplars", "glove-t5", "--exemplar-layers", "1", *PLAIN[4:8], "--name", "pooled"]
    found = train_glove_t5.main([*still, *pooled, "--init-from", run])
    assert abs(found["valid"]["nll"] - first["valid"]["nll"]) < abs(
        found["valid"]["nll"] - anew["valid"]["nll"]
    )
    folder = trained_copy / "saved" / "glove-t5" / "again"
    assert json.loads((folder / "sources.json").read_text())["init"]["path"] == "saved/glove-t5/plain"


def test_a_t5_goes_on_from_another_ones_weights(trained_copy):
    common = ["--workdir", str(trained_copy), "--model", "t5-tiny", *PLAIN[2:], "--device", "cpu"]
    first = train_t5.main([*common, "--batch-size", "8", "--max-steps", "4", "--lr", "1e-2"])
    run = str(trained_copy / "saved" / "t5" / "plain")
    again = train_t5.main([*common, *STILL[2:], "--name", "again", "--init-from", run])
    assert again["valid"]["nll"] == pytest.approx(first["valid"]["nll"], abs=1e-4)
    with pytest.raises(UserError, match="--compile: False then, True now"):  # other draws of dropout
        train_t5.main([*common, "--batch-size", "8", "--max-steps", "4", "--lr", "1e-2", "--compile"])
    with pytest.raises(UserError, match="--init-from: not given then"):
        other = str(trained_copy / "saved" / "t5" / "again")
        train_t5.main(
            [*common, "--batch-size", "8", "--max-steps", "4", "--lr", "1e-2", "--init-from", other]
        )


def test_a_run_does_not_take_the_place_of_the_one_it_begins_from(trained_copy):
    common = ["--workdir", str(trained_copy), *PLAIN, *STILL]
    train_glove_t5.main([*common, "--name", "a"])
    run = trained_copy / "saved" / "glove-t5" / "a"
    before = (run / "model.safetensors").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"made from itself \(init\).* another --name"):
            train_glove_t5.main([*common, "--name", "a", "--init-from", str(run), *more])
    assert (run / "model.safetensors").read_bytes() == before and (run / "result.json").exists()


def test_pairs_that_were_learnt_before_are_no_test_of_what_goes_on(trained_copy, capsys):
    common = ["--workdir", str(trained_copy), "--size", "tiny", "--model", "glove-t5", *STILL]
    first = str(trained_copy / "saved" / "empathy" / "glove-t5-emo")
    teacher = ["--teacher", first, "--turns", "3"]
    for flags in (["--init-from", first], teacher):
        for more, warned in (([], False), (["--split-by", "seeker"], True)):
            train_empathy_classifier.main([*common, "--dim", "emo", "--name", "b", *flags, *more])
            told = capsys.readouterr().out
            said = f"{flags[0]} {first}: trained with --split-by files, it may have learnt from pairs"
            assert (said in told) == warned and "--part" not in told
            shutil.rmtree(trained_copy / "saved" / "empathy" / "b")
    train_empathy_classifier.main([*common, "--dim", "emo", "--name", "b", "--part", "a", *teacher])
    assert f"--teacher {first}: trained with --part all, so what --part a" in capsys.readouterr().out


def test_another_start_is_another_run(trained_copy):
    common = ["--workdir", str(trained_copy), *PLAIN, *STILL]
    train_glove_t5.main([*common, "--name", "a"])
    train_glove_t5.main([*common, "--name", "b", "--lr", "1e-2", "--seed", "5"])
    saved = trained_copy / "saved" / "glove-t5"
    train_glove_t5.main([*common, "--name", "c", "--init-from", str(saved / "a")])
    with pytest.raises(UserError, match="init"):
        train_glove_t5.main([*common, "--name", "c", "--init-from", str(saved / "b")])
    with pytest.raises(UserError, match="--init-from: not given now"):
        train_glove_t5.main([*common, "--name", "c"])
    with pytest.raises(UserError, match="--init-from: not given then"):
        train_glove_t5.main([*common, "--name", "a", "--init-from", str(saved / "b")])


def test_a_critic_begins_from_another_dimension_with_a_new_head(trained_copy):
    short = ["--workdir", str(trained_copy), *STILL, "--model", "glove-t5", "--size", "tiny"]
    emo = str(trained_copy / "saved" / "empathy" / "glove-t5-emo")
    same = train_empathy_classifier.main([*short, "--dim", "emo", "--name", "same", "--init-from", emo])
    stored = json.loads((trained_copy / "saved" / "empathy" / "glove-t5-emo" / "result.json").read_text())
    assert same["valid"]["macro_f1"] == pytest.approx(stored["valid"]["macro_f1"], abs=1e-6)
    train_empathy_classifier.main([*short, "--dim", "exp", "--name", "other", "--init-from", emo])
    places = (trained_copy / "saved" / "empathy" / name for name in ("glove-t5-emo", "other"))
    old, new = (load_file(place / "model.safetensors") for place in places)
    like = {name for name in old if torch.allclose(old[name], new[name], atol=1e-6)}
    assert old.keys() - like == {"head.weight", "head.bias"}
    folder = trained_copy / "saved" / "empathy" / "other"
    assert json.loads((folder / "sources.json").read_text())["init"]["path"] == "saved/empathy/glove-t5-emo"
    exp = str(trained_copy / "saved" / "empathy" / "glove-t5-exp")
    with pytest.raises(UserError, match="init: its content has changed"):
        train_empathy_classifier.main([*short, "--dim", "exp", "--name", "other", "--init-from", exp])
    train_sentiment_regressor.main([*short, "--name", "mood", "--init-from", emo])
    mood = load_file(trained_copy / "saved" / "sentiment" / "mood" / "model.safetensors")
    assert all(torch.allclose(old[name], mood[name], atol=1e-6) for name in like)
    with pytest.raises(UserError, match="--init-from.*args.json"):
        wider = ["--layers", "2", "--name", "wider", "--init-from", emo]
        train_empathy_classifier.main([*short, "--dim", "emo", *wider])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "no such folder"),
        ("saved", "no trained generator"),
        ("saved/empathy/glove-t5-emo", "Critic"),
    ],
)
def test_what_is_no_generator_is_told_before_anything_is_sought_in_it(trained_copy, monkeypatch, place, said):
    """Least of all on the hub, which a mistyped folder's name would be taken for."""
    folder, load = trained_copy / place, generators.load_tokenizer
    monkeypatch.setattr(
        generators, "load_tokenizer", lambda f: pytest.fail(f"{f}") if f == folder else load(f)
    )
    with pytest.raises(UserError, match=f"--init-from {folder}: .*{said}"):
        train_glove_t5.main(["--workdir", str(trained_copy), *PLAIN, *STILL, "--init-from", str(folder)])


def test_a_causal_adapter_goes_on_and_another_base_is_refused(trained_copy, tmp_path):
    tokenizer = make_tokenizer()
    base, other = save_llama(tmp_path / "llama", tokenizer), save_llama(tmp_path / "other", tokenizer, seed=1)
    short = "--device cpu --batch-size 8 --lora-rank 2 --no-predict --valid-conversations 3".split()
    common = ["--workdir", str(trained_copy), *short]
    first = train_causal_lm.main([*common, "--model", base, "--max-steps", "3", "--lr", "1e-2"])
    run = ["--init-from", str(trained_copy / "saved" / "causal-lm" / "plain")]
    still = [*common, *STILL[2:], "--name", "again"]
    again = train_causal_lm.main([*still, "--model", base, *run])
    # an adapter is kept in half precision
    assert again["valid"]["nll"] == pytest.approx(first["valid"]["nll"], abs=2e-3)
    with pytest.raises(UserError, match="--init-from.*--lora-alpha 4$"):
        train_causal_lm.main([*still, "--model", base, *run, "--name", "b", "--lora-alpha", "8"])
    with pytest.raises(UserError, match="--init-from.*--model"):
        train_causal_lm.main([*common, "--model", other, "--max-steps", "1", "--name", "c", *run])


def test_an_adapter_goes_on_from_another_precision_of_its_base_where_that_is_said(trained_copy, tmp_path):
    base = save_llama(tmp_path / "llama", make_tokenizer())
    short = "--device cpu --batch-size 8 --lora-rank 2 --no-predict --valid-conversations 3 --max-steps 1"
    common = ["--workdir", str(trained_copy), *short.split()]
    train_causal_lm.main([*common, "--model", base])
    rounded, tokenizer = load_base(base, tmp_path)
    rounded.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    first = str(trained_copy / "saved" / "causal-lm" / "plain")
    more = ["--init-from", first, "--name", "on", "--base-in-other-precision", str(tmp_path / "rounded")]
    train_causal_lm.main([*common, *more])
    config = json.loads((trained_copy / "saved" / "causal-lm" / "on" / "config.json").read_text())
    assert config["base"] == "rounded"
    assert config["base_sha256"] == weights_hash(load_base(str(tmp_path / "rounded"), tmp_path)[0])


def test_what_may_be_new_is_taken_over_where_it_fits(tmp_path):
    def model(width: int) -> nn.ModuleDict:
        return nn.ModuleDict({"body": nn.Linear(2, 2), "fusion": nn.Linear(width, 2)})

    own, trained, other = model(3), model(3), model(4)
    begin_from(own, trained, tmp_path, fresh=("fusion.",))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), trained.parameters(), strict=True))
    before = own["fusion"].weight.clone()
    begin_from(own, other, tmp_path, fresh=("fusion.",))
    assert torch.equal(own["body"].weight, other["body"].weight)
    assert torch.equal(own["fusion"].weight, before)
