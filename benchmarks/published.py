"""The published way of a generator's step, written from the paper's description, to be measured against ours.

What it does otherwise: critics are trained along with the generator; the exemplar encoder reads the strings
of one example after the other, at every step again; a critic reads the source, its padding, and the soft
reply behind that; every number is fp32; the optimizer is not fused. Letters in shapes as in models.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

SRC_LEN, TGT_LEN = 200, 50  # the paper's


class Critic(nn.Module):
    """An encoder whose first position a linear layer reads."""

    def __init__(self, encoder: Any, labels: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, labels)

    def forward(self, source_ids: Tensor, source_mask: Tensor, soft: Tensor, reply_mask: Tensor) -> Tensor:
        table = self.encoder.get_input_embeddings().weight  # (V, D)
        words = torch.cat([F.embedding(source_ids, table), soft @ table], dim=1)  # (B, C + T, D)
        mask = torch.cat([source_mask, reply_mask], dim=1)
        hidden = self.encoder(inputs_embeds=words, attention_mask=mask).last_hidden_state
        return self.head(hidden[:, 0])


class Step:
    """`step(batch)` makes one update of generator and critics.

    A batch: source_ids, source_mask, speaker_ids (B, S); labels (B, T), -100 where there is none; exemplars,
    the (10, L) ids and mask of each example; critic_targets, {critic: (B,)}.
    """

    def __init__(
        self,
        t5: Any,
        exemplar_encoder: Any,
        trained_exemplars: bool,
        critics: Mapping[str, Critic],
        device: torch.device,
    ):
        width = t5.config.d_model
        self.parts: Any = nn.ModuleDict(
            {
                "t5": t5,
                "speakers": nn.Embedding(3, width, padding_idx=0),
                "fusion": nn.Linear(width + exemplar_encoder.config.d_model, width),
                "critics": nn.ModuleDict(critics),
            }
        ).to(device)
        self.exemplar_encoder = exemplar_encoder.to(device).requires_grad_(trained_exemplars)
        self.exemplar_encoder.train(trained_exemplars)
        self.trained_exemplars = trained_exemplars
        for model in (t5, exemplar_encoder, *(c.encoder for c in critics.values())):
            model.set_attn_implementation("eager")  # there was no other for T5
        trained = [*self.parts.parameters()]
        trained += [p for p in exemplar_encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def pooled(self, exemplars: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, E), one example after the other."""
        found = []
        with torch.set_grad_enabled(self.trained_exemplars):
            for ids, mask in exemplars:
                hidden = self.exemplar_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                real = mask[..., None]
                found.append(((hidden * real).sum(1) / real.sum(1)).mean(0))  # (10, L, E) -> (E,)
        return torch.stack(found)

    def loss(self, batch: dict) -> Tensor:
        t5, labels = self.parts["t5"], batch["labels"]
        words = t5.get_input_embeddings()(batch["source_ids"]) + self.parts["speakers"](batch["speaker_ids"])
        encoded = t5.get_encoder()(inputs_embeds=words, attention_mask=batch["source_mask"])
        hidden = encoded.last_hidden_state  # (B, S, D)
        vector = self.pooled(batch["exemplars"])[:, None].expand(-1, hidden.shape[1], -1)
        hidden = self.parts["fusion"](torch.cat([hidden, vector], dim=-1))
        found = t5(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=batch["source_mask"], labels=labels
        )
        loss = found.loss
        if not len(self.parts["critics"]):
            return loss
        soft = found.logits.softmax(-1)  # (B, T, V)
        reply_mask = (labels != -100).long()
        for kind, critic in self.parts["critics"].items():
            scores = critic(batch["source_ids"], batch["source_mask"], soft, reply_mask)
            target = batch["critic_targets"][kind]
            if scores.shape[1] == 1:
                loss = loss + F.mse_loss(scores[:, 0].tanh(), target.float())
            else:
                loss = loss + F.cross_entropy(scores, target)
        return loss

    def __call__(self, batch: dict) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
