"""Many replies to each prompt by a causal language model: the prompt is read once for all of them, each
token's log-probability is kept while it is drawn, and a reply that has ended leaves the batch.

transformers' `generate` reads the prompt once for each reply, carries ended ones along, and sorts the whole
vocabulary for top-p.
Letters in shapes: B prompts, L tokens, N replies to each prompt, T new tokens, R replies not yet ended,
V words, K words to choose among.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from causal_models import CausalGenerator
from chats import pad_id
from options import UserError
from settings import Decoding


@dataclass(frozen=True)
class Sampled:
    """Replies to prompts, those to one prompt side by side."""

    ids: Tensor  # (B * N, T), ended by the end token where it ended, padded
    log_probability: Tensor  # (B * N,) mean over its tokens, its end included, in nats, of the plain model
    tokens: Tensor  # (B * N,) how many those are


def choose(logits: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """(R, V), (R,) uniform in [0, 1) -> the words drawn, (R,), out of the `top_k` likeliest (0: all).

    top_p, within these: the fewest whose probabilities together reach it.
    """
    words = logits.shape[1]
    best = logits.topk(min(decoding.top_k or words, words))  # (R, K), likeliest first
    chance = (best.values / decoding.temperature).softmax(-1)
    if decoding.top_p < 1:
        before = chance.cumsum(-1) - chance
        chance = chance.masked_fill(before >= decoding.top_p, 0)
    reached = chance.cumsum(-1)
    place = (reached <= draws[:, None] * reached[:, -1:]).sum(-1)  # (R,)
    place = place.minimum((chance > 0).sum(-1) - 1)  # a sum can be rounded
    return best.indices.gather(1, place[:, None])[:, 0]


@torch.no_grad()
def sample(model: CausalGenerator, batch: dict, draws: Tensor, decoding: Decoding) -> Sampled:
    """N replies to each prompt of a batch (`chats.prompt_data`).

    draws: (B, N, T) uniform in [0, 1): a reply is a function of its prompt and its own draws. The control
    tokens that `CausalGenerator.generate` bans are never drawn, though they have their share of the
    probability. Raises `UserError` for a model that keeps no cache of keys and values.
    """
    lm, device = model.lm, batch["input_ids"].device
    count, most = draws.shape[1:]
    draws = draws.flatten(0, 1).to(device)  # (B * N, T)
    banned = torch.tensor(model.banned, device=device)
    cache = DynamicCache(config=lm.config)
    name = cache_name(lm)
    if name is None:
        raise UserError(
            f"{type(lm).__name__}: this model keeps no keys and values, so it cannot be sampled here"
        )
    cached = {name: cache}

    def read(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """(R, L) more tokens -> (R, V) logits of what follows the last of them."""
        with model.head_reads(lambda hidden: hidden[:, -1:]):
            found = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cached)
        return found.logits[:, -1].float()

    mask = batch["attention_mask"]  # (B, L)
    logits = read(batch["input_ids"], mask, (mask.cumsum(1) - 1).clamp(min=0))
    cache.batch_repeat_interleave(count)
    logits, mask = logits.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    position = mask.sum(1)  # (R,)
    going = torch.arange(len(draws), device=device)  # (R,) who they are
    ids = torch.full(draws.shape, pad_id(model.tokenizer), device=device)
    total, tokens = torch.zeros(len(draws), device=device), torch.zeros_like(going)
    for step in range(most):
        norm = logits.logsumexp(-1)
        chosen = choose(logits.index_fill_(1, banned, -torch.inf), draws[going, step], decoding)
        ids[going, step] = chosen
        total[going] += logits.gather(1, chosen[:, None])[:, 0] - norm
        tokens[going] += 1
        kept = (chosen != model.chat.end_id).nonzero()[:, 0]
        if step + 1 == most or not len(kept):
            break
        if len(kept) < len(going):
            cache.batch_select_indices(kept)
            going, chosen, mask, position = going[kept], chosen[kept], mask[kept], position[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = read(chosen[:, None], mask, position[:, None])
        position = position + 1
    return Sampled(ids[:, : int(tokens.max())], total / tokens, tokens)


def cache_name(lm) -> str | None:
    """What the model's forward calls its cache: `cache`, or `past_key_values` (transformers before 5.24);
    None where it keeps none."""
    for name in ("cache", "past_key_values"):
        if takes(lm, name):
            return name
    return None


def takes(lm, name: str) -> bool:
    """Whether the model's forward knows an argument."""
    return name in inspect.signature(getattr(lm, "get_base_model", lambda: lm)().forward).parameters
