"""Judges: critics that served no loss, asked how likely a reply shows each dimension; and what they are worth
themselves.

A judge's level of a reply is the probability that it reaches level 1 of a dimension (Sharma et al. 2020), in
the eyes of that judge (of TF-IDF as if half of all replies did: its classes weigh the same). A system's is
to be read beside the gold replies', by the same judge. Two judges that disagree, or that a meaningless text
pleases, are worth little: `report` says so in lines for a table's foot.
Knows nothing of generators.
"""

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sklearn
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

import advice
import caches
import lineage
import metrics
import storage
from answers import Answers, Ask, Turns, Valued
from corpora import Example, choose_pairs, read_pairs
from critics import Critic, Critics, critic_scores, open_critics, result_of, wholes
from dataloaders import Data, critic_data
from DPR.biencoder import embed, load_side, resolve
from intervals import Estimate, resamples
from options import DIMENSIONS, JOINT, Paths, UserError
from pretrained import load_tokenizer
from session import Session

#: the judges of a table where none are named: another backbone than any critic that can serve as a loss, and
#: no neural network at all
DEFAULT = ("minilm", "tfidf")
#: the judges without a network, and the half of the seeker posts that each learns from
WORDS = {"tfidf": lineage.ALL, "tfidf-a": "a", "tfidf-b": "b"}


Text = tuple[str, tuple[str, ...]]  # a reply, and the turns before it


@dataclass
class Judge:
    """One judge of all three dimensions."""

    name: str
    sha256: Mapping[str, str]  # {dim: what it is: of its weights; of what it is fitted on, and how}
    held_out: Mapping[str, float]  # {dim: macro-F1 on the validation side of the pairs, in percent}
    ask: Mapping[str, Ask]  # {dim: (N,) probabilities of level 1 or above}
    reads_context: bool
    caveat: str = ""  # to `held_out`
    halves: Mapping[str, str] = field(default_factory=dict)  # {dim: lineage.half_of}
    known: dict[Text, np.ndarray] = field(default_factory=dict, repr=False)  # {text: (dimensions,)}

    def as_served(self) -> list[lineage.Served]:
        """As critics that something was made to please, as replies are that it ranked."""
        return [lineage.Served(dim, self.sha256[dim], half) for dim, half in self.halves.items()]

    def levels(
        self, replies: Sequence[str], contexts: Sequence[Turns] | None = None
    ) -> dict[str, np.ndarray]:
        """{dim: (N,) probability that a reply reaches level 1}, given the turns before it, or by itself.

        Each distinct text is asked about once, ever; an empty reply shows nothing: 0.
        """
        before: Sequence[Turns] = [()] * len(replies)
        if contexts is not None and self.reads_context:
            before = contexts
        keys = [(reply.strip(), tuple(turns)) for reply, turns in zip(replies, before, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self.known and key[0]]
        if new:
            texts, turns = [key[0] for key in new], [key[1] for key in new]
            found = np.stack([ask(texts, turns) for ask in self.ask.values()], axis=1)  # (new, dimensions)
            self.known.update(zip(new, found, strict=True))
        nothing = np.zeros(len(self.ask))
        rows = np.array([self.known.get(key, nothing) for key in keys]).reshape(len(keys), len(self.ask))
        return {dim: rows[:, n] for n, dim in enumerate(self.ask)}


# ----------------------------------------------------------------------------------------------------- loaded


def named(text: str) -> list[str]:
    """The judges of a flag's value, separated by commas; "none" names none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names


def load(
    paths: Paths,
    session: Session,
    which: Sequence[str] | None = None,
    half: str = lineage.ALL,
    role: str = "judge",
) -> list[Judge]:
    """The judges named in `which`: `tfidf`; a family whose critics stand in saved/empathy (minilm, t5 ...),
    each with the half of the seeker posts that it learns from (tfidf-b, minilm-a); or the folder of a critic
    of all dimensions. By default those of `DEFAULT` and `half` that can be had; what is missing is named,
    with the commands that make it.

    Raises `UserError` where one that was named is missing, or the pairs are.
    """
    judges = []
    ending = "" if half == lineage.ALL else f"-{half}"
    for name in [name + ending for name in DEFAULT] if which is None else which:
        if said := unavailable(name, paths, role):
            if which is not None:
                raise UserError(said)
            session.say(f"note: {said}")
            continue
        if name in WORDS:
            judges.append(tfidf_judge(name, paths))
        else:
            folders = {dim: place(name, dim, paths) for dim in DIMENSIONS}
            judges.append(critics_judge(Path(name).name, folders, paths, session))
    named = [judge.name for judge in judges]
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(
            f"two judges named {twice[0]}, as their columns would be; give it once, or rename one's folder"
        )
    return judges


def place(name: str, dim: str, paths: Paths) -> Path:
    """Where a judge's critic of a dimension is: in a folder of its own (DIM/ in it, or one critic of all), or
    among its family's."""
    if "/" not in name:
        return paths.find_critic(dim, name)
    own = Path(name) / dim
    return own if own.is_dir() else Path(name)


def unavailable(name: str, paths: Paths, role: str) -> str:
    """Why a judge, or what else it is to be, cannot be had, and what makes it; empty where it can."""
    elsewhere = (
        f"no {name} {role}: {advice.NO_PAIRS}; give the folder of a critic (--dim {JOINT}) of another workdir"
    )
    if name in WORDS:
        files = [paths.pairs(dim, split) for dim in DIMENSIONS for split in ("train", "valid")]
        missing = [file for file in files if not file.exists()]
        if missing and advice.lacks_pairs(paths.root):
            return elsewhere
        make = advice.makes(missing[0], "python prepare_data.py") if missing else ""
        return f"no {name} {role}: {missing[0]} is not there; make it with: {make}" if missing else ""
    lacking = [dim for dim in DIMENSIONS if not (place(name, dim, paths) / "result.json").exists()]
    if not lacking:
        return ""
    apart = ", ".join(f"{dim}/" for dim in DIMENSIONS)
    if "/" in name:
        return (
            f"no {role} in {name}: it takes the folder of one critic of all dimensions (--dim {JOINT}), "
            f"or one that holds {apart}"
        )
    if advice.lacks_pairs(paths.root):
        return elsewhere
    if not advice.variant_of(name):
        return (
            f"no {name} {role}: {paths.critic(lacking[0], name)} is not there; give the folder of a critic "
            f"of all dimensions, one that holds a critic of each ({apart}), or one of tfidf, minilm, t5 and "
            "glove-t5"
        )
    kinds = lacking if len(lacking) < len(DIMENSIONS) else [JOINT]  # one reading for all costs a third
    make = "; ".join(advice.train_critic(kind, name, paths.root) for kind in kinds)
    return f"no {name} {role}: {paths.critic(kinds[0], name)} is not trained; make it with: {make}"


def tfidf_judge(name: str, paths: Paths) -> Judge:
    """TF-IDF and logistic regression, fitted on the training pairs: seconds, and the same every time."""
    half = WORDS[name]
    sha256, held_out, ask = {}, {}, {}
    for dim in DIMENSIONS:
        files = [paths.pairs(dim, split) for split in ("train", "valid")]
        train, valid = choose_pairs(read_pairs(files[0]), read_pairs(files[1]), "files", half)
        if train["level"].ge(1).nunique() < 2:
            raise UserError(f"{files[0]}: too few pairs for the judge {name}")
        model = metrics.tfidf_classifier(train["response_post"], train["level"] >= 1)
        sha256[dim] = storage.fingerprint(storage.sha256(files[0]), half, model, sklearn.__version__)
        found = model.predict(valid["response_post"]).tolist()
        held_out[dim] = metrics.classification((valid["level"] >= 1).tolist(), found, 2)["macro_f1"]
        ask[dim] = asker_of_words(model)
    return Judge(name, sha256, held_out, ask, reads_context=False, halves=dict.fromkeys(DIMENSIONS, half))


def asker_of_words(model) -> Ask:
    return lambda replies, contexts: model.predict_proba(replies)[:, 1]


def critics_judge(name: str, folders: Mapping[str, Path], paths: Paths, session: Session) -> Judge:
    """The finished critics in `folders` {dim: folder} as one judge; the heads of one folder read together."""
    sha256, held_out, halves = {}, {}, {}
    reads_context, again, most = False, 0.0, 2
    critics = open_critics(folders, session)
    for dim, folder in folders.items():
        sha256[dim] = storage.sha256(folder / "model.safetensors")
        result = result_of(folder, dim)
        held_out[dim] = result["valid"]["macro_f1"]
        again = max(again, result.get("learnt_elsewhere", 0.0))
        most = max(most, int(critics[dim].limits[1]) + 1)
        halves[dim] = lineage.half_of(folder, paths)
        reads_context |= critics[dim].critic.settings.context_len > 0
    chosen = " (their epochs were chosen there, too"
    chosen += f"; of {most} levels, where the judge is asked about level 1 alone" * (most > 2)
    chosen += f"; up to {again:.0%} of them were learnt from, in another dimension" * (again > 0) + ")"
    ask = valued(critics, f"{name},", paths.cache, reached)
    return Judge(name, sha256, held_out, ask, reads_context, chosen, halves)


class Layout:
    """Texts as a critic reads them; critics of one tokenizer and layout that are asked about the same texts,
    one after the other, share them."""

    def __init__(self):
        self.newest: tuple = ()
        self.data: Data | None = None

    def of(self, scorer: Critic, replies: Sequence[str], contexts: Sequence[Turns]) -> Data:
        settings = scorer.critic.settings
        lengths = (settings.context_len, settings.reply_len)
        asked = (settings.tokenizer, *lengths, tuple(replies), tuple(map(tuple, contexts)))
        if self.data is None or asked != self.newest:
            data = critic_data(contexts, replies, None, scorer.tokenizer, settings)
            self.newest, self.data = asked, data
        return self.data


def reached(rows: np.ndarray) -> np.ndarray:
    """(N, labels) probabilities -> (N,) that of level 1 or above."""
    return 1 - rows[:, 0]


def expected(rows: np.ndarray) -> np.ndarray:
    """(N, labels) probabilities -> (N,) expected levels; (N, 1) scores stay."""
    return rows[:, 0] if rows.shape[1] == 1 else rows @ np.arange(rows.shape[1])


def answers_of(scorer: Critic, title: str, cache: Path, layout: Layout | None = None) -> Answers:
    """What a critic says, (N, outputs) probabilities or (N, 1) scores, kept in the cache."""
    layout = layout or Layout()
    weights = storage.sha256(scorer.folder / "model.safetensors")
    name = storage.fingerprint(weights, scorer.session.precision)[:24]

    def ask(replies: Sequence[str], contexts: Sequence[Turns]) -> np.ndarray:
        data = layout.of(scorer, replies, contexts)
        asked = [str(scorer.session.device), *replies, *map(str, contexts)]
        parts = cache / f"judging-{storage.fingerprint(name, *asked)[:24]}"
        rows = critic_scores(scorer.critic, data, scorer.session, title, keep=parts)
        shutil.rmtree(parts, ignore_errors=True)
        return rows

    return Answers(ask, cache / f"judged-{name}.npz", scorer.critic.settings.context_len > 0)


def valued(
    critics: Critics, title: str, cache: Path, value: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Valued]:
    """{kind: what `value` makes of a critic's (N, labels)}; the heads of one encoder read together."""
    layout = Layout()
    answers = {whole: answers_of(whole, f"{title} {whole.kind}", cache, layout) for whole in wholes(critics)}

    def of(critic: Critic) -> Valued:
        return Valued(answers[critic.whole], lambda rows: value(critic.own(rows)))

    return {kind: of(critic) for kind, critic in critics.items()}


def training_critics(critics: Critics, cache: Path) -> dict[str, Valued]:
    """{kind: the expected level, or the sentiment, that a critic sees in a reply}."""
    return valued(critics, "critic", cache, expected)


# ----------------------------------------------------------------------------------------------------- judged


def agreement(judges: Sequence[Judge], replies: Sequence[str], contexts: Sequence[Turns]) -> dict:
    """{(name, name): {dim: Cohen's kappa}} of any two judges on whether replies reach level 1; nan where one
    of them says the same of all."""
    said = {judge.name: judge.levels(replies, contexts) for judge in judges}
    out = {}
    for n, first in enumerate(judges):
        for second in judges[n + 1 :]:
            pair: dict[str, float] = {}
            for dim in DIMENSIONS:
                a, b = said[first.name][dim] >= 0.5, said[second.name][dim] >= 0.5
                constant = len(np.unique(a)) < 2 or len(np.unique(b)) < 2
                pair[dim] = math.nan if constant else float(cohen_kappa_score(a, b))
            out[first.name, second.name] = pair
    return out


def fooled(judge: Judge, replies: Sequence[str], contexts: Sequence[Turns]) -> dict:
    """{text: {dim: mean level}} of texts that show nothing, in the place of gold `replies`, and of those.

    The texts: "ok .", the same replies with their words shuffled, and a stack of telling words.
    """
    rng = random.Random(42)
    shuffled = []
    for reply in replies:
        words = metrics.split_words(reply)
        rng.shuffle(words)
        shuffled.append(" ".join(words))
    asked = {"gold": list(replies), "ok .": ["ok ."] * len(replies), "shuffled words": shuffled}
    out = {text: means(judge.levels(texts, contexts)) for text, texts in asked.items()}
    stacks = {
        dim: judge.levels([known.telling] * len(replies), contexts)[dim] for dim, known in DIMENSIONS.items()
    }
    return out | {"telling words": means(stacks)}


def means(levels: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {dim: float(np.mean(found)) for dim, found in levels.items()}


def report(judges: Sequence[Judge], replies: Sequence[str], contexts: Sequence[Turns]) -> list[str]:
    """What a table's reader must know of its judges, in lines: who they are, how right on held-out pairs,
    how much they agree on the gold `replies`, and what nonsense they take for empathy."""
    lines = []
    for judge in judges:
        what = ", ".join(f"{dim} {judge.sha256[dim][:12]}" for dim in DIMENSIONS)
        lines.append(
            f"Judge {judge.name} (sha256: {what}): learnt from {learnt_from(judge)}; macro-F1 on held-out "
            f"pairs {listed(judge.held_out, '.1f')}{judge.caveat}."
        )
    for (first, second), kappas in agreement(judges, replies, contexts).items():
        lines.append(
            f"Agreement of {first} and {second} on the gold replies (kappa): {listed(kappas, '.2f')}."
        )
    step = max(1, len(replies) // 300)  # on about so many replies, evenly spaced, nonsense is tried
    for judge in judges:
        found = fooled(judge, replies[::step], contexts[::step])
        gold = found.pop("gold")
        said = [f"gold {listed(gold, '.2f')}"]
        for text, levels in found.items():
            caught = [dim for dim in DIMENSIONS if levels[dim] >= gold[dim]]
            said.append(
                f'"{text}" {listed(levels, ".2f")}' + (f" (fooled: {', '.join(caught)})" * bool(caught))
            )
        lines.append(f"Mean level by {judge.name} of texts that show nothing: {'; '.join(said)}.")
    return lines


def told_apart(judge: Judge, paths: Paths) -> dict[str, float]:
    """{dim: mean level of the held-out replies that people labelled 1 or above, less that of the others}.

    What a judge makes of a difference that people see, and so the scale on which its control is read. A
    dimension in which all were labelled alike, or without pairs (own dialogues), is left out.
    """
    found = {}
    for dim in DIMENSIONS:
        if not paths.pairs(dim, "valid").exists():
            continue
        pairs = read_pairs(paths.pairs(dim, "valid"))
        shown = pairs["level"] >= 1
        if shown.nunique() == 2:
            posts = [(post,) for post in pairs["seeker_post"]]
            levels = judge.levels(pairs["response_post"].tolist(), posts)[dim]
            found[dim] = float(levels[shown].mean() - levels[~shown].mean())
    return found


def learnt_from(judge: Judge) -> str:
    """In words."""
    said = {lineage.ALL: "all seeker posts", lineage.UNKNOWN: "seeker posts that nothing here tells"}
    halves = {half: said.get(half, f"half {half} of the seeker posts") for half in judge.halves.values()}
    if len(halves) == 1:
        return next(iter(halves.values()))
    return ", ".join(f"{dim} {halves[half]}" for dim, half in judge.halves.items()) or said[lineage.UNKNOWN]


def listed(values: Mapping[str, float], shape: str) -> str:
    return ", ".join(f"{dim} {value:{shape}}" for dim, value in values.items())


# ----------------------------------------------------------------------------------- what a context foretells


def context_auc(
    levels: np.ndarray, gold: np.ndarray, groups: Sequence | None = None, draws: int = 1000, seed: int = 42
) -> Estimate:
    """How well a level of each context (N,) foretells which gold replies reach level 1: the ROC AUC, with a
    bootstrap over `groups` (N,), the contexts' conversations (default: over the contexts).

    `levels`: the mean judged level of several replies that a system sampled for one context, or what a
    predictor says; `gold`: the judged level of the gold reply. Nan where every gold reply is on one side. By
    a judge that reads the context, even a constant reply is above .5: ask it without contexts.
    """
    reached = np.asarray(gold) >= 0.5
    if reached.all() or not reached.any():
        return Estimate(math.nan)
    steps = np.unique(levels, return_inverse=True)[1]  # equal levels count half

    def auc(counts: np.ndarray) -> float:
        """`counts` (N,): how often each context was drawn."""
        above = np.bincount(steps, weights=counts * reached)
        below = np.bincount(steps, weights=counts * ~reached)
        pairs = above.sum() * below.sum()
        return float(above @ (below.cumsum() - below / 2) / pairs) if pairs else math.nan

    count = len(reached)
    drawn = resamples(np.arange(count) if groups is None else groups, draws, seed)
    return Estimate(auc(np.ones(count)), np.array([auc(counts) for counts in drawn]))


def context_predictor(
    judge: Judge,
    train: Sequence[Example],
    held: Sequence[Example],
    session: Session,
    cache: Path | None = None,
    encoder: str | None = "minilm",
) -> dict[str, np.ndarray]:
    """{dim: (N,) probability that the gold reply reaches level 1, seen from the context alone}.

    Logistic regression on the vector of the turns before and their number, fitted on the training turns as
    the same judge sees their replies. Its AUC is what `context_auc` is read beside: about what can be
    known of a reply that is not yet written. `encoder`: of the vectors; None: TF-IDF.
    """
    before = [" ".join(e.history) for e in (*train, *held)]
    if encoder is None:
        vectors = metrics.tfidf_rows(before[: len(train)], before, ngram_range=(1, 2), min_df=2)
    else:
        place = resolve(encoder)
        side, tokenizer = load_side(encoder, "question", "mean").to(session.device), load_tokenizer(place)
        key = storage.fingerprint(storage.identity(place), session.precision, before)

        def make(parts: Path | None) -> dict[str, np.ndarray]:
            return {"rows": embed(side, tokenizer, before, session, 128, True, "contexts", keep=parts)}

        vectors = caches.kept(cache and cache / f"contexts-{key[:24]}.npz", make)["rows"]
    turns = np.array([[len(e.history) / 10] for e in (*train, *held)])
    rows = sparse.hstack([sparse.csr_matrix(vectors), turns]).tocsr()
    judged = judge.levels([e.response for e in train], [e.history for e in train])
    out = {}
    for dim, levels in judged.items():
        reached = levels >= 0.5
        out[dim] = np.full(len(held), float(reached.mean()))
        if reached.any() and not reached.all():
            model = LogisticRegression(max_iter=1000).fit(rows[: len(train)], reached)
            out[dim] = model.predict_proba(rows[len(train) :])[:, 1]
    return out
