"""The benchmarks run, and print what a reader of their figures needs."""

import json
import re

import pytest
import torch

from benchmarks import steps, train_step
from options import UserError
from session import Session


def rows_of(out: str) -> list[list[float]]:
    """(seconds, floor, share) of each way."""
    rows = []
    for way in ("published", "prepend", "pool"):
        found = re.search(rf"^{way} +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", out, re.M).groups()
        rows.append([float(found[place]) for place in (0, 3, 4)])
    return rows


def test_the_step_is_measured_against_the_published_one(tmp_path, capsys):
    words = ["--shape", "tiny", "--workdir", str(tmp_path), "--device", "cpu", "--repeats", "1"]
    for _ in range(3):  # on a busy machine one timing of milliseconds can be of something else
        train_step.main([*words, "--no-memory", "--batch-size", "2", "--overwrite"])
        out = capsys.readouterr().out
        if all(floor < seconds for seconds, floor, _ in rows_of(out)):
            break
    assert "tiny, batch 2, four critics," in out and "cpu, fp32" in out
    for seconds, floor, share in rows_of(out):
        assert 0 < floor < seconds and 0 < share < 1
    assert re.search(r"^prepend: [\d.]+x faster than published", out, re.M)
    kept = json.loads((tmp_path / "results" / "benchmarks" / "train_step_tiny.json").read_text())
    assert kept["ways"]["pool"]["gflop"] > 0 and kept["flags"]["batch_size"] == 2
    # what a process of its own is asked for: its peak, which holds torch at least
    train_step.main([*words, "--ways", "prepend"])
    assert 0.1 < float(re.search(r"prepend: peak (\S+) GiB", capsys.readouterr().out)[1]) < 16


def test_the_language_model_is_measured_too(tmp_path, capsys):
    words = ["--shape", "tiny-causal", "--workdir", str(tmp_path), "--device", "cpu", "--repeats", "1"]
    train_step.main([*words, "--no-memory"])
    out = capsys.readouterr().out
    for way in ("ours-eager", "ours-sdpa"):
        assert re.search(rf"^{way}: [\d.]+x faster than plain", out, re.M)


def test_each_way_of_the_language_model_has_its_own_attention(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(steps, "one_update", lambda model, *rest: built.append(model))
    args = train_step.parse_args(["--shape", "tiny-causal", "--workdir", str(tmp_path)])
    steps.build_ways(args, Session("cpu", "fp32", 1))
    assert [model.lm.config._attn_implementation for model in built] == ["eager", "sdpa"]


def test_ours_can_be_measured_with_the_small_critics_beside_the_published_way_with_the_recipes(
    tmp_path, monkeypatch
):
    built = {}
    monkeypatch.setattr(steps, "own_step", lambda *rest: built.setdefault("ours", rest[6]))
    monkeypatch.setattr(steps, "published_step", lambda shape, *rest: built.setdefault("published", shape))
    words = ["--shape", "glove-mini", "--batch-size", "2", "--workdir", str(tmp_path), "--device", "cpu"]
    steps.build_ways(train_step.parse_args([*words, "--critics", "small"]), Session("cpu", "fp32", 1))
    widths = {critic.embeddings.shape[1] for critic in built["ours"].critics.values()}
    assert widths == {64} and built["published"].critic.d_model == 256


def test_a_way_that_a_shape_has_not_is_named(capsys):
    with pytest.raises(SystemExit):
        train_step.parse_args(["--shape", "causal", "--ways", "pool"])
    assert "--shape causal has plain, ours-eager, ours-sdpa" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.parse_args(["--shape", "t5", "--critics", "small"])
    assert "--critics small: those of --shape t5 have one size" in capsys.readouterr().err


def test_grouped_heads_cost_what_heads_of_their_own_cost(monkeypatch):
    """Of a fused attention whose formula knows no grouped heads, as before torch 2.13."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention
    formula = steps.flop_registry[fused]

    def strict(query, key, *rest, **named):
        assert query.shape[1] == key.shape[1]
        return formula(query, key, *rest, **named)

    monkeypatch.setitem(steps.flop_registry, fused, strict)
    query, key = torch.zeros(2, 6, 5, 4), torch.zeros(2, 3, 7, 4)

    class Attention:  # no processor has this one
        _overloadpacket = fused

        def __call__(self, *args):
            return torch.zeros(2, 6, 5, 4)

    floor = steps.Floor(Session("cpu"))
    floor.__torch_dispatch__(Attention(), (), (query, key, key))
    assert floor.operations == 2 * 2 * (2 * 6 * 5 * 7 * 4)


def test_a_way_that_cannot_run_says_why(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    words = ["--shape", "tiny", "--device", "cuda", "--workdir", str(tmp_path)]
    with pytest.raises(UserError, match="published, in a process of its own: .*CUDA"):
        train_step.main(words)
