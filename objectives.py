"""What a generator minimises: the paper's eq. 14, its variants, and a loss on replies that it samples itself.

Knows models, critics and batches; reads no file of a corpus and parses no arguments.
Letters in shapes: B examples, T reply tokens, V words, M sampled replies, S samples of one context.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from critic_set import CriticSet
from critics import Critics, scores
from dataloaders import in_pieces
from models import Generator, soft_response, token_nll, until_end
from pretrained import decoded
from settings import GeneratorOptions, SampledOptions
from updates import Objective
from vocabulary import logits_nll, product_kind, read_replies

# ---------------------------------------------------------------------------------------- gradients, balanced


class _Balanced(torch.autograd.Function):
    """Copies of the logits, one for the nll and one a critic; backward, no critic's gradient is longer than
    `share` of the nll's."""

    @staticmethod
    def forward(ctx, logits: Tensor, share: float, critics: int):
        ctx.share = share
        return tuple(logits.view_as(logits) for _ in range(1 + critics))

    @staticmethod
    def backward(ctx, main: Tensor, *others: Tensor):
        most = ctx.share * main.float().norm()
        total = main
        for gradient in others:
            length = gradient.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
            total = total + gradient * (most / length).clamp(max=1).to(gradient.dtype)
        return total, None, None


def balanced(logits: Tensor, share: float, critics: int) -> tuple[Tensor, ...]:
    """`logits` (B, T, V), 1 + `critics` times. In the backward pass the gradient that reaches each of the
    others is cut to `share` of the length of the first one's (of this forward pass, weights included).

    Without it the critics can lead: at weight 1 the whole gradient is several times as long as the nll's,
    and clipping and Adam then follow them.
    """
    return _Balanced.apply(logits, share, critics)


def gradient_norms(model: nn.Module, objective: "ReplyObjective", batch: dict) -> dict[str, float]:
    """{grad_TERM: the length of the gradient that a term, at its full weight (whatever --critic-ramp has
    reached), would send to the model's weights by itself} on one batch; of the nll and the critics."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {}
    with torch.enable_grad():
        units, terms = objective.gold_units(batch), objective.losses(model, batch)
        for name in terms:
            weight = objective.weights[name]
            if not weight:
                continue
            loss = weight * terms[name].float() / (units[name] or 1)
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            found[f"grad_{name}"] = float(nn.utils.get_total_norm([g for g in gradients if g is not None]))
    return found


# -------------------------------------------------------------------------------------------- sampled replies


def advantages(rewards: Tensor) -> Tensor:
    """(B, S) rewards -> how much better each is than the mean of its context's other samples, (B, S)."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * samples / (samples - 1)


def energy_scores(levels: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """(..., S) levels of a context's samples and (...) of its gold reply -> (..., S) the samples' shares in
    minus the energy score, (..., S) what its policy gradient multiplies their log-probabilities by; S >= 3.

        share of i = mean |level_i - level_j| over the others j / 2 - |level_i - gold|
        worth of i = mean |level_i - level_j| over the others j     - |level_i - gold|

    The second is less the mean worth of the others among themselves, which i has no part in: the gradient is
    unbiased.
    """
    samples = levels.shape[-1]
    away = (levels - gold[..., None]).abs()  # (..., S)
    apart = (levels[..., None] - levels[..., None, :]).abs().sum(-1)  # (..., S, S) -> (..., S)
    spread = apart / (samples - 1)
    others = (apart.sum(-1, keepdim=True) - 2 * apart) / ((samples - 1) * (samples - 2))
    others = others - (away.sum(-1, keepdim=True) - away) / (samples - 1)
    return spread / 2 - away, spread - away - others


@dataclass(frozen=True)
class Rewards:
    """What written replies are worth: critics read plain text here, as in use, no mixture of words, and no
    gold reply before each word."""

    scorers: Critics
    contexts: Sequence[Sequence[str]]  # of each example, oldest turn first

    def levels(self, numbers: Sequence[int], replies: Sequence[str]) -> Tensor:
        """(C, M): where in its range, from 0 to 1, each critic sees each reply. `numbers` (M,): the examples
        that are replied to."""
        rows = []
        for kind, said in scores(self.scorers, replies, [self.contexts[n] for n in numbers]).items():
            low, high = self.scorers[kind].limits
            rows.append((np.array([s.value for s in said]) - low) / (high - low))
        return torch.from_numpy(np.stack(rows)).float()

    def of(self, numbers: Sequence[int], replies: Sequence[str], samples: int) -> tuple[Tensor, Tensor]:
        """(M,) what each reply is worth, (M,) its advantage; `samples` replies to each context, in a row."""
        raise NotImplementedError


@dataclass(frozen=True)
class Distance(Rewards):
    """Minus the distance to the labels of the gold reply, between -1 and 0, the mean over the critics.

    Worth most is, in every context, the level in the middle of those that people show there: what fewer
    than half of them show is unlearnt.
    """

    targets: Mapping[str, Sequence[float]]  # {critic: the label of each example's gold reply}

    def of(self, numbers: Sequence[int], replies: Sequence[str], samples: int) -> tuple[Tensor, Tensor]:
        wanted = []
        for kind, scorer in self.scorers.items():
            low, high = scorer.limits
            wanted.append([(self.targets[kind][n] - low) / (high - low) for n in numbers])
        reward = -(self.levels(numbers, replies) - torch.tensor(wanted)).abs().mean(0)  # (C, M) -> (M,)
        return reward, advantages(reward.view(-1, samples)).flatten()


@dataclass(frozen=True)
class EnergyScore(Rewards):
    """Minus the energy score, E|X - y| - E|X - X'| / 2, of the levels X of a context's samples against the
    critics' view y of the gold reply, the mean over the critics.

    A strictly proper scoring rule (Gneiting & Raftery 2007, section 4.3): it is least where the model's
    replies show each level as often as people's do in such a context.
    """

    golds: Sequence[str]  # the gold reply of each example

    def of(self, numbers: Sequence[int], replies: Sequence[str], samples: int) -> tuple[Tensor, Tensor]:
        asked = list(numbers[::samples])
        found = self.levels([*numbers, *asked], [*replies, *(self.golds[n] for n in asked)])
        gold = found[:, len(replies) :]  # (C, M / S)
        levels = found[:, : len(replies)].view(len(found), -1, samples)  # (C, M / S, S)
        reward, worth = energy_scores(levels, gold)  # (C, M / S, S)
        return reward.mean(0).flatten(), worth.mean(0).flatten()


@dataclass(frozen=True)
class Drawn:
    """Sampled replies: `batch` is the model's input with them as M targets, and under `suppressed` (K,) the
    ids that none of them could hold; a causal model's holds several such inputs, its `parts`."""

    batch: dict
    examples: list[int]  # (M,) the example that each replies to, S of one example in a row
    texts: list[str]


#: (model, batch, most examples, samples of each) -> some of the batch's examples replied to
Draw = Callable[[nn.Module, dict, int, int], Drawn]


class SampledReplies:
    """A loss on sampled replies: policy gradient with a context's other samples as baseline.

        loss = sum over replies of advantage * nll of the reply's tokens / replies

    The advantage of a reply is its reward less the mean of the others' (`EnergyScore` says what it is there).

    (REINFORCE with a leave-one-out baseline; Kool et al. 2019. EmpRL and EmPO train with PPO and DPO towards
    the same end.) Two terms: `sampled`, the loss above, and `reward`, which has weight 0 and is there for the
    log.
    """

    def __init__(self, rewards: Rewards, draw: Draw, options: SampledOptions):
        self.rewards, self.draw, self.options = rewards, draw, options
        self.weights = {"sampled": options.sampled_loss_w, "reward": 0.0}

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """The batch with replies that the model samples now, without dropout, and what they are worth."""
        options = self.options
        training = model.training
        drawn = self.draw(model.eval(), batch, options.sampled_examples, options.samples)
        model.train(training)
        reward, worth = self.rewards.of(drawn.examples, drawn.texts, options.samples)  # (M,), (M,)
        return batch | {"sampled": drawn.batch, "reward": reward, "advantage": worth}

    def units(self, batch: dict) -> dict[str, float]:
        return dict.fromkeys(self.weights, float(len(batch["reward"])))

    def terms(self, nll: Tensor, batch: dict) -> dict[str, Tensor]:
        """`nll` (M,) of the sampled replies under the model, with gradient."""
        return {"sampled": (batch["advantage"] * nll).sum(), "reward": batch["reward"].sum()}


def some(examples: int, most: int) -> Tensor:
    """Rows of a batch: at most `most` of them by chance (0: all)."""
    return torch.randperm(examples)[: most or None].sort().values


#: what of a batch a generator reads: once an example, and once a batch
OF_AN_EXAMPLE = {"source_ids", "source_mask", "speaker_ids", "exemplar_vectors", "exemplar_share"}
OF_A_BATCH = {"exemplar_ids", "exemplar_mask"}


def rows_of(batch: dict, rows: Tensor) -> dict:
    """What a generator reads for some rows of a batch, with the exemplars of these alone."""
    part = {k: batch[k][rows] for k in OF_AN_EXAMPLE & batch.keys()}
    if "exemplar_share" in part:
        used = part["exemplar_share"].any(0)  # (U,)
        used[0] |= ~used.any()  # an encoder reads one text at least
        order, pieces = in_pieces(batch["exemplar_mask"][used].sum(1).tolist())
        places = used.nonzero()[:, 0][order]
        part |= {k: batch[k][places] for k in OF_A_BATCH} | {"exemplar_pieces": pieces}
        part["exemplar_share"] = part["exemplar_share"][:, places]
    return part


def draw_replies(tokenizer, arguments: dict, device: torch.device) -> Draw:
    """A T5's `Draw`; `arguments`: of `generate`."""

    def draw(model: nn.Module, batch: dict, most: int, samples: int) -> Drawn:
        assert isinstance(model, Generator)
        rows = some(len(batch["labels"]), most)
        part = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rows_of(batch, rows).items()}
        # (M, T), after the decoder's start
        out = model.generate(part, num_return_sequences=samples, **arguments)[:, 1:]
        mask = until_end(out == tokenizer.eos_token_id)
        part |= {"labels": out.masked_fill(~mask, -100), "reply_mask": mask.long()}
        part["suppressed"] = torch.tensor(arguments.get("suppress_tokens", []), dtype=torch.long)
        numbers = [batch["numbers"][r] for r in rows.tolist() for _ in range(samples)]
        return Drawn(part, numbers, decoded(tokenizer, out))

    return draw


def drawn_nll(logits: Tensor, drawn: Tensor, suppressed: Tensor, options: SampledOptions) -> Tensor:
    """(N, V), (N,) -> the negative log-likelihood of each token `drawn`, (N,), under what it was drawn from:
    without the tokens `suppressed` (K,), at the draw's temperature, among its `top_k` likeliest (0: all).

    A drawn token is one of these, though rounding or dropout moved it below the last of them. Of tokens that
    are equal at the last rank transformers draws among all, which is not followed: .001 nats a token in bf16.
    """
    top_k = options.sampled_top_k
    if not 0 < top_k < logits.shape[-1]:
        return logits_nll(logits.index_fill(-1, suppressed, -torch.inf) / options.sampled_temperature, drawn)
    best = logits.detach().index_fill(-1, suppressed, -torch.inf).topk(top_k)  # (N, top_k)
    others = logits.gather(1, best.indices).masked_fill(
        (best.indices == drawn[:, None]) | best.values.isneginf(), -torch.inf
    )
    choice = torch.cat([logits.gather(1, drawn[:, None]), others], dim=1).float()  # (N, 1 + top_k)
    return -(choice / options.sampled_temperature).log_softmax(-1)[:, 0]


def sampled_nll(model: nn.Module, sampled: dict, options: SampledOptions) -> Tensor:
    """(M,) of sampled replies, with gradient, under the distribution that they were drawn from."""
    written = sampled["labels"] != -100  # (M, T)
    drawn = sampled["labels"][written]  # (N,): no words are compared where none was written

    def read(hidden: Tensor, head: Tensor) -> Tensor:
        # (M, T, D) -> (N, D); (N, D) @ (D, V) -> (N, V)
        return drawn_nll(F.linear(hidden[written], head), drawn, sampled["suppressed"], options)

    nll = model(sampled, read)  # (N,)
    return nll.new_zeros(written.shape).masked_scatter(written, nll).sum(1)


# ------------------------------------------------------------------------------------------------- objectives


class ReplyObjective(Objective):
    """What a generator of any family is trained on: `losses` of the gold replies and, where `sampled` is
    there, the loss on replies that the model samples."""

    def __init__(self, weights: dict[str, float], sampled: SampledReplies | None):
        #: the terms that an evaluation measures: nothing is sampled in one
        self.measured = list(weights)
        self.sampled, self.weights = sampled, weights | (sampled.weights if sampled else {})

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        batch = self.foresee(batch)
        return self.sampled.prepare(model, batch) if self.sampled else batch

    def units(self, batch: dict) -> dict[str, float]:
        drawn = self.sampled.units(batch) if self.sampled and "sampled" in batch else {}
        return self.gold_units(batch) | drawn

    def terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        terms = self.gold_terms(model, batch)
        if self.sampled and "sampled" in batch:
            nll = self.sampled_nll(model, batch["sampled"], self.sampled.options)
            terms |= self.sampled.terms(nll, batch)
        return terms

    def gold_units(self, batch: dict) -> dict[str, float]:
        """How many units each of `losses` sums over."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """The sums of the `measured` terms, with gradient: what an evaluation reads, and no draw."""
        raise NotImplementedError

    def gold_terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """The same as an update minimises them."""
        return self.losses(model, batch)

    def sampled_nll(self, model: nn.Module, sampled: dict, options: SampledOptions) -> Tensor:
        """(M,) of sampled replies, with gradient, under the distribution that they were drawn from."""
        raise NotImplementedError


class GeneratorObjective(ReplyObjective):
    """The paper's eq. 14, every term over its own unit:

        loss = main_w * nll + empathy_w * (emo + exp + int) + sentiment_w * sentiment

    nll: negative log-likelihood of the gold reply, over its tokens. The others, over examples: the frozen
    critics' cross-entropy (sentiment: squared error) on the soft reply against the labels of the gold reply;
    with soft targets, the divergence from the critic's own view of the gold reply. `--critic-ramp` and
    `--balance` hold the critics back; `sampled` adds a loss on sampled replies.
    """

    def __init__(self, critics: CriticSet, options: GeneratorOptions, sampled: SampledReplies | None = None):
        super().__init__({term: options.weight(term) for term in ("nll", *critics.critics)}, sampled)
        self.critics, self.options = critics, options

    def others(self) -> list[nn.Module]:
        return list(self.critics.critics.values())

    def weights_at(self, step: int) -> dict[str, float]:
        if not self.options.critic_ramp:
            return self.weights
        share = min(1.0, (step + 1) / self.options.critic_ramp)
        return {k: w * share if k in self.critics.critics else w for k, w in self.weights.items()}

    def foresee(self, batch: dict) -> dict:
        return batch | {"cut": self.critics.cut(batch)} if self.critics else batch

    def gold_units(self, batch: dict) -> dict[str, float]:
        examples = dict.fromkeys(self.measured, float(len(batch["labels"])))
        return examples | {"nll": float(batch["reply_mask"].sum())}

    def gold_terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        return self.losses(model, batch, self.options.strategy, self.options.balance)

    def sampled_nll(self, model: nn.Module, sampled: dict, options: SampledOptions) -> Tensor:
        return sampled_nll(model, sampled, options)

    def losses(
        self, model: nn.Module, batch: dict, strategy: int = 0, balance: float = 0.0
    ) -> dict[str, Tensor]:
        kinds = list(self.critics.critics)
        views = None
        if kinds and self.options.critic_targets == "soft":
            views = self.critics.views(batch)
        if not kinds or not strategy and not balance:
            return self._at_once(model, batch, views)
        logits = model(batch)  # (B, T, V)
        if not balance:
            # a soft reply is as large as the logits: made once for all critics
            soft = soft_response(logits, strategy)
            critics = self.critics.losses(soft, batch, views)
            return {"nll": token_nll(logits, batch["labels"]).sum(), **critics}
        main, *copies = balanced(logits, balance, len(kinds))
        terms = {"nll": token_nll(main, batch["labels"]).sum()}
        for kind, copy in zip(kinds, copies, strict=True):
            soft = soft_response(copy, strategy)
            terms[kind] = self.critics.loss(kind, soft, batch, views)
        return terms

    def _at_once(self, model: nn.Module, batch: dict, views: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """nll and critics of one softmax, of which no second copy is held."""
        critics = self.critics

        def read(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor | None]:
            table = critics.table(product_kind(hidden)) if critics else None
            return read_replies(hidden, head, batch["labels"], table, batch.get("reply_places"))

        nll, words = model(batch, read)
        terms = {"nll": nll.sum()}
        return terms | (critics.losses_of_words(words, batch, views) if critics else {})
