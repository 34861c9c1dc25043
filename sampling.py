"""Many replies to each prompt by a causal language model: the prompt is read once for all of them, each
token's log-probability is kept while it is drawn, and a reply that has ended leaves the batch.

transformers' `generate` reads the prompt once for each reply, carries ended ones along, and sorts the whole
vocabulary for top-p.
Letters in shapes: B prompts, L tokens, N replies to each prompt, T new tokens, R replies not yet ended,
V words, K words to choose among.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from causal_models import CausalGenerator
from chats import pad_id
from options import UserError
from settings import Decoding
from vocabulary import logits_nll


@dataclass(frozen=True)
class Sampled:
    """Replies to prompts, those to one prompt side by side."""

    ids: Tensor  # (B * N, T), ended by the end token where it ended, padded
    log_probability: Tensor  # (B * N,) mean over its tokens, its end included, in nats, of the plain model
    tokens: Tensor  # (B * N,) how many those are
    nll: Tensor | None = None  # (G,) of the tokens of `gold`, in nats


def choose(logits: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """(R, V), (R,) uniform in [0, 1) -> the words drawn, (R,), out of the `top_k` likeliest (0: all).

    top_p, within these: the fewest whose probabilities together reach it.
    """
    words = logits.shape[1]
    best = logits.topk(min(decoding.top_k or words, words))  # (R, K), likeliest first
    chance = (best.values / decoding.temperature).softmax(-1)
    if decoding.top_p < 1:
        before = running_sum(chance) - chance
        chance = chance.masked_fill(before >= decoding.top_p, 0)
    reached = running_sum(chance)
    place = (reached <= draws[:, None] * reached[:, -1:]).sum(-1)  # (R,)
    place = place.minimum((chance > 0).sum(-1) - 1)  # a sum can be rounded
    return best.indices.gather(1, place[:, None])[:, 0]


def running_sum(chance: Tensor) -> Tensor:
    """Over the last dimension; on a GPU torch has no deterministic one."""
    if chance.is_cuda and torch.are_deterministic_algorithms_enabled():
        return chance.cpu().cumsum(-1).to(chance.device)
    return chance.cumsum(-1)


@torch.no_grad()
def sample(
    model: CausalGenerator, batch: dict, draws: Tensor, decoding: Decoding, gold: Tensor | None = None
) -> Sampled:
    """N replies to each prompt of a batch (`chats.prompt_data`).

    draws: (B, N, T) uniform in [0, 1): a reply is a function of its prompt and its own draws. The control
    tokens that `CausalGenerator.generate` bans are never drawn, though they have their share of the
    probability. A model whose cache cannot be split (recurrent or convolutional layers) reads the prompt once
    a reply. gold: (B, T) another reply to each prompt, padded with -1, whose G tokens' likelihood is found on
    the way, of a model whose cache can be cut (`side_by_side`). Raises `UserError` for a model that keeps no
    cache of keys and values.
    """
    lm, device = model.lm, batch["input_ids"].device
    count, most = draws.shape[1:]
    draws = draws.flatten(0, 1).to(device)  # (B * N, T)
    banned = torch.tensor(model.banned, dtype=torch.long, device=device)
    cache = DynamicCache(config=lm.config)
    name = cache_name(lm)
    if name is None:
        raise UserError(
            f"{type(lm).__name__}: this model keeps no keys and values, so it cannot be sampled here"
        )
    cached = {name: cache}

    def read(ids: Tensor, mask: Tensor, positions: Tensor, asked: Callable[[Tensor], Tensor]) -> Tensor:
        """(R, L) more tokens -> logits of what follows those that `asked` takes out of (R, L, D)."""
        with model.head_reads(asked):
            found = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cached)
        return found.logits

    def last(hidden: Tensor) -> Tensor:
        return hidden[:, -1:]

    splits = all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers)
    prompts, mask = batch["input_ids"], batch["attention_mask"]  # (B, L)
    if not splits:
        prompts, mask = prompts.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    logits = read(prompts, mask, (mask.cumsum(1) - 1).clamp(min=0), last)[:, -1].float()  # (R, V)
    nll = None
    if gold is not None:
        nll = followed(read, mask, logits, gold.to(device))
        if gold.shape[1] > 1:  # 0 means all of it to older releases
            cache.crop(1 - gold.shape[1])
    if splits:
        cache.batch_repeat_interleave(count)
        logits, mask = logits.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    position = mask.sum(1)  # (R,)
    going = torch.arange(len(draws), device=device)  # (R,) who they are
    writing = torch.ones_like(going)  # (R,) 0: it has ended, and could not leave
    ids = torch.full(draws.shape, pad_id(model.tokenizer), device=device)
    total, tokens = torch.zeros(len(draws), device=device), torch.zeros_like(going)
    for step in range(most):
        norm = logits.logsumexp(-1)
        chosen = choose(logits.index_fill_(1, banned, -torch.inf), draws[going, step], decoding)
        ids[going, step] = torch.where(writing > 0, chosen, ids[going, step])
        total[going] += writing * (logits.gather(1, chosen[:, None])[:, 0] - norm)
        tokens[going] += writing
        writing = writing * (chosen != model.chat.end_id)
        kept = writing.nonzero()[:, 0]
        if step + 1 == most or not len(kept):
            break
        if splits and len(kept) < len(going):
            cache.batch_select_indices(kept)
            going, chosen, mask, position = going[kept], chosen[kept], mask[kept], position[kept]
            writing = writing[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = read(chosen[:, None], mask, position[:, None], last)[:, -1].float()
        position = position + 1
    return Sampled(ids[:, : int(tokens.max())], total / tokens, tokens, nll)


def followed(read: Callable[..., Tensor], mask: Tensor, logits: Tensor, gold: Tensor) -> Tensor:
    """(G,) nll of the tokens of `gold` (B, T), row after row, which `read` is given behind the prompts.
    `mask` (B, L) and `logits` (B, V): the prompts', and what follows them."""
    written = gold >= 0  # (B, T)
    found = torch.zeros(gold.shape, device=gold.device)
    found[:, 0] = logits_nll(logits, gold[:, 0])
    if gold.shape[1] > 1:
        behind = written[:, 1:]
        known = torch.cat([mask, written[:, :-1].long()], dim=1)  # (B, L + T - 1)
        places = mask.sum(1, keepdim=True) + torch.arange(behind.shape[1], device=gold.device)
        # (B, T - 1, D) -> (1, G - B, D)
        after = read(gold[:, :-1].clamp(min=0), known, places, lambda hidden: hidden[behind][None])
        found[:, 1:][behind] = logits_nll(after[0], gold[:, 1:][behind])
    return found[written]


def cache_name(lm) -> str | None:
    """What the model's forward calls its cache: `cache`, or `past_key_values` (transformers before 5.24);
    None where it keeps none."""
    return next((name for name in ("cache", "past_key_values") if takes(lm, name)), None)


def side_by_side(lm) -> bool:
    """Whether replies can be read behind one prompt in one sequence, each at its own positions and blind to
    the others: not where layers look back a fixed way, or remember, or add a bias by distance."""
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.config).layers)
    return full and takes(lm, "position_ids") and not getattr(lm.config, "alibi", False)


def takes(lm, name: str) -> bool:
    """Whether the model's forward knows an argument."""
    return name in inspect.signature(getattr(lm, "get_base_model", lambda: lm)().forward).parameters
