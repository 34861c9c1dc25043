"""Critics, soft responses, and the generator. Knows tensors: reads no csv, parses no arguments.

Letters in shapes: B examples, S source tokens, C context tokens, T reply tokens, L tokens, V words, D model
width, E exemplar width, U distinct exemplars in a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from options import SENTIMENT
from pretrained import SavedModule, Settings, backbone_config, new_encoder, new_t5

# ---------------------------------------------------------------------------------------------------- critics


@dataclass(frozen=True)
class CriticSettings(Settings):
    """What a critic is.

    pooling "first": the first position (the paper's). "reply": mean and max over the reply's positions, of
    the encoder's output and of the word embeddings beside it; from scratch this learns where "first" stays at
    chance.
    """

    kind: str  # emo, exp, int, sentiment; all: a head for each of `heads`
    outputs: int  # labels, of all heads together; 1 for the regressor, squashed by tanh
    pooling: str
    context_len: int  # latest tokens of the context that are read
    reply_len: int  # first tokens of the reply that are read
    head_dropout: float
    word_dropout: float
    backbone: dict  # transformers config
    tokenizer: str  # sha256
    heads: dict[str, int] = dataclasses.field(default_factory=dict)  # {kind: labels}, in their order

    @property
    def kinds(self) -> list[str]:
        """What it can be asked about: one kind, or each of its heads."""
        return [*self.heads] or [self.kind]

    @property
    def is_regressor(self) -> bool:
        return self.kind == SENTIMENT


@dataclass(frozen=True)
class Mixture:
    """What stands at each position in place of a word, as in a soft reply: a share of the word, a share of
    another word, and what is left to 1 of all words by their frequency."""

    own: Tensor  # (B, L), or broadcast to it: the word's share
    rest: Tensor  # the other word's
    others: Tensor  # (B, L) ids of the other words
    frequencies: Tensor  # (V,), sums to 1

    def __call__(self, words: Tensor, embeddings: Tensor) -> Tensor:
        """(B, L, D) and (V, D) -> (B, L, D)."""
        own, rest = self.own[..., None], self.rest[..., None]
        mean = self.frequencies @ embeddings  # (V,) @ (V, D) -> (D,)
        return own * words + rest * F.embedding(self.others, embeddings) + (1 - own - rest) * mean


class Critic(SavedModule):
    """An encoder and a linear head over `context </s> reply </s>` (paper, section III-C: empathy and
    sentiment); or several heads, whose logits stand side by side.

    `settings` is a `CriticSettings` or a mapping with its fields.
    """

    kind_of_settings = CriticSettings
    settings: CriticSettings

    def __init__(self, settings: CriticSettings | Mapping[str, Any], encoder: nn.Module | None = None):
        super().__init__(settings)
        found: Any = encoder
        if found is None:
            found = new_encoder(backbone_config(self.settings.backbone))
        self.encoder = found
        width = found.config.hidden_size
        if self.settings.pooling == "reply":  # words can be narrower than what is made of them (ALBERT)
            width = 2 * width + 2 * self.embeddings.shape[1]
        self.dropout = nn.Dropout(self.settings.head_dropout)
        self.head = nn.Linear(width, self.settings.outputs)

    @property
    def embeddings(self) -> Tensor:
        """(V, D): what a soft response is multiplied with."""
        return self.encoder.get_input_embeddings().weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, reply_mask: Tensor, mixture: Mixture | None = None
    ) -> Tensor:
        """(B, L) ids and masks -> (B, outputs) logits, or (B, 1) scores in [-1, 1]. `mixture`: what is read
        in place of the words."""
        words = F.embedding(input_ids, self.embeddings)
        if mixture is not None:
            words = mixture(words, self.embeddings)
        return self._score(words, attention_mask, reply_mask)

    def forward_words(
        self, context_ids: Tensor, context_mask: Tensor, reply: Tensor, reply_mask: Tensor
    ) -> Tensor:
        """Left-padded context (B, C) ending in </s>, then a reply's word embeddings (B, T, D): the same
        layout, the same result."""
        context = F.embedding(context_ids, self.embeddings)
        words = torch.cat([context, reply.to(context.dtype)], dim=1)  # (B, C + T, D)
        mask = torch.cat([context_mask, reply_mask], dim=1)
        return self._score(words, mask, torch.cat([torch.zeros_like(context_mask), reply_mask], dim=1))

    def _score(self, words: Tensor, mask: Tensor, reply_mask: Tensor) -> Tensor:
        """(B, L, D) embeddings and their masks -> (B, outputs)."""
        if self.training and self.settings.word_dropout:
            kept = torch.rand(words.shape[:2], device=words.device) >= self.settings.word_dropout
            words = words * kept[..., None]
        hidden = self.encoder(inputs_embeds=words, attention_mask=mask).last_hidden_state  # (B, L, D)
        if self.settings.pooling == "first":
            first = mask.argmax(dim=1)  # a left-padded context begins somewhere in the row
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), first]  # (B, D)
        else:
            # from scratch the encoder learns little: the word embeddings reach the head directly too
            both = [*_mean_max(hidden, reply_mask), *_mean_max(words, reply_mask)]
            pooled = torch.cat(both, dim=-1)  # (B, 2 D + 2 D of the words)
        scores = self.head(self.dropout(pooled)).float()
        return scores.tanh() if self.settings.is_regressor else scores

    def parts(self, scores: Tensor) -> dict[str, Tensor]:
        """(B, outputs) -> {kind: (B, labels)}, one for each head."""
        heads = self.settings.heads or {self.settings.kind: self.settings.outputs}
        return dict(zip(heads, scores.split([*heads.values()], dim=-1), strict=True))

    def probabilities(self, scores: Tensor) -> Tensor:
        """(B, outputs) logits -> those of each head's labels; the regressor's scores stay."""
        if self.settings.is_regressor:
            return scores
        return torch.cat([part.softmax(-1) for part in self.parts(scores).values()], dim=-1)

    def of(self, kind: str) -> "Critic":
        """The critic of one kind: itself, or its encoder with that head alone."""
        heads = self.settings.heads
        if kind not in heads:
            return self
        settings = dataclasses.replace(self.settings, kind=kind, outputs=heads[kind], heads={})
        own = Critic(settings, self.encoder)
        place = list(heads).index(kind)
        rows = {n: all_rows.split([*heads.values()])[place] for n, all_rows in self.head.state_dict().items()}
        own.head.load_state_dict(rows)
        return own.to(self.head.weight.device).train(self.training)

    def loss_sum(self, scores: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Cross-entropy, or squared error for the regressor, summed over the batch. `targets`: (B,) labels or
        scores, or (B, labels) a weight for each label."""
        if self.settings.is_regressor:
            return (scores[:, 0] - targets.float()).square().sum()
        return F.cross_entropy(scores, targets, weight=class_weights, reduction="sum")

    def divergence_sum(self, scores: Tensor, view: Tensor) -> Tensor:
        """KL divergence of `scores` from a `view` of the same shape, or squared difference for the regressor,
        summed over the batch."""
        if self.settings.is_regressor:
            return (scores - view).square().sum()
        return F.kl_div(scores.log_softmax(-1), view.log_softmax(-1), reduction="sum", log_target=True)


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D) under a (B, L) mask -> the mean over its positions, (B, D); zeros where it has none."""
    chosen = mask[..., None].to(vectors.dtype)
    return (vectors * chosen).sum(1) / chosen.sum(1).clamp(min=1)


#: padded tokens that a piece holds at least: a GPU reads fewer no faster
FULL = {"cpu": 1, "cuda": 8192}


def read_pieces(
    encode: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    pieces: list[tuple[int, int]] | None,
) -> Tensor:
    """(N, L) ids and mask -> (N, E), what `encode` makes of them piece by piece. `pieces`: [(texts, width)]
    of `dataloaders.in_pieces`; None: all at once."""
    found, begin, count = [], 0, 0
    for texts, width in pieces or [(len(ids), ids.shape[1])]:
        count += texts
        if count * width >= FULL.get(ids.device.type, 1) or begin + count == len(ids):
            part = slice(begin, begin + count)
            found.append(encode(ids[part, :width], mask[part, :width]))
            begin, count = begin + count, 0
    return torch.cat(found) if len(found) > 1 else found[0]


def _mean_max(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D) under a (B, L) mask -> mean and max over its positions, each (B, D)."""
    lowest = torch.finfo(vectors.dtype).min
    return masked_mean(vectors, mask), vectors.masked_fill(mask[..., None] == 0, lowest).amax(1)


def soft_response(logits: Tensor, strategy: int) -> Tensor:
    """(B, T, V) logits -> a distribution over the **vocabulary** at each position, same shape (paper, eq.
    11-13).

    0 softmax, 1 Gumbel-softmax, 2 straight-through Gumbel: one-hot forward, the soft gradient backward.
    """
    logits = logits.float()  # rows of a bf16 softmax do not sum to 1, and its Gumbel noise is coarse
    if strategy == 0:
        return logits.softmax(dim=-1)
    return F.gumbel_softmax(logits, tau=1.0, hard=strategy == 2, dim=-1)


# -------------------------------------------------------------------------------------------------- generator


@dataclass(frozen=True)
class GeneratorSettings(Settings):
    """What a generator is, and how its input is cut."""

    backbone: dict  # transformers config
    exemplars: str  # none, prepend, t5 (frozen, pooled), glove-t5 (trained along, pooled)
    tokenizer: str = ""  # sha256
    src_len: int = 200
    tgt_len: int = 50
    exemplar_len: int = 150
    top_exemplars: int = 10
    family: str = ""
    exemplar_model: str | None = None  # of t5: the hub name or folder that its vectors come from
    exemplar_width: int = 0  # of t5: E of its vectors
    exemplar_backbone: dict | None = None  # of glove-t5: its encoder's config
    exemplar_tokenizer: str | None = None  # of glove-t5: sha256
    own_head: bool = False  # the output layer is not the word embeddings (T5 v1.1, Flan-T5)
    marks: dict[str, int] = dataclasses.field(default_factory=dict)  # {dimension: levels} that may be marked
    match: str = ""  # what its exemplars were found by (reply, context)

    @property
    def pooled_width(self) -> int:
        """E, the width of the vector that is fused with every source position; 0 where exemplars are not
        pooled."""
        if self.exemplar_backbone:
            return self.exemplar_backbone["d_model"]
        return self.exemplar_width


class Generator(SavedModule):
    """T5 (pretrained or GloVe) with speaker embeddings and, as an option, the paper's pooled exemplars (eq.
    2-6).

    `settings` is a `GeneratorSettings` or a mapping with its fields.
    """

    kind_of_settings = GeneratorSettings
    settings: GeneratorSettings

    def __init__(
        self, settings: GeneratorSettings | Mapping[str, Any], t5: T5ForConditionalGeneration | None = None
    ):
        super().__init__(settings)
        if t5 is None:
            t5 = new_t5(backbone_config(self.settings.backbone), self.settings.own_head)
        self.t5 = t5
        own_head = t5.lm_head.weight is not t5.shared.weight
        self.settings = dataclasses.replace(self.settings, own_head=own_head)
        # decoding is the caller's alone: nothing of what the base's generation_config.json asks for
        special = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
        t5.generation_config = GenerationConfig(**{k: getattr(t5.config, k, None) for k in special})
        width = t5.config.d_model
        self.speakers = nn.Embedding(3, width, padding_idx=0)  # 0 exemplar or padding, 1 speaker, 2 listener
        nn.init.zeros_(self.speakers.weight)  # training starts from the pretrained function
        if self.settings.exemplar_backbone:
            self.exemplar_encoder = T5EncoderModel(backbone_config(self.settings.exemplar_backbone))
        if self.settings.pooled_width:
            self.fusion = nn.Linear(width + self.settings.pooled_width, width)
            # likewise: the identity on the encoder's output, plus a small share of the exemplars
            with torch.no_grad():
                self.fusion.weight[:, :width] = torch.eye(width)

    @property
    def vocabulary(self) -> int:
        """V, the length of the table of words; it can be padded beyond the tokenizer's."""
        return self.t5.config.vocab_size

    def encode(self, batch: dict) -> Tensor:
        """The source with speakers and pooled exemplars -> (B, S, D); `encoded`, where the batch has it."""
        if "encoded" in batch:
            return batch["encoded"]
        words = self.t5.get_input_embeddings()(batch["source_ids"]) + self.speakers(batch["speaker_ids"])
        encoder = self.t5.get_encoder()
        hidden = encoder(inputs_embeds=words, attention_mask=batch["source_mask"]).last_hidden_state
        vector = self._exemplar_vector(batch)
        if vector is None:
            return hidden
        spread = vector.to(hidden.dtype)[:, None].expand(-1, hidden.shape[1], -1)  # (B, E) -> (B, S, E)
        return self.fusion(torch.cat([hidden, spread], dim=-1))  # (B, S, D + E) -> (B, S, D)

    def _exemplar_vector(self, batch: dict) -> Tensor | None:
        """(B, E): the mean over an example's exemplars of the mean over their tokens."""
        if self.settings.exemplar_backbone:

            def encode(ids: Tensor, mask: Tensor) -> Tensor:
                hidden = self.exemplar_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                return masked_mean(hidden, mask)  # (U, L, E) -> (U, E)

            # each distinct exemplar of the batch once
            pieces = batch.get("exemplar_pieces")
            each = read_pieces(encode, batch["exemplar_ids"], batch["exemplar_mask"], pieces)  # (U, E)
            return batch["exemplar_share"].to(each.dtype) @ each  # (B, U) @ (U, E) -> (B, E)
        return batch["exemplar_vectors"] if self.settings.exemplar_width else None

    def forward(self, batch: dict, read: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Teacher forcing: (B, T, V) logits, T the longest reply of this batch; or what `read` makes of
        `decode` and of the output layer's weights (V, D)."""
        hidden = self.decode(batch)
        return read(hidden, self.t5.lm_head.weight) if read else self.t5.lm_head(hidden)

    def decode(self, batch: dict) -> Tensor:
        """Teacher forcing: what the output layer reads, (B, T, D). Marks are read before a reply, and nothing
        here is of them. Where there are more replies than sources, as many follow each source in turn, which
        is encoded once."""
        hidden, source_mask = self.encode(batch), batch["source_mask"]
        if (replies := len(batch["labels"]) // len(hidden)) > 1:  # (B / R, S, D) -> (B, S, D)
            hidden, source_mask = (x.repeat_interleave(replies, dim=0) for x in (hidden, source_mask))
        ids = self.t5.prepare_decoder_input_ids_from_labels(batch["labels"])  # (B, T)
        given, marks = None, 0
        if "prefix_ids" in batch:  # (B, P), padded on the left, the start token before the marks
            marks = batch["prefix_ids"].shape[1] - 1
            ids = torch.cat([batch["prefix_ids"], ids[:, 1:]], dim=1)  # (B, P - 1 + T)
            given = batch["prefix_mask"]
            given = torch.cat([given, given.new_ones(ids[:, marks + 1 :].shape)], 1)
        decoded = self.t5.decoder(
            input_ids=ids,
            attention_mask=given,
            encoder_hidden_states=hidden,
            encoder_attention_mask=source_mask,
            use_cache=False,
        ).last_hidden_state[:, marks:]
        config = self.t5.config
        return decoded * config.d_model**-0.5 if config.scale_decoder_outputs else decoded

    @torch.no_grad()
    def generate(self, batch: dict, **decoding) -> Tensor:
        """Replies (B x num_return_sequences, P + at most max_new_tokens), P what the decoder begins with: the
        start token, and marks where the batch has some. The encoder runs once, speakers and exemplars
        included."""
        hidden = self.encode(batch).clone()  # beam search reorders the tensor it is given
        if "prefix_ids" in batch:
            decoding |= {
                "decoder_input_ids": batch["prefix_ids"],
                "decoder_attention_mask": batch["prefix_mask"],
            }
        return self.t5.generate(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=batch["source_mask"], **decoding
        )


def until_end(ended: Tensor) -> Tensor:
    """(N, T), whether a token is an end -> whether it belongs to the reply: up to the first end, that too."""
    return ended.cumsum(1) - ended.long() == 0


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V), (B, T) with -100 -> the negative log-likelihood of each token, (B, T), 0 where there is
    none."""
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return flat.view_as(labels)
