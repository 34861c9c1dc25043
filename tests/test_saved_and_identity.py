"""What is saved loads again and is what was trained; what a thing is, is its content and not its path."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import VOCAB, make_batch, t5_config
from transformers import AutoTokenizer, T5ForConditionalGeneration

import generators
from commands import Decoding
from models import Generator, load_config, load_pretrained, token_nll
from options import Paths

EXAMPLES = [([5, 6, 7, 1], [8, 9], []), ([10, 11, 1], [12], [])]


def publish(folder: Path, config, own_head: bool) -> Path:
    """A T5 as the hub has it; `own_head`: T5 v1.1, whose output layer is another matrix than its words."""
    torch.manual_seed(1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    if own_head:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = 0.3 * torch.randn_like(weights["shared.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        stored.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(stored))
    return folder


def around(folder: Path) -> Generator:
    """A new generator, speakers not zero, around a published T5."""
    t5 = load_pretrained(T5ForConditionalGeneration, folder, load_config(folder))
    model = Generator({"backbone": t5.config.to_dict(), "exemplars": "none"}, t5).eval()
    torch.nn.init.normal_(model.speakers.weight)
    return model


# ---------------------------------------------------------------------------------------------- saved, loaded


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_generator_is_loaded_with_the_head_it_was_saved_with(tmp_path, own_head, activation):
    model = around(publish(tmp_path / "base", t5_config(feed_forward_proj=activation), own_head))
    model.save_pretrained(tmp_path / "run")
    again = Generator.from_pretrained(tmp_path / "run")
    batch = make_batch(EXAMPLES)
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))
    head, words = again.t5.lm_head.weight, again.t5.shared.weight
    assert (head is words) == (not own_head)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize("own_head", [False, True])
def test_a_t5_from_scratch_begins_near_a_guess_among_all_words(workdir, tmp_path, own_head):
    base = publish(tmp_path / "base", t5_config(feed_forward_proj="gated-gelu"), own_head)
    AutoTokenizer.from_pretrained(Paths(workdir).t5_tiny).save_pretrained(base)
    backbone = generators.load_t5(str(base), True, 0.0, Paths(workdir))
    assert (backbone.t5.lm_head.weight is backbone.t5.shared.weight) == (not own_head)
    model = Generator({"backbone": backbone.t5.config.to_dict(), "exemplars": "none"}, backbone.t5).eval()
    batch = make_batch(EXAMPLES)
    with torch.no_grad():
        nll = token_nll(model(batch), batch["labels"]).sum() / (batch["labels"] != -100).sum()
    assert float(nll) == pytest.approx(math.log(VOCAB), rel=0.3)


# --------------------------------------------------------------------------------------------------- decoding

OTHERS_WISHES = {
    "num_beams": 3, "do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9,
    "length_penalty": 9.0, "top_p": 0.01, "temperature": 5.0, "forced_eos_token_id": 7, "bad_words_ids": [[9]],
}  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
def test_the_base_models_own_decoding_decides_nothing(tmp_path, beams):
    plain = publish(tmp_path / "plain", t5_config(), own_head=False)
    opinionated = publish(tmp_path / "opinionated", t5_config(), own_head=False)
    (opinionated / "generation_config.json").write_text(json.dumps(OTHERS_WISHES))
    decoding = Decoding(5, 0.9, beams, 12, 64, 42)

    class Tokenizer:
        pad_token_id, bos_token_id, unk_token_id = 0, None, 2

    arguments = generators.decoding_arguments(decoding, Tokenizer())
    models = [around(plain), around(opinionated)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].save_pretrained(tmp_path / "run")
    models.append(Generator.from_pretrained(tmp_path / "run"))
    found = []
    for model in models:
        torch.manual_seed(4)
        found.append(model.generate(make_batch(EXAMPLES), **arguments))
    assert found[0].shape[1] > 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
