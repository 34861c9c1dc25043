"""Everything that is measured of one run's replies, once, on all items that it has: comparison.py takes any
subset of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import floors
import measures
import metrics
from answers import Turns
from comparison import Measured, Numbers, Row
from corpora import Example
from dataloaders import pad, plan_once
from intervals import Additive, Estimate, item_means, ratio
from judges import Judge, context_auc, context_predictor
from models import token_nll
from normalising import normalise
from options import UserError
from pretrained import positions
from session import Session


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp(NLL / units) of sums (..., 2)."""
    return np.exp(np.minimum(ratio(sums), 700))


def sample_means(
    judge: Judge, samples: Sequence[Sequence[str]], contexts: Sequence[Turns] | None = None
) -> dict[str, np.ndarray]:
    """{dim: (N,) the mean judged level of a context's samples}, given the turns before them, or by
    themselves."""
    texts = [text for row in samples for text in row]
    owners = np.repeat(np.arange(len(samples)), [len(row) for row in samples])
    counts = np.maximum(np.bincount(owners, minlength=len(samples)), 1)
    before = None if contexts is None else [contexts[n] for n in owners.tolist()]
    levels = judge.levels(texts, before)
    return {dim: np.bincount(owners, found, len(samples)) / counts for dim, found in levels.items()}


@dataclass(frozen=True)
class Extras:
    """What is measured only where it was asked for: models that take minutes, or have to be brought."""

    relevance: Any = None  # a retriever of MiniLM
    fluency: tuple[Any, Any] | None = None  # (causal language model, tokenizer)
    bertscore: Path | None = None


@dataclass
class Standard:
    """What every row is held against: the split's listener turns, and who judges."""

    examples: Sequence[Example]
    training: Sequence[Example]
    exemplars: Sequence[Sequence[str]] | None
    judges: Sequence[Judge]
    #: the training critics' scores of replies to these items
    critics: Callable[[Numbers, Sequence[str]], dict[str, np.ndarray]]
    session: Session
    extras: Extras = field(default_factory=Extras)
    #: of the bootstrap of context AUC; of all other figures `comparison.Comparison` draws
    resamples: int = 1000
    seed: int = 42

    def __post_init__(self):
        self.gold = [normalise(e.response) for e in self.examples]
        self.known = frozenset(normalise(t.response) for t in self.training)
        self.shown = normalised_sets(self.exemplars)
        self.vader = measures.Vader()
        self.turns: np.ndarray | None = None  # the last turns' vectors
        self.gold_levels: dict[str, dict[str, np.ndarray]] = {}  # {judge: {dim: (N,)}}
        histories = [e.history for e in self.examples]
        for judge in self.judges:
            self.gold_levels[judge.name] = judge.levels([e.response for e in self.examples], histories)

    # -------------------------------------------------------------------------------------------- one run

    def measure(
        self,
        name: str,
        replies: Sequence[str],
        numbers: Numbers,
        *,
        likelihoods: Mapping[int, Sequence[float]] | None = None,
        samples: Sequence[Sequence[str]] | None = None,
        parameters: float | None = None,
        shown: Sequence[frozenset[str]] | None = None,
    ) -> Measured:
        """`replies` to the examples `numbers`. `likelihoods`: see systems.System. `samples`: several
        replies to each. `shown`: the exemplars of each of the standard's examples, see `normalised_sets`."""
        plain = [normalise(reply) for reply in replies]
        gold = [self.gold[i] for i in numbers]
        found: dict[str, Additive] = {}
        raw = measures.bleu(replies, [self.examples[i].response for i in numbers], (1,))
        found["bleu_1"] = raw[1]
        for n, figure in measures.bleu(plain, gold, (1, 2, 3, 4)).items():
            found[f"norm_bleu_{n}"] = figure
        found["rouge_l"] = measures.rouge_l(plain, gold)
        found["length"] = item_means([len(reply.split()) for reply in plain])
        found["verbatim_training"] = measures.shares([reply in self.known for reply in plain])
        if shown is not None:
            hits = [reply in shown[i] for reply, i in zip(plain, numbers, strict=True)]
            found["verbatim_exemplar"] = measures.shares(hits)
            found["words_exemplar"] = measures.copied_words(plain, [shown[i] for i in numbers])
        found["vader"] = item_means(self.vader(replies, f"{name}: VADER"))
        found |= self.likelihoods(likelihoods or {}, numbers) | self.stand_ins(name, replies, plain, numbers)
        first: dict[str, np.ndarray] = {}
        for judge in self.judges:
            histories = [self.examples[i].history for i in numbers]
            found |= self.judged(judge.name, judge.levels(replies, histories), numbers)
            if samples is not None:  # how often a level is shown: of all of them, not of the first
                for dim, means in sample_means(judge, samples, histories).items():
                    key = f"{judge.name}_{dim}_level"
                    first[key] = found[key].items()
                    found[key] = item_means(means)
        for kind, values in self.critics(numbers, replies).items():
            found[f"critic_{kind}"] = item_means(values)
        constants = {} if parameters is None else {"parameters": float(parameters)}

        def of_the_set(places: np.ndarray) -> dict[str, Estimate]:
            some = [metrics.split_words(replies[place].lower()) for place in places]
            values = {f"distinct_{n}": Estimate(metrics.distinct_of(some, n)) for n in (1, 2)}
            if samples is not None:
                some_samples = [samples[place] for place in places]
                some_numbers = tuple(numbers[place] for place in places)
                for judge in self.judges:
                    values |= self.context_auc(judge, some_samples, some_numbers)
            return values

        return Measured(numbers, found, plain, constants, of_the_set, first)

    @staticmethod
    def likelihoods(known: Mapping[int, Sequence[float]], numbers: Numbers) -> dict[str, Additive]:
        """Perplexities, each where what it is made of (systems.LIKELIHOOD) is known of all gold replies."""
        if not numbers or any(n not in known for n in numbers):
            return {}
        nll, tokens, words, end, of_class = np.array([known[n] for n in numbers], dtype=float).T
        sums = {
            "ppl_token": (nll, tokens),
            "ppl_word": (nll, words),
            "ppl_word_open": (nll - end, words - 1),
            "ppl_word_class": (nll + of_class, words),
        }
        found = {key: np.stack(pair, axis=1) for key, pair in sums.items()}
        return {key: Additive(s, perplexity) for key, s in found.items() if np.isfinite(s).all()}

    def judged(self, judge: str, levels: dict[str, np.ndarray], numbers: Numbers) -> dict[str, Additive]:
        """One judge's columns, of its levels (n,) of the replies to `numbers`; a level is a probability."""
        found: dict[str, Additive] = {}
        whole, right = [], []
        for dim, mine in levels.items():
            gold = self.gold_levels[judge][dim][list(numbers)]
            found[f"{judge}_{dim}_level"] = item_means(mine)
            whole.append((mine >= 0.5).astype(float))
            right.append((gold >= 0.5).astype(float))
            for key, figure in measures.agreement(right[-1], whole[-1], 2).items():
                found[f"{judge}_{dim}_{key}"] = figure
        found[f"{judge}_diff_epitome"] = measures.diff_epitome(right, whole)
        return found

    def context_auc(
        self, judge: Judge, samples: Sequence[Sequence[str]], numbers: Numbers
    ) -> dict[str, Estimate]:
        """How well the mean judged level of a context's samples foretells the gold reply's.

        The samples are judged by themselves: a judge that reads the context foretells without any reply.
        """
        found: dict[str, Estimate] = {}
        for dim, means in sample_means(judge, samples).items():
            found |= self.foretold(judge.name, dim, means, numbers)
        return found

    def foretold(self, judge: str, dim: str, levels: np.ndarray, numbers: Numbers) -> dict[str, Estimate]:
        gold = self.gold_levels[judge][dim][list(numbers)]
        conversations = [self.examples[n].conv_id for n in numbers]
        return {
            f"{judge}_{dim}_context_auc": context_auc(levels, gold, conversations, self.resamples, self.seed)
        }

    def context_only(self, numbers: Numbers, encoder: str | None, cache: Path) -> list[Row]:
        """What each judge's gold level can be foretold without a reply: what context AUC is read beside."""
        held = [self.examples[i] for i in numbers]
        values: dict[str, Estimate] = {}
        for judge in self.judges:
            found = context_predictor(judge, self.training, held, self.session, cache, encoder)
            for dim, chances in found.items():
                values |= self.foretold(judge.name, dim, chances, numbers)
        return [
            Row("ceiling: context alone", "ceiling", [Measured(numbers, {}, [], of_the_set=lambda _: values)])
        ]

    def stand_ins(
        self, name: str, replies: Sequence[str], plain: Sequence[str], numbers: Numbers
    ) -> dict[str, Additive]:
        """The columns of `extras`."""
        found: dict[str, Additive] = {}
        if self.extras.bertscore:
            gold = [self.gold[i] for i in numbers]
            device = str(self.session.device)
            found["bertscore"] = measures.bertscore(plain, gold, self.extras.bertscore, device)
        if retriever := self.extras.relevance:
            if self.turns is None:
                turns = [e.history[-1] for e in self.examples]
                self.turns = retriever.encoders.embed("context", turns, self.session, "last turns")
            vectors = retriever.encoders.embed("context", list(replies), self.session, f"{name}: relevance")
            found["cosine_last_turn"] = measures.cosines(vectors, self.turns[list(numbers)])
        if self.extras.fluency:
            nll = text_nll(*self.extras.fluency, replies, self.session, f"{name}: fluency")
            words = np.array([len(reply.split()) for reply in plain], dtype=float)
            found["fluency_ppl"] = Additive(np.stack([nll * (words > 0), words], axis=1), perplexity)
        return found

    # ------------------------------------------------------------------------------------------- all rows

    def floors(self, numbers: Numbers, seed: int, nearest: Callable | None) -> list[Row]:
        """The replies of floors.py to the items `numbers`; another item's gold is one of theirs. With
        exemplars, each item's best one is a reply, too."""
        rows = []
        chosen = [self.examples[i] for i in numbers]
        found = floors.replies(chosen, self.training, seed, nearest)
        if self.exemplars is not None:
            found[floors.TOP_EXEMPLAR] = [next(iter(self.exemplars[i]), "") for i in numbers]
        for name, replies in found.items():
            rows.append(Row(name, "floor", [self.measure(name, replies, numbers, shown=self.shown)]))
        return rows

    def level_floors(self, numbers: Numbers) -> list[Row]:
        """Constants that know how the gold levels of the items `numbers` are spread, and nothing else."""
        parts: dict[str, dict[str, Additive]] = {}
        for judge, dimensions in self.gold_levels.items():
            each: dict[str, dict[str, np.ndarray]] = {}
            for dim, gold in dimensions.items():
                for name, levels in floors.levels((gold[list(numbers)] >= 0.5).astype(float)).items():
                    each.setdefault(name, {})[dim] = levels
            for name, of_dim in each.items():
                parts.setdefault(name, {}).update(self.of_constants(judge, name, of_dim, numbers))
        return [Row(name, "level floor", [Measured(numbers, part, [])]) for name, part in parts.items()]

    def of_constants(
        self, judge: str, name: str, levels: dict[str, np.ndarray], numbers: Numbers
    ) -> dict[str, Additive]:
        """A constant's columns. The mean of levels is none of them, so that it has no macro-F1 and no kappa,
        and no mean of probabilities, which the column of levels is."""
        if name != floors.MEAN_LEVEL:
            return self.judged(judge, levels, numbers)
        right = [(self.gold_levels[judge][d][list(numbers)] >= 0.5).astype(float) for d in levels]
        return {f"{judge}_diff_epitome": measures.diff_epitome(right, list(levels.values()))}


def normalised_sets(exemplars: Sequence[Sequence[str]] | None) -> list[frozenset[str]] | None:
    """The exemplars of each item as they are looked for in replies."""
    if exemplars is None:
        return None
    plain = {text: normalise(text) for text in {text for row in exemplars for text in row}}
    return [frozenset(plain[text] for text in row) for row in exemplars]


# ---------------------------------------------------------------------------------------------------- models


@torch.inference_mode()
def text_nll(model, tokenizer, texts: Sequence[str], session: Session, title: str) -> np.ndarray:
    """(N,) the summed negative log-likelihood of each text's tokens under a causal language model, in nats.

    A text is read after the model's begin (or end) token, by itself; each distinct one once.
    """
    model = model.to(session.device).eval()
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    distinct = list(dict.fromkeys(texts))
    tokens = tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
    rows = [np.array([begin, *row]) for row in tokens]
    longest, most = max(map(len, rows), default=0), positions(model)
    if most and longest > most:
        raise UserError(
            f"--fluency-model reads {most:,} tokens, and a text of {title} has {longest:,} with the token "
            "before it; give a model that reads more, or leave the flag out"
        )
    found = np.zeros(len(distinct))
    for group in tqdm(plan_once([len(r) for r in rows], 32), desc=title, disable=None, leave=False):
        ids, mask = session.move(pad([rows[i] for i in group], begin))  # (B, L)
        if ids.shape[1] == 1:
            continue
        with session.autocast():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        written = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        found[group] = token_nll(logits, written).sum(1).cpu()
    number = {text: n for n, text in enumerate(distinct)}
    return found[[number[text] for text in texts]]
