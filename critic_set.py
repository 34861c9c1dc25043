"""The frozen critics of a generator's loss, and the replies as they read them.

Letters as in models.py, but E: the width of all critics' words together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Critic
from options import UserError
from quick import cast_frozen, quicken
from vocabulary import product_kind


class CriticSet:
    """The frozen critics of a generator's loss, none of them where no weight asks for one.

    Part of the objective, never of the generator's weights. Deliberately no `nn.Module`: it cannot be put in
    training mode, moved into a checkpoint or an optimizer.
    """

    def __init__(self, critics: dict[str, Critic], device: torch.device, half: bool = False):
        """`half`: they are asked under an autocast to bf16, and nowhere else."""
        self.critics = {k: c.to(device).eval().requires_grad_(False) for k, c in critics.items()}
        for critic in self.critics.values():
            quicken(critic, device)
            if half:
                cast_frozen(critic)
        self._tables: dict[torch.dtype, Tensor] = {}

    def __len__(self) -> int:
        return len(self.critics)

    @property
    def widths(self) -> list[int]:
        """The width of each critic's words."""
        return [critic.embeddings.shape[1] for critic in self.critics.values()]

    def table(self, kind: torch.dtype) -> Tensor:
        """(V, E): the words of all critics side by side, so that one product serves them all."""
        if kind not in self._tables:
            with torch.inference_mode(False), torch.no_grad():  # a training can ask for it later
                own = [critic.embeddings for critic in self.critics.values()]
                self._tables[kind] = torch.cat([words.to(kind) for words in own], dim=1)
                for words, part in zip(own, self._tables[kind].split(self.widths, dim=1), strict=True):
                    if words.dtype == kind:
                        words.data = part  # held once
        return self._tables[kind]

    def check_tokenizer(self, tokenizer_hash: str, vocabulary: int | None = None) -> None:
        """A soft reply is a distribution over the generator's words, so every critic must know the same
        words. `vocabulary`: V of the generator, which can be padded beyond the tokenizer's words."""
        for kind, critic in self.critics.items():
            same_words = critic.settings.tokenizer == tokenizer_hash
            # soft replies follow a context that is padded on the left: relative positions alone read it alike
            if not same_words or critic.settings.backbone["model_type"] != "t5":
                raise UserError(
                    f"the {kind} critic was trained with another tokenizer or encoder than the generator's; "
                    "it can label and judge, but not serve as a loss: train one with the generator's "
                    "--model and name it by --family, or take its words over (GloVe: prepare_data.py "
                    "--glove, docs/own-dialogues.md), or set --empathy-loss-w 0 --sentiment-loss-w 0"
                )
            rows = len(critic.embeddings)
            if vocabulary is not None and rows != vocabulary:
                raise UserError(
                    f"the {kind} critic has {rows:,} word embeddings, the generator {vocabulary:,}: the "
                    "same words, but one of the two models is padded; train critics with the generator's "
                    "--model and name them by --family"
                )

    @property
    def context_len(self) -> int:
        """The longest context, in tokens, that any of them reads."""
        return max((c.settings.context_len for c in self.critics.values()), default=0)

    def cut(self, batch: dict) -> dict[str, bool]:
        """Of each critic, whether it gets any reply otherwise closed than the batch has it."""
        found, end = {}, batch["context_ids"][0, -1]
        for kind, critic in self.critics.items():
            found[kind] = bool(reply_ends(batch, critic.settings.reply_len, end)[1].any())
        return found

    def losses(self, soft: Tensor, batch: dict, views: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Each critic's loss on soft replies (B, T, V) against the labels of the gold replies, or against
        `views`, summed over the batch."""
        kind = product_kind(soft)
        return self.losses_of_words(soft.to(kind) @ self.table(kind), batch, views)

    def losses_of_words(
        self, words: Tensor, batch: dict, views: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The same of what `table` makes of soft replies, (B, T, E)."""
        parts = zip(self.critics, words.split(self.widths, dim=-1), strict=True)
        return {kind: self._loss(kind, part, batch, views) for kind, part in parts}

    def loss(self, kind: str, soft: Tensor, batch: dict, views: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of one critic, as in `losses`."""
        words = soft @ self.critics[kind].embeddings.to(soft.dtype)
        return self._loss(kind, words, batch, views)

    def _loss(self, kind: str, words: Tensor, batch: dict, views: dict[str, Tensor] | None) -> Tensor:
        critic, scores = self.critics[kind], self._scores(kind, words, batch)
        if views is None:
            return critic.loss_sum(scores, batch["critic_targets"][kind])
        return critic.divergence_sum(scores, views[kind])

    def _scores(self, kind: str, words: Tensor, batch: dict) -> Tensor:
        """What a critic says of replies whose words are vectors (B, T, D) of its own."""
        critic, end = self.critics[kind], batch["context_ids"][0, -1]
        any_cut = batch["cut"][kind] if "cut" in batch else None
        ending = F.embedding(end, critic.embeddings).to(words.dtype)  # (D,)
        closed, mask = close_replies(words, batch, critic.settings.reply_len, end, ending, any_cut)
        return critic.forward_words(*self._context(kind, batch), closed, mask)

    def _context(self, kind: str, batch: dict) -> tuple[Tensor, Tensor]:
        """Ids and mask of as much context as a critic has read in its training."""
        most = self.critics[kind].settings.context_len + 1  # the </s> that ends it
        return batch["context_ids"][:, -most:], batch["context_mask"][:, -most:]

    @torch.no_grad()
    def views(self, batch: dict) -> dict[str, Tensor]:
        """What each critic itself says of the gold replies: (B, labels) logits, or (B, 1) scores."""
        gold = batch["labels"].clamp(min=0)  # (B, T) -> (B, T, D)
        return {k: self._scores(k, F.embedding(gold, c.embeddings), batch) for k, c in self.critics.items()}


def reply_ends(batch: dict, most: int, end: Tensor) -> tuple[Tensor, Tensor]:
    """(B,): the tokens before each reply's end where a critic reads at most `most`; and whether the end that
    it reads there is not the one that the reply has."""
    labels, length = batch["labels"], batch["reply_mask"].sum(1)
    ends = labels.gather(1, length[:, None] - 1)[:, 0] == end
    return (length - ends.long()).clamp(max=most), ~ends | (length - 1 > most)


def close_replies(
    replies: Tensor, batch: dict, most: int, end: Tensor, ending: Tensor, any_cut: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Soft replies (B, T, X) as a critic of `reply_len` = `most` reads them: at most so many tokens, then
    `ending` (X,), what the token `end` is there.

    Returns (B, T', X) and its mask (B, T'). Where a reply ends within that, its end stays what the model says
    of it; one that was cut in training, or goes on beyond `most`, gets the `end` token itself. `any_cut`:
    whether there is such a one, if that is known: a GPU would have to be waited for.
    """
    reply_mask = batch["reply_mask"]
    words, cut = reply_ends(batch, most, end)
    if not (bool(cut.any()) if any_cut is None else any_cut):  # the usual case
        return replies[:, : most + 1], reply_mask[:, : most + 1]
    width = min(replies.shape[1], most) + 1
    replies = F.pad(replies[:, :width], (0, 0, 0, max(0, width - replies.shape[1])))
    place = torch.arange(width, device=replies.device)[None]
    hard = (place == words[:, None]) & cut[:, None]  # (B, T')
    return torch.where(hard[..., None], ending, replies), (place <= words[:, None]).to(reply_mask.dtype)
