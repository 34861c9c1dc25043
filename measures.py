"""The figures of replies, each as sums over items (intervals.Additive), so that any resample and any subset
of items is had without reading the replies again. What each is called and means stands in columns.py.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mode

import numpy as np
from sacrebleu.metrics import BLEU
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from intervals import Additive, item_means, ratio
from options import APOSTROPHES, UserError

# ---------------------------------------------------------------------------------------------------- overlap


def bleu(replies: Sequence[str], references: Sequence[str], orders: Sequence[int]) -> dict[int, Additive]:
    """Corpus BLEU in percent, up to n-grams for each n of `orders`, strings split at white space.

    Their sums are sacreBLEU's sentence statistics: matches and totals of the n-grams, both lengths; sacreBLEU
    itself counts those of the gold replies again for every system.
    """
    most = max(orders)
    statistics = np.zeros((len(replies), 2 * most + 2))
    for row, reply, reference in zip(statistics, replies, references, strict=True):
        wanted = grams_of_gold(reference, most)
        for gram, count in counted_grams(reply, most).items():
            row[len(gram) - 1] += min(count, wanted[gram])
            row[most + len(gram) - 1] += count
        row[-2:] = len(reply.split()), len(reference.split())
    return {n: Additive(statistics, functools.partial(bleu_of_sums, order=n)) for n in orders}


@functools.lru_cache(maxsize=2**14)  # many systems are held against one gold reply
def grams_of_gold(text: str, most: int) -> Counter[tuple[str, ...]]:
    return counted_grams(text, most)


def counted_grams(text: str, most: int) -> Counter[tuple[str, ...]]:
    """How often each 1- to `most`-gram stands in a text."""
    words = text.split()
    spans = ((start, start + n) for n in range(1, most + 1) for start in range(len(words) - n + 1))
    return Counter(tuple(words[start:end]) for start, end in spans)


def signature() -> str:
    """How sacreBLEU names this BLEU."""
    whole = BLEU(tokenize="none", smooth_method="none", force=True)
    whole.corpus_score(["a"], [["a"]])  # it says nothing before it has seen references
    return str(whole.get_signature())


def bleu_of_sums(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU (Papineni et al. 2002) of summed statistics, see `bleu`; 0 where an order has no match. The mean
    of logarithms is sacreBLEU's "none" smoothing."""
    most = sums.shape[-1] // 2 - 1
    matches, totals = sums[..., :order], sums[..., most : most + order]
    said, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(matches / totals).mean(-1)
        penalty = np.minimum(0.0, 1 - wanted / said)
        score = 100 * np.exp(precision + penalty)
    return np.nan_to_num(score, nan=0.0)


def rouge_l(replies: Sequence[str], references: Sequence[str]) -> Additive:
    """Mean F1 of the longest common subsequence, in percent, strings split at white space (rouge-score's
    rougeL, whose table of all pairs of words takes longer than all other columns)."""
    found = []
    for reply, reference in zip(replies, references, strict=True):
        said, wanted = reply.split(), reference.split()
        both = len(said) + len(wanted)
        found.append(200 * common_words(said, wanted) / both if said and wanted else 0.0)
    return item_means(found)


def common_words(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit for each place of `one` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for n, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << n
    whole = left = (1 << len(one)) - 1
    for word in other:
        hits = left & places.get(word, 0)
        left = ((left + hits) | (left - hits)) & whole
    return len(one) - left.bit_count()


def require_length(model: Path) -> None:
    """Refuse a model for BERTScore that does not say how long its texts may be: bert-score would overflow."""
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(model).model_max_length > 1_000_000:
        raise UserError(
            f"--bertscore-model {model}: its tokenizer_config.json has no model_max_length; write the number "
            'of tokens that the model can read there ("model_max_length": 512)'
        )


def bertscore(replies: Sequence[str], references: Sequence[str], model: Path, device: str) -> Additive:
    """Mean BERTScore F1 in percent under the last layer of the model in a folder; an empty side counts 0."""
    import bert_score
    from transformers import AutoConfig

    require_length(model)
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    values = np.zeros(len(replies))
    pairs = zip(replies, references, strict=True)
    said = [n for n, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    if said:
        found = bert_score.score(
            [replies[n] for n in said],
            [references[n] for n in said],
            model_type=str(model),
            num_layers=layers,
            device=device,
        )
        values[said] = 100 * found[2].numpy()
    return item_means(values)


# -------------------------------------------------------------------------------------- diversity and copying


def shares(hits: Sequence[bool]) -> Additive:
    """In percent."""
    return item_means(100 * np.asarray(hits, dtype=float))


def most_frequent(replies: Sequence[str]) -> Additive:
    """Share of the most frequent reply, in percent."""
    if not replies:
        return shares([])
    usual = mode(replies)
    return shares([reply == usual for reply in replies])


#: so many words in a row that stand in an exemplar too come from it; fewer are anybody's
COPIED = 4


def runs_of_words(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + COPIED]) for i in range(len(words) - COPIED + 1)}


def copied_words(replies: Sequence[str], shown: Sequence[Iterable[str]]) -> Additive:
    """Share of all words, in percent, that stand in `COPIED` words in a row of an exemplar of their item
    (fragment coverage: Grusky et al. 2018). `shown`: the exemplars of each reply."""
    rows = []
    for reply, exemplars in zip(replies, shown, strict=True):
        words = reply.split()
        copied: set[int] = set()
        known = set().union(*(runs_of_words(text.split()) for text in exemplars))
        for i in range(len(words) - COPIED + 1):
            if tuple(words[i : i + COPIED]) in known:
                copied.update(range(i, i + COPIED))
        rows.append([100.0 * len(copied), float(len(words))])
    return Additive(np.array(rows).reshape(-1, 2), ratio)


# ----------------------------------------------------------------------------------------------------- levels


def agreement(gold: np.ndarray, levels: np.ndarray, kinds: int) -> dict[str, Additive]:
    """Macro-F1 in percent and Cohen's kappa of whole levels (N,) from 0 to `kinds` - 1."""
    cells = np.eye(kinds * kinds)[gold.astype(int) * kinds + levels.astype(int)]  # (N, kinds^2), one hot
    return {"f1": Additive(cells, macro_f1), "kappa": Additive(cells, kappa)}


def squares(sums: np.ndarray) -> np.ndarray:
    """(..., kinds^2) -> (..., gold level, the reply's level)"""
    kinds = round(sums.shape[-1] ** 0.5)
    return sums.reshape(*sums.shape[:-1], kinds, kinds)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Over the levels that occur on either side."""
    table = squares(sums)
    hits, both = np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1) + table.sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.nanmean(np.where(both > 0, 2 * hits / both, np.nan), axis=-1)


def kappa(sums: np.ndarray) -> np.ndarray:
    """nan where both sides always have one and the same level."""
    table = squares(sums)
    total = table.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        agreed = np.trace(table, axis1=-2, axis2=-1) / total
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return (agreed - chance) / (1 - chance)


def diff_epitome(gold: Sequence[np.ndarray], levels: Sequence[np.ndarray]) -> Additive:
    """The sum over dimensions of the mean squared difference of levels (N,) (Lee et al. 2022)."""
    return item_means(sum((mine - right) ** 2 for right, mine in zip(gold, levels, strict=True)))


# --------------------------------------------------------------------------------------- sentiment, stand-ins


class Vader:
    """VADER's compound sentiment in [-1, 1], each text once."""

    def __init__(self):
        self.analyser, self.known = SentimentIntensityAnalyzer(), {}

    def __call__(self, texts: Sequence[str], title: str) -> list[float]:
        for text in tqdm(set(texts) - self.known.keys(), desc=title, disable=None, leave=False):
            self.known[text] = self.analyser.polarity_scores(text.translate(APOSTROPHES))["compound"]
        return [self.known[text] for text in texts]


def cosines(one: np.ndarray, other: np.ndarray) -> Additive:
    """Mean cosine of (N, E) with (N, E)."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return item_means((one * other).sum(1) / np.maximum(lengths, 1e-12))
