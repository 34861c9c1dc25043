"""benchmarks/low_rank.py: a trained model's difference from its base, cut to an adapter."""

import pytest
import torch
from test_causal_models import make_tokenizer, save_llama

from benchmarks import low_rank
from causal_models import CausalGenerator
from chats import chat_ids
from options import UserError


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
    found = low_rank.main([*flags, "--ranks", "1", "8", "32"])
    kept = [found[f"rank {rank}"]["kept"] for rank in (1, 8, 32)]
    assert 0 < kept[0] < kept[1] < kept[2] and kept[2] == pytest.approx(100, abs=0.01)
    perplexities = {name: row["ppl_word"] for name, row in found.items()}
    assert perplexities["rank 32"] == pytest.approx(perplexities["all weights"], rel=1e-4)
    assert perplexities["the base"] != pytest.approx(perplexities["all weights"], rel=1e-3)
    with pytest.raises(UserError, match="--overwrite"):
        low_rank.main([*flags, "--ranks", "1"])

    low_rank.main([*flags, "--ranks", "32", "--output", str(cut), "--overwrite"])
    loaded = CausalGenerator.from_pretrained(cut, cache=tmp_path)
    assert loaded.settings.rank == 32
    ids = torch.tensor(chat_ids(tuned.tokenizer, ["my dog ran away"]))[None]
    with torch.no_grad():
        ours, theirs = loaded.lm(input_ids=ids).logits, tuned.lm(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()  # it is kept in half precision


def test_an_adapter_has_nothing_to_cut(tuned, workdir, tmp_path, capsys):
    folder = workdir / "saved" / "causal-lm" / "lora"
    CausalGenerator.start(str(tmp_path / "llama"), rank=2, cache=tmp_path).save_pretrained(folder)
    with pytest.raises(UserError, match="an adapter already"):
        low_rank.main([str(folder), "--workdir", str(workdir)])
    with pytest.raises(SystemExit):
        low_rank.parse_args(["run", "--output", "there"])
    assert "--output: give one of --ranks" in capsys.readouterr().err
