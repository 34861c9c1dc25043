"""benchmarks/low_rank.py: a trained model's difference from its base, cut to an adapter."""

import pytest
import torch
from helpers import chat_ids
from test_causal_models import make_tokenizer, save_llama
from transformers import AutoModelForCausalLM

import train_causal_lm
from benchmarks import low_rank
from causal_generators import load
from causal_models import CausalGenerator
from options import Paths, UserError
from responder import Responder
from session import Session


@pytest.fixture
def tuned(workdir, tmp_path) -> CausalGenerator:
    """Saved as a run in saved/causal-lm/all: its linear layers moved, and nothing else."""
    model = CausalGenerator.start(save_llama(tmp_path / "llama", make_tokenizer()), rank=0, cache=tmp_path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(workdir / "saved" / "causal-lm" / "all", half=False)
    return model.eval()


def test_a_higher_rank_keeps_more_and_the_full_one_is_the_trained_model(tuned, workdir, tmp_path):
    run, cut = workdir / "saved" / "causal-lm" / "all", workdir / "saved" / "causal-lm" / "cut"
    flags = [str(run), "--workdir", str(workdir), "--conversations", "3"]
    with pytest.raises(UserError, match="not a run folder"):
        low_rank.main([*flags, "--ranks", "1", "--output", str(cut)])
    found = low_rank.main([*flags, "--ranks", "1", "8", "32"])
    kept = [found[f"rank {rank}"]["kept"] for rank in (1, 8, 32)]
    assert 0 < kept[0] < kept[1] < kept[2] and kept[2] == pytest.approx(100, abs=0.01)
    perplexities = {name: row["ppl_word"] for name, row in found.items()}
    assert perplexities["rank 32"] == pytest.approx(perplexities["all weights"], rel=1e-4)
    assert perplexities["the base"] != pytest.approx(perplexities["all weights"], rel=1e-3)
    with pytest.raises(UserError, match="--overwrite"):
        low_rank.main([*flags, "--ranks", "32", "8", "1"])
    assert {found[f"rank {rank}"]["outside"] for rank in (1, 8, 32)} == {0}


def test_the_cut_run_serves_as_any_other(workdir, tmp_path, capsys):
    """At full rank its logits are those of the run that it was cut from, but for what no adapter holds."""
    base = save_llama(tmp_path / "llama", make_tokenizer())
    short = "--device cpu --lora-rank 0 --max-steps 2 --batch-size 4 --valid-conversations 3"
    flags = ["--workdir", str(workdir), "--model", base, *short.split()]
    train_causal_lm.main([*flags, "--no-predict", "--name", "all"])
    run, cut = workdir / "saved" / "causal-lm" / "all", workdir / "saved" / "causal-lm" / "cut"
    words = [str(run), "--workdir", str(workdir), "--conversations", "3", "--ranks", "32"]
    found = low_rank.main([*words, "--output", str(cut)])
    assert found["rank 32"]["kept"] == pytest.approx(100, abs=0.01) and 0 < found["rank 32"]["outside"] < 100
    assert "outside: in embeddings" in capsys.readouterr().out
    (workdir / "results" / "benchmarks" / "low_rank_32.json").unlink()
    with pytest.raises(UserError, match="another --output"):
        low_rank.main([*words, "--output", str(cut)])
    train_causal_lm.main([*flags, "--inference", str(cut), "--no-predict"])
    assert (cut / "likelihood.csv").exists() and "all weights" in (cut / "README.md").read_text()
    Responder.from_pretrained(cut, session=Session("cpu"), workdir=workdir)  # finds its base
    ours, theirs = (load(place, Paths(workdir), Session("cpu")) for place in (cut, run))
    known = AutoModelForCausalLM.from_pretrained(base).state_dict()
    theirs.lm.load_state_dict({k: w for k, w in known.items() if "_proj" not in k}, strict=False)
    ids = torch.tensor(chat_ids(ours.tokenizer, ["my dog ran away"]))[None]
    with torch.no_grad():
        one, other = ours.lm(input_ids=ids).logits, theirs.lm(input_ids=ids).logits
    assert (one - other).abs().max() < 1e-2 * other.abs().max()  # both are kept in half precision


def test_an_adapter_has_nothing_to_cut(tuned, workdir, tmp_path, capsys):
    folder = workdir / "saved" / "causal-lm" / "lora"
    CausalGenerator.start(str(tmp_path / "llama"), rank=2, cache=tmp_path).save_pretrained(folder)
    with pytest.raises(UserError, match="an adapter already"):
        low_rank.main([str(folder), "--workdir", str(workdir)])
    with pytest.raises(SystemExit):
        low_rank.parse_args(["run", "--output", "there"])
    assert "--output: give one of --ranks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        low_rank.parse_args(["run", "--output", "run", "--ranks", "4", "--overwrite"])
    assert "RUN itself" in capsys.readouterr().err
