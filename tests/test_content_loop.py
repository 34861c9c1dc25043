"""What one update does, seen from a run's files: gradient norm over processes, clipping, precision."""

from pathlib import Path

import pytest
import torch
from conftest import by_two_processes, logged, newest, weights
from safetensors.torch import load_file
from toy import train

import train_glove_t5

#: what torchrun does, with one import of torch in place of three
pytestmark = pytest.mark.usefixtures("the_end_is_kept")


def norms(folder: Path) -> list[float]:
    return [row["grad_norm"] for row in logged(folder, "train")]


def test_two_processes_have_the_gradient_of_one_with_the_doubled_batch(tmp_path):
    """Its size too, which AdamW hides from losses and weights, and which --clip goes by."""
    by_two_processes(train, str(tmp_path / "two"), batch_size=3, epochs=1, dropout=0.0, clip=0.0)
    train(tmp_path / "one", batch_size=6, epochs=1, dropout=0.0, clip=0.0)
    assert len(norms(tmp_path / "one")) == 4
    assert norms(tmp_path / "two") == pytest.approx(norms(tmp_path / "one"), rel=1e-4)


def gradient_size(folder: Path) -> float:
    """Of the gradient that AdamW was given in a run's only update: its first moment is a tenth of it."""
    state = torch.load(newest(folder) / "state.pt", weights_only=True)["optimizer"]["state"]
    return 10 * float(sum(s["exp_avg"].double().square().sum() for s in state.values()) ** 0.5)


def test_a_clip_below_the_norm_shortens_the_gradient_and_changes_the_weights(tmp_path):
    once = {"dropout": 0.0, "max_steps": 1}
    train(tmp_path / "free", clip=0.0, **once)
    (norm,) = norms(tmp_path / "free")
    for name, clip, given in (("above", 2 * norm, norm), ("below", norm / 8, norm / 8)):
        train(tmp_path / name, clip=clip, **once)
        assert norms(tmp_path / name) == pytest.approx([norm])  # logged as it was before the clip
        assert gradient_size(tmp_path / name) == pytest.approx(given, rel=1e-4)
    assert gradient_size(tmp_path / "free") == pytest.approx(norm, rel=1e-4)

    found = {}
    for name, clip in (("free", 0.0), ("above", 1000.0), ("below", norm / 8)):
        train(tmp_path / f"{name} longer", clip=clip, dropout=0.0)
        found[name] = weights(tmp_path / f"{name} longer")
    assert all(torch.equal(v, found["above"][k]) for k, v in found["free"].items())
    assert not any(torch.equal(v, found["below"][k]) for k, v in found["free"].items())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_that_is_asked_for_is_in_force(workdir, precision):
    """In updates, in the evaluation and in writing replies every linear layer computes in it; weights are
    kept in fp32."""
    seen: dict[str, set] = {"update": set(), "evaluation": set(), "replies": set()}
    stage = "evaluation"

    def look(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            seen["update" if module.training else stage].add(output.dtype)

    common = ["--workdir", str(workdir), "--device", "cpu", "--precision", precision, "--max-new-tokens", "2"]
    folder = workdir / "saved" / "glove-t5" / "plain"
    short = ["--size", "tiny", "--add-exemplars", "none", "--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        train_glove_t5.main([*common, *short, "--max-steps", "1", "--batch-size", "4", "--no-predict"])
        stage = "replies"
        train_glove_t5.main([*common, "--inference", str(folder)])
    finally:
        hook.remove()
    asked = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert seen == {"update": {asked}, "evaluation": {asked}, "replies": {asked}}
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float32}
