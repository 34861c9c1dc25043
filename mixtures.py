"""Mixtures of words in the place of replies, as a generator's soft ones are: what critics are shown of them,
and how they do on one that says nothing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders import Data, plan_once
from models import Critic, Mixture
from session import Session


@dataclass(frozen=True)
class Mixtures:
    """Training replies as a generator's soft ones are: no word stands alone, and little may be said."""

    share: float  # of the replies that are mixed
    frequencies: Tensor  # (V,) of words in training replies
    mean_target: Tensor  # (labels,), or () of the regressor: what is known of a reply that says nothing

    def draw(self, batch: dict) -> dict:
        """The batch with `own`, `rest` and `others` (B, L) of its Mixture, and its targets as the mixtures
        leave them.

        A mixed reply keeps a share of its own words, drawn evenly (a fifth keep none); of what is left, a
        share drawn in the same way is one other word of the batch's replies, and the rest the mean of all
        words. A reply that keeps half of its own or more keeps its target; below that it is drawn to the
        mean, in proportion.
        """
        reply = batch["reply_mask"].bool()  # (B, L)
        count = len(reply)
        own, rest = (1.25 * torch.rand(2, count) - 0.25).clamp(min=0)  # (B,) each
        own = torch.where(torch.rand(count) < self.share, own, 1.0)
        rest = (1 - own) * rest
        words = batch["input_ids"][reply]
        others = words[torch.randint(len(words), reply.shape)]
        kept = (2 * own).clamp(max=1)
        targets = batch["targets"]
        if self.mean_target.ndim:
            if targets.ndim == 1:
                targets = F.one_hot(targets, len(self.mean_target)).float()
            kept = kept[:, None]
            nothing = targets.sum(1, keepdim=True) * self.mean_target  # (B, labels)
        else:
            nothing = self.mean_target
        return batch | {
            "own": torch.where(reply, own[:, None], 1.0),
            "rest": torch.where(reply, rest[:, None], 0.0),
            "others": others,
            "targets": kept * targets + (1 - kept) * nothing,
        }


def word_frequencies(data: Data, vocabulary: int) -> Tensor:
    """(V,) share of each word, ends included, in the replies of at most 4096 examples, evenly spaced."""
    counts = torch.zeros(vocabulary)
    most = 4096
    numbers = list(range(0, len(data), -(-len(data) // most)))
    for start in range(0, len(numbers), 256):
        batch = data.collate(numbers[start : start + 256])
        counts += torch.bincount(batch["input_ids"][batch["reply_mask"] > 0], minlength=vocabulary)
    return counts / counts.sum()


def mean_target(targets: list, outputs: int) -> Tensor:
    """(labels,) the labels' shares, or () the mean score where `outputs` is 1."""
    found = torch.tensor(targets)
    if outputs == 1:
        return found.float().mean()
    rows = F.one_hot(found, outputs) if found.ndim == 1 else found
    return rows.sum(0) / rows.sum()


@torch.no_grad()
def loss_of_nothing(
    critic: Critic, held: Data, frequencies: Tensor, session: Session, batch_size: int, batch_tokens: int
) -> float:
    """The mean loss where every word of a reply is the mean of all words."""
    total = 0.0
    for numbers in plan_once(held.lengths, batch_size, batch_tokens):
        batch = session.move(held.collate(numbers))
        context = (1 - batch["reply_mask"]).float()  # (B, L)
        mixture = Mixture(context, torch.zeros_like(context), batch["input_ids"], frequencies)
        scores = critic(batch["input_ids"], batch["attention_mask"], batch["reply_mask"], mixture)
        total += float(critic.loss_sum(scores, batch["targets"]))
    return total / len(held)
