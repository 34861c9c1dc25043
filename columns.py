"""Every column of the tables, once: what it is called, how it is computed, in which unit, by whose
definition, and which side of it is better.

The figures themselves are computed in measures.py, their intervals in intervals.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from intervals import Estimate
from options import DIMENSIONS

#: what a figure of a unit can be; one without such bounds stands with inf
BOUNDS = {
    "%": (0.0, 100.0),
    "0 to 1": (0.0, 1.0),
    "-1 to 1": (-1.0, 1.0),
    "levels": (-1.0, 2.0),
    "1": (1.0, math.inf),  # a perplexity
    **dict.fromkeys(("words", "levels squared", "weights"), (0.0, math.inf)),
}
#: the tables, in the order in which they are printed
GROUPS = {
    "paper": "The paper's columns",
    "overlap": "Overlap with the gold reply, on normalised text",
    "likelihood": "Likelihood of the gold reply",
    "diversity": "Diversity and copying",
    "stand-ins": "Stand-ins for relevance and fluency, and sentiment",
}


@dataclass(frozen=True)
class Column:
    """One column. `key`: its name in metrics.json and items.csv."""

    key: str
    title: str
    group: str
    formula: str
    unit: str
    source: str
    #: higher, lower, gold (the nearer to the gold replies' figure the better), or none (not ranked)
    better: str
    shape: str = "{:.2f}"
    per_item: bool = False  # has a value of its own for each item, which stands in items.csv
    main: bool = False  # stands in the compact table, too
    #: says what the replies are like as a whole; another item's gold replies are like that by construction
    of_the_whole: bool = False
    signed: bool = False  # shown with its signed distance from the gold replies' figure
    against_gold: bool = False  # compares a reply with the gold reply, which is perfect by construction

    def shown(self, value: float | None) -> str:
        """A value as the tables show it; nan and None are `-`."""
        return "-" if value is None or value != value else self.shape.format(value)

    def interval(self, estimate: Estimate) -> tuple[float, float] | None:
        """Its 95 % interval, within what such a figure can be: Student's t of two runs knows no bounds."""
        span = estimate.interval()
        least, most = BOUNDS[self.unit]
        return span and (max(span[0], least), min(span[1], most))

    def badness(self, value, gold):
        """What is smaller where a value is better; arrays of one shape, or plain values."""
        if self.better == "gold":
            return abs(value - gold)
        return -value if self.better == "higher" else value


NORMALISED = "on normalised words"
COLUMNS: tuple[Column, ...] = (
    Column(
        "parameters",
        "#params",
        "paper",
        "number of weights in the run's own file (of an adapter: without its base)",
        "weights",
        "the run's safetensors file",
        "none",
        "{:,.0f}",
        main=True,
    ),
    Column(
        "ppl_token",
        "PPL/token",
        "paper",
        "exp(sum of the gold replies' NLL / sum of model tokens); not comparable between tokenizers",
        "1",
        "paper, section V",
        "lower",
        per_item=True,
        main=True,
    ),
    Column(
        "bleu_1",
        "BLEU-1 raw",
        "paper",
        "corpus BLEU, 1-grams, raw strings split at white space, case kept: not comparable between "
        "systems that write case, marks or contractions otherwise",
        "%",
        "paper, section V; sacrebleu, tokenize none",
        "higher",
        per_item=True,
        against_gold=True,
        main=True,
    ),
    Column(
        "distinct_1",
        "Distinct-1 %",
        "paper",
        "distinct 1-grams / all 1-grams of all replies (13a words, lower-cased); falls as replies are added, "
        "so it has no interval",
        "%",
        "Li et al. 2016, corpus level",
        "higher",
        main=True,
        of_the_whole=True,
    ),
    Column(
        "distinct_2",
        "Distinct-2 %",
        "paper",
        "the same for 2-grams",
        "%",
        "Li et al. 2016, corpus level",
        "higher",
        main=True,
        of_the_whole=True,
    ),
    *(
        Column(
            f"norm_bleu_{n}",
            f"BLEU-{n}",
            "overlap",
            f"corpus BLEU, up to {n}-grams, no smoothing, {NORMALISED}",
            "%",
            "Papineni et al. 2002; sacrebleu",
            "higher",
            per_item=True,
            against_gold=True,
            main=n == 4,
        )
        for n in (1, 2, 3, 4)
    ),
    Column(
        "rouge_l",
        "ROUGE-L",
        "overlap",
        f"mean over items of the F1 of the longest common subsequence, {NORMALISED}, no stemming",
        "%",
        "Lin 2004; rouge-score",
        "higher",
        per_item=True,
        against_gold=True,
        main=True,
    ),
    Column(
        "bertscore",
        "BERTScore F1",
        "overlap",
        "mean over items of BERTScore's F1, no rescaling, no idf; an empty reply counts 0; small models "
        "hardly tell replies apart: read it beside another item's gold",
        "%",
        "Zhang et al. 2020; bert-score with --bertscore-model",
        "higher",
        per_item=True,
        against_gold=True,
    ),
    Column(
        "ppl_word",
        "PPL/word",
        "likelihood",
        "exp(sum of the gold replies' NLL / sum of words and one end a reply); 13a words, the same unit for "
        "every model",
        "1",
        "likelihood.csv of the run",
        "lower",
        per_item=True,
        main=True,
    ),
    Column(
        "ppl_word_open",
        "PPL/word without ends",
        "likelihood",
        "exp((sum of the gold replies' NLL - that of their ends) / sum of words); 13a words",
        "1",
        "likelihood.csv of the run",
        "lower",
        per_item=True,
    ),
    Column(
        "ppl_word_class",
        "PPL/word, unknown charged",
        "likelihood",
        "exp((sum of the gold replies' NLL + log C for each unknown token) / sum of words and one end a "
        "reply); 13a words; C: the distinct words of the training replies that the model does not know, each "
        "taken for as likely; `-` where there are none and a gold reply has an unknown one",
        "1",
        "likelihood.csv of the run",
        "lower",
        per_item=True,
    ),
    *(
        Column(
            f"distinct_{n}_{kind}",
            f"Distinct-{n} % of {{{kind}:,}} {kind}",
            "diversity",
            f"distinct {n}-grams / all {n}-grams in a random draw of that many {kind}, mean over draws; "
            f"{NORMALISED}",
            "%",
            "Li et al. 2016, at a fixed size",
            "gold",
            main=kind == "items",
            of_the_whole=True,
        )
        for kind in ("items", "tokens")
        for n in (1, 2)
    ),
    Column(
        "length",
        "words",
        "diversity",
        "mean number of normalised words of a reply, marks among them",
        "words",
        "here",
        "gold",
        "{:.1f}",
        per_item=True,
        main=True,
        of_the_whole=True,
    ),
    Column(
        "most_frequent",
        "most frequent %",
        "diversity",
        "share of the items whose reply is the system's most frequent one (normalised)",
        "%",
        "here",
        "gold",
        of_the_whole=True,
    ),
    Column(
        "verbatim_training",
        "verbatim training %",
        "diversity",
        "share of the replies that are, normalised, a listener's turn of the training dialogues",
        "%",
        "here",
        "gold",
        of_the_whole=True,
        per_item=True,
    ),
    Column(
        "verbatim_exemplar",
        "verbatim exemplar %",
        "diversity",
        "share of the replies that are, normalised, one of the exemplars found for their item: of a run in "
        "its own file of exemplars (none for a run without), of other replies in that of the table",
        "%",
        "here",
        "lower",
        per_item=True,
    ),
    Column(
        "words_exemplar",
        "words from exemplars %",
        "diversity",
        "share of the replies' normalised words that stand in four in a row that an exemplar found for their "
        "item has, too; the gold row says how many do so without having read any",
        "%",
        "fragment coverage, Grusky et al. 2018; exemplars as of the column before",
        "none",
        per_item=True,
    ),
    Column(
        "vader",
        "VADER",
        "stand-ins",
        "mean compound sentiment of the replies by VADER itself, from -1 to 1",
        "-1 to 1",
        "Hutto and Gilbert 2014; vaderSentiment",
        "gold",
        "{:.3f}",
        per_item=True,
        main=True,
        of_the_whole=True,
        signed=True,
    ),
    Column(
        "cosine_last_turn",
        "relevance stand-in",
        "stand-ins",
        "mean cosine of reply and last turn before it, all-MiniLM-L6-v2, mean pooling; a stand-in, high for "
        "a reply that only repeats the turn",
        "-1 to 1",
        "here; --relevance",
        "gold",
        "{:.3f}",
        per_item=True,
    ),
    Column(
        "fluency_ppl",
        "fluency stand-in",
        "stand-ins",
        "perplexity per normalised word of the replies alone, under --fluency-model; a stand-in, low for a "
        "dull reply",
        "1",
        "here; --fluency-model",
        "gold",
        of_the_whole=True,
        per_item=True,
    ),
)


def judge_columns(judge: str, dimensions: Sequence[str]) -> tuple[Column, ...]:
    """The columns of one judge of empathy; `judge` is its name, and their group."""
    group, found = f"judge {judge}", []
    # its classifier weights both classes alike (judges.py)
    balanced = " (as if half of all replies did)" * judge.startswith("tfidf")
    for dim in dimensions:
        name = DIMENSIONS[dim].name if dim in DIMENSIONS else dim
        found += [
            Column(
                f"{judge}_{dim}_level",
                f"{dim} level",
                group,
                f"mean probability that a reply reaches level 1 of {name}, over all samples of a context "
                f"where there are several{balanced}; beside it the signed gap to the gold replies'",
                "0 to 1",
                "Sharma et al. 2020, the judge's view",
                "gold",
                "{:.3f}",
                per_item=True,
                of_the_whole=True,
                signed=True,
            ),
            Column(
                f"{judge}_{dim}_f1",
                f"{dim} macro-F1",
                group,
                "macro-F1, over the answers that occur, of whether the reply reaches level 1 against whether "
                "the gold reply does (probability of .5 or more), as this judge sees both; cannot tell a "
                "perfect sampler from another item's gold",
                "%",
                "here",
                "higher",
                "{:.1f}",
            ),
            Column(
                f"{judge}_{dim}_kappa",
                f"{dim} kappa",
                group,
                "Cohen's kappa of the same two answers",
                "-1 to 1",
                "Cohen 1960",
                "higher",
                "{:.3f}",
            ),
        ]
    found.append(
        Column(
            f"{judge}_diff_epitome",
            "diff-EPITOME",
            group,
            "sum over the dimensions of the mean squared difference between the reply's level and the gold "
            "reply's, both 0, or 1 for 1 and above: smaller than published figures, which know level 2; a "
            "constant beats most systems, so it ranks nobody by itself",
            "levels squared",
            "Lee et al. 2022",
            "lower",
            "{:.3f}",
            per_item=True,
            against_gold=True,
        )
    )
    for dim in dimensions:
        found.append(
            Column(
                f"{judge}_{dim}_context_auc",
                f"{dim} context AUC",
                group,
                "area under the ROC curve of the mean judged level over a context's samples, against the "
                "gold reply's level reaching .5; only where a system gives several replies to a context",
                "0 to 1",
                "here",
                "higher",
                "{:.3f}",
            )
        )
    return tuple(found)


def critic_columns(kinds: Sequence[str]) -> tuple[Column, ...]:
    """The scores of the training critics (--family)."""
    return tuple(
        Column(
            f"critic_{kind}",
            f"{kind} (critic)",
            "training critics",
            "mean score of the critic that trains generators: expected level, or sentiment from -1 to 1; a "
            "run that had it as a loss can have learnt to please it",
            "levels",
            "paper, section III",
            "gold",
            "{:.3f}",
            per_item=True,
            of_the_whole=True,
        )
        for kind in kinds
    )
