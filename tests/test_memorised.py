"""benchmarks/memorised.py: one pass tells what a model would go on with."""

import json

import pytest
import torch
from helpers import chat_ids
from test_causal_models import make_tokenizer, save_llama, trained

from benchmarks import memorised
from corpora import listener_turns
from options import Paths, UserError
from session import Session


def test_what_the_model_writes_greedily_counts_and_one_other_token_does_not(tmp_path):
    model = trained(save_llama(tmp_path / "llama", make_tokenizer()), tmp_path)
    rows = []
    for turn in ("my dog ran away", "i got the job i wanted today"):
        before = chat_ids(model.tokenizer, [turn])
        batch = {"input_ids": torch.tensor(before)[None], "attention_mask": torch.ones(1, len(before)).long()}
        out = model.generate(batch, do_sample=False, max_new_tokens=6, suppress_tokens=None, min_new_tokens=6)
        rows.append((before.tolist(), out[0].tolist()))
    other = [(before, [*wanted[:-1], wanted[-1] + 1]) for before, wanted in rows]
    assert memorised.continued(model, rows + other, 3, "", Session("cpu")) == [True, True, False, False]


def test_the_command_says_what_share_of_the_long_replies_it_knows(workdir, tmp_path, capsys):
    folder = workdir / "saved" / "causal-lm" / "plain"
    trained(save_llama(tmp_path / "llama", make_tokenizer()), tmp_path).save_pretrained(folder)
    flags = [str(folder), "--workdir", str(workdir), "--given", "2", "--words", "3"]
    memorised.main(flags)
    found = json.loads((workdir / "results" / "benchmarks" / "memorised.json").read_text())
    replies = [e.response.split() for e in listener_turns(Paths(workdir).dialogues("test"))]
    assert found["replies"] == sum(len(r) >= 5 for r in replies)
    assert set(found["shares"]["plain"]) == {"chat", "plain"}
    assert "% as chat" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        memorised.main(flags)
    with pytest.raises(SystemExit):
        memorised.main([str(tmp_path / "plain"), *flags])
    assert "RUN plain: two of one name" in capsys.readouterr().err
