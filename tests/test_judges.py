"""Judges: what they learn from, what they say of replies, and what is said of them."""

import json

import numpy as np
import pytest
import torch

import advice
import critics
import train_empathy_classifier
from dataloaders import read_pairs
from metrics import calibration_error
from models import Critic, CriticSet
from options import DIMENSIONS, Paths, UserError

# --------------------------------------------------------------------------------------- what they learn from


def test_minilm_is_a_family_of_critics_with_its_own_defaults_and_never_a_loss(workdir, monkeypatch):
    tiny = str(Paths(workdir).bert_tiny)
    monkeypatch.setattr(critics, "resolve", lambda name: tiny if name == "minilm" else name)
    flags = ["--workdir", str(workdir), "--device", "cpu", "--max-steps", "2", "--dim", "emo"]
    train_empathy_classifier.main([*flags, "--model", "minilm", "--part", "a"])
    folder = workdir / "saved" / "empathy" / "minilm-a-emo"
    made = json.loads((folder / "args.json").read_text())["args"]
    assert (made["lr"], made["epochs"], made["batch_size"], made["part"]) == (6e-5, 4, 16, "a")
    assert "calibration_error" in json.loads((folder / "result.json").read_text())["valid"]
    critic = Critic.from_pretrained(folder)
    with pytest.raises(UserError, match="can label and judge, but not serve as a loss"):
        CriticSet({"emo": critic}, torch.device("cpu")).check_tokenizer(critic.settings.tokenizer)


def test_the_command_for_a_critic_of_one_half_names_the_half():
    line = advice.makes("w/saved/empathy/minilm-seeker-b-int", "")
    made = "--dim int --workdir w --model minilm --split-by seeker --part b"
    assert line.endswith(f"train_empathy_classifier.py {made}")
    args = train_empathy_classifier.parse_args(made.replace("--workdir w", "").split())
    assert (args.model, args.split_by, args.part) == ("minilm", "seeker", "b")


def test_halves_and_sides_by_seeker_share_no_seeker_in_any_dimension(prepared):
    posts: dict[str, set] = {"a": set(), "b": set(), "valid": set()}
    for dim in DIMENSIONS:
        pairs = [read_pairs(Paths(prepared).pairs(dim, split)) for split in ("train", "valid")]
        for part in "ab":
            train, valid = critics.choose_pairs(*pairs, "seeker", part)
            posts[part] |= set(train["seeker_post"])
            posts["valid"] |= set(valid["seeker_post"])
        whole = critics.choose_pairs(*pairs, "seeker", "all")
        assert sum(map(len, whole)) == sum(map(len, pairs))
    assert all(posts.values())
    assert not posts["a"] & posts["b"] and not posts["valid"] & (posts["a"] | posts["b"])


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
    # of the two at .9 one is right: gap .4; at .6 wrong: .6; at 1.0 right: 0
    assert calibration_error([0, 1, 0, 1], probabilities) == pytest.approx(100 * (2 * 0.4 + 0.6 + 0) / 4)
