"""What critics make of a generator's soft replies, before they serve as its loss."""

from collections.abc import Mapping
from pathlib import Path

import exemplars
import runs
import storage
from critics import choose_for_loss, loss_batches, mean_losses, uninformed_losses
from generators import split_data
from models import Generator, soft_response
from options import Paths, refuse_existing
from pretrained import load_tokenizer
from session import Session


def probe(
    folder: Path,
    critics: Mapping[str, Path],
    split: str,
    examples: int,
    paths: Paths,
    device: dict,
    base: str | None = None,
) -> dict[str, dict[str, float]]:
    """{kind: {loss_of_nothing, loss_of_soft_replies, loss_of_a_guess}} of `critics` {kind: run folder} on at
    most `examples` listener turns of a split, evenly spaced, against the labels of the gold replies.

    Nothing: each word's frequency at every position. Soft replies: the distributions that the generator in
    `folder` gives after the gold words before each position. A guess knows how frequent the labels are.
    `base`: where the encoder of its pooled exemplars lies, if that was moved.
    """
    session = Session(**device)
    model = Generator.from_pretrained(folder).to(session.device)
    tokenizer, settings = load_tokenizer(folder), model.settings
    paths = runs.with_own_exemplars(paths, folder)
    chosen = choose_for_loss(
        critics, settings.family, settings.tokenizer, settings.tgt_len, session, model.vocabulary
    )
    way = exemplars.enter_again(folder, settings, tokenizer, session, paths, base, "--base")
    data = split_data(settings, split, tokenizer, way, paths, chosen.critics, whole=False).data
    nothing = uninformed_losses(chosen.critics, data, session, examples)

    def soft(batch: dict):
        return soft_response(model(batch), strategy=0)

    found = mean_losses(chosen.critics, loss_batches(data, session, examples), soft, session)
    out = {}
    for kind, (loss, guess) in nothing.items():
        out[kind] = {"loss_of_nothing": loss, "loss_of_soft_replies": found[kind], "loss_of_a_guess": guess}
    return out


def report(found: Mapping[str, Mapping[str, float]]) -> None:
    """One line a critic."""
    print(f"{'critic':>12} {'nothing':>12} {'soft replies':>12} {'a guess':>12}")
    for kind, losses in found.items():
        print(" ".join([f"{kind:>12}", *(f"{loss:12.3f}" for loss in losses.values())]))


def run(
    folder: Path,
    critics: Mapping[str, Path],
    split: str,
    examples: int,
    paths: Paths,
    output: Path | None,
    overwrite: bool,
    device: dict,
    base: str | None = None,
) -> dict[str, dict[str, float]]:
    """`probe` and `report`; to `output` as JSON where one is given."""
    if output:
        refuse_existing([output], overwrite, "another --output")
    found = probe(folder, critics, split, examples, paths, device, base)
    report(found)
    if output:
        storage.write_json(output, found)
    return found
