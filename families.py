"""What the stages of all families of generators share: the validation, the loss on sampled replies, and the
way of a run from its loop to its result."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import advice
import exemplars
import lineage
import storage
from corpora import Example
from critics import Critics
from dataloaders import SplitData
from gold import gold_labels
from metrics import count_words, perplexity
from objectives import Distance, Draw, EnergyScore, ReplyObjective, SampledReplies
from options import SENTIMENT, Paths, UserError
from predicting import likelihood_key, otherwise_decoded, prediction_files
from session import Session
from settings import Decoding, SampledOptions, given_flags
from training import Loop


def validate(
    model: nn.Module, objective: ReplyObjective, held: SplitData, batches: list[list[int]], session: Session
) -> dict[str, float]:
    """Each term averaged over its own unit on a whole split; perplexity per model token and per word.

    The critics see the softmax whatever the strategy of the training, so that an evaluation is no draw.
    """
    names = objective.measured
    totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for numbers in session.over(batches):
        batch = objective.foresee(held.data.collate(numbers))
        units = objective.gold_units(batch)
        batch = session.move(batch)
        with session.autocast():
            sums = objective.losses(model, batch)
        # a GPU is waited for once a batch
        for name, value in zip(names, torch.stack([sums[k].float() for k in names]).tolist(), strict=True):
            totals[name] += value
            counts[name] += units[name]
    summed = session.sum([totals[k] for k in names] + [counts[k] for k in names])
    values = {k: summed[i] / summed[len(names) + i] for i, k in enumerate(names)}
    nll, tokens = summed[names.index("nll")], summed[len(names) + names.index("nll")]
    words = sum(count_words(e.response) + 1 for e in held.examples)  # the end of a reply counts as a word
    return values | {"ppl_token": perplexity(nll, tokens), "ppl_word": perplexity(nll, words)}


def sampled_replies(
    options: SampledOptions,
    critics: Critics,
    examples: list[Example],
    draw: Draw,
    paths: Paths,
    session: Session,
) -> SampledReplies | None:
    """The loss on sampled replies, where its weight asks for one. `critics`: that reward them."""
    if not options.sampled_loss_w:
        return None
    if session.world > 1:
        raise UserError("--sampled-loss-w: replies are sampled by one process; run it without torchrun")
    contexts = [e.history for e in examples]
    if options.sampled_reward == "energy":
        return SampledReplies(EnergyScore(critics, contexts, [e.response for e in examples]), draw, options)
    levels = {kind: int(scorer.limits[1]) + 1 for kind, scorer in critics.items() if kind != SENTIMENT}
    labels = gold_labels("train", examples, paths, levels=levels)
    rewards = Distance(critics, contexts, {kind: labels[kind] for kind in critics})
    return SampledReplies(rewards, draw, options)


def reward_sources(
    critics: dict[str, Path], options: SampledOptions, paths: Paths
) -> dict[str, dict[str, str]]:
    """Entries of a run's sources: what sampled replies are rewarded by."""
    found = storage.sources_of({f"reward {kind}": folder for kind, folder in critics.items()}, paths)
    if critics and options.sampled_reward == "distance":
        found["labels train"] = storage.source(paths.labels("train"), paths)
    return found


def data_sources(paths: Paths, reads: bool, labelled: Iterable[str]) -> dict[str, dict[str, str]]:
    """Entries of a run's sources: the splits that it is trained and validated on, what it `reads` as
    exemplars and how these were found, and the labels of the `labelled` splits."""
    files = {f"dialogues {split}": paths.dialogues(split) for split in ("train", "valid")}
    if reads:
        files |= {f"exemplars {split}": paths.exemplars(split) for split in ("train", "valid")}
    files |= {f"labels {split}": paths.labels(split) for split in labelled}
    found = {name: storage.source(file, paths) for name, file in files.items()}
    if reads:
        found["pool"] = found["dialogues train"]
        found |= exemplars.retriever(paths.exemplars("train"))
    return found


def inputs_of(sources: dict[str, dict[str, str]]) -> dict[str, str]:
    """{name: sha256} of the sources that a run depends on: not what its exemplars were found with, for their
    file is compared."""
    return {name: entry["sha256"] for name, entry in sources.items() if name not in exemplars.FOUND_WITH}


def to_the_end(
    loop: Loop,
    folder: Path,
    split: str | None,
    predict: Callable[[str], dict[str, float]],
    decoding: Decoding,
    paths: Paths,
    session: Session,
) -> dict:
    """The result of a run: trained, the kept weights measured, `split` replied to by `predict` (None: not),
    and finished. `decoding`: how `predict` replies."""
    result = loop.train()
    if result.get("already_finished"):
        predictions = prediction_files(folder, split)[0] if split else None
        if split and predictions and not predictions.exists():  # they were not asked for then
            session.say(f"next, its replies: {advice.replies(folder, split, paths.root)}")
            return result
        if split and predictions and (other := otherwise_decoded(predictions, decoding)):
            anew = advice.replies(folder, split, paths.root, **given_flags(decoding))
            session.say(f"{predictions}: still as they were written ({'; '.join(other)}); anew with: {anew}")
        session.say(f"next: {advice.after_training(folder, split, paths.root)}")
        return result
    result |= {"valid": loop.measure()}
    # as it can be told now: what it began from and its critics may be replaced, or go
    result[lineage.SERVED] = [asdict(critic) for critic in lineage.served(folder, paths)]
    if split and session.main:
        result[likelihood_key(split)] = predict(split)
    loop.finish(result)
    session.say(f"next: {advice.after_training(folder, split, paths.root)}")
    return result
