"""What is saved is the same bytes every time, and places that lack something: locks, fsync, chmod, rights, links."""

import os
import subprocess
import sys

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_model
from test_models import t5_config
from torch import nn
from transformers import T5ForConditionalGeneration

import storage
from models import Generator

# ------------------------------------------------------------------------------------------------------------ weights


def tied_generator() -> Generator:
    settings = {
        "backbone": t5_config().to_dict(),
        "exemplars": "none",
        "exemplar_width": 0,
        "exemplar_backbone": None,
    }
    return Generator(settings, T5ForConditionalGeneration(t5_config()))


def test_the_same_weights_give_the_same_bytes_in_every_process(tmp_path):
    model = tied_generator()
    model.save_pretrained(tmp_path / "first")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from models import Generator\n"
        "for n in range(6): Generator.from_pretrained(sys.argv[2]).save_pretrained(f'{sys.argv[3]}-{n}')"
    )
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "first"), str(tmp_path / seed)]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    found = {f.read_bytes() for f in tmp_path.glob("*/model.safetensors")}
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 13 and len(found) == 1


def test_a_tied_tensor_is_stored_once_and_loads_as_it_was(tmp_path):
    model = tied_generator()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert len(names) > len(dict(model.named_parameters())) == len(stored)
    again = Generator.from_pretrained(tmp_path)
    assert again.t5.lm_head.weight is again.t5.shared.weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_of_earlier_runs_still_load(tmp_path):
    """`save_model` wrote them: one name of a tied tensor, the others in the metadata."""
    model, other = tied_generator(), tied_generator()
    nn.init.normal_(other.speakers.weight)
    save_model(other, str(tmp_path / "old.safetensors"))
    storage.save_weights(other, tmp_path / "new.safetensors")
    assert load_file(tmp_path / "old.safetensors").keys() == load_file(tmp_path / "new.safetensors").keys()
    storage.load_weights(model, tmp_path / "old.safetensors")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_views_and_empty_tensors_are_saved_whole(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
            self.register_buffer("none", torch.zeros(0, 2))
            self.register_buffer("nothing", torch.zeros(0, 2))

    storage.save_weights(Odd(), tmp_path / "odd.safetensors")
    empty = Odd()
    empty.turned.zero_()
    storage.load_weights(empty, tmp_path / "odd.safetensors")
    assert torch.equal(empty.turned, torch.arange(6.0).view(2, 3).t())
