"""What control.py does: candidates sampled once for each context, chosen among for every target, and judged.

A way of control is ranking (one pool of candidates for all targets), marks (the likeliest of those that were
written under the target's level marks), or both.

Letters in shapes: C contexts, N candidates of each.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import caches
import judges
import lineage
import markup
import plots
import storage
from corpora import Example, listener_turns
from exemplars import of_split
from intervals import LEAST_DRAWN, bootstrap, item_means, resamples
from judges import Judge
from measures import bleu
from metrics import distinct
from normalising import normalise, words
from options import DIMENSIONS, Paths, UserError, refuse_existing
from responder import Writer, open_writer
from session import Session, own_random_stream
from settings import Decoding, Weights
from storage import hash_seed

Target = Mapping[str, int]  # {dimension: level}; empty: none
#: no target, and each level of each dimension
TARGETS: tuple[Target, ...] = ({}, *({dim: level} for dim in DIMENSIONS for level in (0, 1)))
COSTS = {
    "log_probability": "log-prob.",
    "norm_bleu_4": "BLEU-4",
    "distinct_2": "Distinct-2 %",
    "length": "words",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class ControlOptions:
    """What control.py was asked for (it explains each flag)."""

    run: str
    base: str | None
    split: str
    contexts: int
    candidates: list[int]
    name: str
    ranker: str
    judge: list[str]
    likelihood_w: float
    empathy_w: list[float]
    ways: list[str]
    top_k: int
    top_p: float
    temperature: float
    max_new_tokens: int
    timed: int
    seed: int
    overwrite: bool

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.top_k, self.temperature, self.max_new_tokens, seed=self.seed, top_p=self.top_p)


@dataclass(frozen=True)
class Pool:
    """The candidates of every context."""

    replies: np.ndarray  # (C, N) texts
    log_probability: np.ndarray  # (C, N) mean over the tokens, in nats; -inf of an empty reply

    def levels(self, ranker: Judge, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """{dimension: (C, N)} of every candidate, by a judge, which asks about no text twice."""
        contexts = [e.history for e in examples for _ in range(self.replies.shape[1])]
        found = ranker.levels(self.replies.ravel().tolist(), contexts)
        return {dim: values.reshape(self.replies.shape) for dim, values in found.items()}


# ---------------------------------------------------------------------------------------------------- sampled


def drawn_contexts(options: ControlOptions, paths: Paths) -> list[Example]:
    """So many listener turns of the split, in its order; more of them hold those that fewer would."""
    examples = listener_turns(paths.dialogues(options.split))
    order = np.random.default_rng(options.seed).permutation(len(examples))[: options.contexts]
    return [examples[n] for n in sorted(order)]


class Sampler:
    """Candidates of one generator for contexts of one split, kept in the cache by what they depend on."""

    def __init__(self, options: ControlOptions, paths: Paths, session: Session):
        self.options, self.paths, self.session = options, paths, session
        self.writer: Writer = open_writer(Path(options.run), session, paths, options.base)
        self.examples = drawn_contexts(options, paths)
        self.most = max(options.candidates)
        if set(options.ways) != {"ranking"} and set(self.writer.marks) != set(DIMENSIONS):
            raise UserError(f"--ways: {options.run} was trained without --control marks; leave the flag out")
        self.exemplars: list[list[str]] = [[]] * len(self.examples)
        if self.writer.reads_exemplars:
            self.exemplars = of_split(options.split, self.examples, self.writer.top_exemplars, paths)
        elif paths.exemplars_dir != paths.dialogues_dir:
            session.say(f"note: --exemplars: ignored, since {options.run} reads none")

    def sample(self, number: int, count: int, marks: Target | None = None) -> list[tuple[str, float]]:
        """Candidates for one context, from its own random stream."""
        example = self.examples[number]
        batch = self.writer.encode(example.history, self.exemplars[number], marks)
        seed = hash_seed(self.options.seed, *example.key)
        with own_random_stream(seed), torch.inference_mode(), self.session.autocast():
            return self.writer.generate(batch, count, self.options.decoding)

    def told_nothing(self, found: Sequence["Choice"]) -> list["Choice"]:
        """What replies cost the model that is told no marks. Where some were written under marks it reads all
        of them again: there a reply that was cut pays for an end, too, with which it was not drawn."""
        if {c.way for c in found} <= {"ranking"}:
            return list(found)
        said = sorted({(n, text) for c in found for n, text in enumerate(c.replies) if text})

        def work(places: list[int]) -> dict[str, np.ndarray]:
            values = []
            for n, text in (said[place] for place in places):
                history = self.examples[n].history
                values.append(self.writer.log_probability(history, self.exemplars[n], text))
            return {"numbers": np.array(places), "values": np.array(values)}

        def make(parts: Path | None) -> dict[str, np.ndarray]:
            with torch.inference_mode(), self.session.autocast():
                return caches.in_chunks([*range(len(said))], work, parts, "costs", size=64)

        values = {}
        if said:
            costs = caches.kept(self.file("told nothing", said), make)["values"]
            values = dict(zip(said, costs.tolist(), strict=True))

        def cost(choice: Choice) -> float:
            each = [values[pair] for pair in enumerate(choice.replies) if pair in values]
            return float(np.mean(each)) if each else math.nan

        return [replace(choice, log_probability=cost(choice)) for choice in found]

    def file(self, *further: object) -> Path:
        run = Path(self.options.run)
        made_of = [storage.sha256(storage.weights_file(run)), storage.sha256(run / "config.json")]
        base = getattr(getattr(self.writer, "settings", None), "base_sha256", None)
        made_of += [base] if base else []  # the one that was loaded, which need not be the adapter's own
        texts = [repr((e.history, shown)) for e, shown in zip(self.examples, self.exemplars, strict=True)]
        key = storage.fingerprint(*made_of, texts, self.options.decoding, self.session.precision, *further)
        return self.paths.cache / f"candidates-{key[:24]}.npz"

    def pool(self, marks: Target | None = None) -> Pool:
        """`most` candidates of every context: from the cache, or sampled; an interrupted call goes on."""
        title = f"candidates, marks {named(marks)}" if marks else "candidates"

        def work(numbers: list[int]) -> dict[str, np.ndarray]:
            found = [self.sample(n, self.most, marks) for n in numbers]
            return {
                "numbers": np.array(numbers),
                "replies": np.array([[text for text, _ in row] for row in found]),
                "log_probability": np.array([[value for _, value in row] for row in found]),
            }

        def make(parts: Path | None) -> dict[str, np.ndarray]:
            return caches.in_chunks([*range(len(self.examples))], work, parts, title, size=4)

        rows = caches.kept(self.file(self.most, *([title] if marks else [])), make)
        return Pool(rows["replies"], np.where(rows["replies"] == "", -np.inf, rows["log_probability"]))

    def seconds(self) -> dict[int, float]:
        """{N: seconds to sample N candidates for one context}, the mean over the first `timed`."""
        timed, counts, device = self.options.timed, self.options.candidates, str(self.session.device)
        if not timed:
            return {}

        def make() -> dict[str, np.ndarray]:
            self.sample(0, 1)  # the first call warms up
            taken = []
            for count in counts:
                began = time.perf_counter()
                for number in range(min(timed, len(self.examples))):
                    self.sample(number, count)
                taken.append((time.perf_counter() - began) / min(timed, len(self.examples)))
            return {"seconds": np.array(taken)}

        found = caches.cached(self.file("seconds", timed, counts, device), make)["seconds"]
        return dict(zip(counts, found.tolist(), strict=True))


# --------------------------------------------------------------------------------------------- chosen, judged


def choose(pool: Pool, levels: Mapping[str, np.ndarray], target: Target, weights: Weights) -> np.ndarray:
    """The place of the best candidate of each context, (C,), the first of equal ones. `levels`: the ranker's,
    {dimension: (C, N)}."""
    distances = {dim: np.abs(levels[dim] - level) for dim, level in target.items()}
    empty = np.isneginf(pool.log_probability)  # never chosen, also where likelihood has no weight
    total = weights.total(np.where(empty, 0.0, pool.log_probability), distances)
    return np.argmax(np.where(empty, -np.inf, total), axis=1)


RESAMPLES = 2000  # of the conversations


def with_intervals(levels: Mapping[str, np.ndarray], drawn: np.ndarray) -> dict[str, float]:
    """{dim, dim_low, dim_high}: the mean of the levels of each dimension, and the ends of its 95 % interval,
    nan where there is none. `drawn`: see `intervals.resamples`."""
    found: dict[str, float] = {}
    for dim, estimate in bootstrap({d: item_means(v) for d, v in levels.items()}, drawn).items():
        low, high = estimate.interval() or (math.nan, math.nan)
        found |= {dim: estimate.point, f"{dim}_low": low, f"{dim}_high": high}
    return found


@dataclass(frozen=True)
class Choice:
    """One way of choosing: the reply to each context, and its mean log-probability."""

    way: str
    weight: float  # of the distance to the target
    count: int  # N
    target: Target
    replies: list[str]
    log_probability: float  # the mean of the replies', each of its tokens, by the model that is told no marks


def choices(
    options: ControlOptions, pools: Mapping[str, Pool], ranker: Judge, examples: Sequence[Example]
) -> list[Choice]:
    """For every way, weight, N and target; without a target the weight does not count. `pools`: {marks in
    words: the candidates that were written under them}."""
    found = []
    for way in options.ways:
        for weight in [0.0] if way == "marks" else options.empathy_w:
            weights = Weights(options.likelihood_w, weight, weight)
            for count in options.candidates:
                for target in TARGETS:
                    pool = pools[named({} if way == "ranking" else target)]
                    levels = pool.levels(ranker, examples) if weight and target else None
                    found.append(chosen(pool, levels, target, weights, count, way))
    return found


def chosen(
    pool: Pool,
    levels: Mapping[str, np.ndarray] | None,
    target: Target,
    weights: Weights,
    count: int,
    way: str,
) -> Choice:
    """The best of the first `count` candidates of each context. `levels`: the ranker's; None: no target
    counts."""
    first = Pool(pool.replies[:, :count], pool.log_probability[:, :count])
    seen = {dim: values[:, :count] for dim, values in (levels or {}).items()}
    places = choose(first, seen, target if levels else {}, weights)[:, None]
    replies = np.take_along_axis(first.replies, places, 1)[:, 0].tolist()
    log_probability = np.take_along_axis(first.log_probability, places, 1)
    said = log_probability[np.isfinite(log_probability)]
    return Choice(way, weights.empathy, count, target, replies, float(said.mean()) if said.size else math.nan)


def measured(
    found: Sequence[Choice],
    panel: Sequence[Judge],
    examples: Sequence[Example],
    seconds: Mapping[int, float],
    seed: int,
) -> pd.DataFrame:
    """A row for each choice and judge, and for each dimension's difference between its two targets.

    Columns: judge, way, weight, candidates, target; {dim}, {dim}_low, {dim}_high: the mean level; the same of
    {dim}_share, the share of replies that the judge rather says to show it; the costs (of the choices).
    """
    contexts, gold = [e.history for e in examples], [e.response for e in examples]
    drawn = resamples([e.conv_id for e in examples], RESAMPLES, seed)
    rows: list[dict[str, Any]] = []
    for judge in panel:
        people = with_intervals(seen_by(judge, gold, contexts), drawn)
        rows.append({"judge": judge.name, "target": "gold"} | people)
        levels: dict[tuple, dict[str, np.ndarray]] = {}
        for choice in found:
            name = named(choice.target)
            own = seen_by(judge, choice.replies, contexts)
            levels[choice.way, choice.weight, choice.count, name] = own
            cost: dict[str, Any] = {"log_probability": choice.log_probability}
            cost |= texts_cost(choice.replies, gold) | {"seconds": seconds.get(choice.count)}
            key: dict[str, Any] = {"judge": judge.name, "way": choice.way}
            key |= {"weight": choice.weight, "candidates": choice.count}
            rows.append(key | {"target": name} | with_intervals(own, drawn) | cost)
            if 1 in choice.target.values():  # its 0 stands before it
                (dim,) = choice.target
                other = levels[choice.way, choice.weight, choice.count, named({dim: 0})]
                moved = {d: own[d] - other[d] for d in own}
                rows.append(key | {"target": f"{dim}: 1 - 0"} | with_intervals(moved, drawn))
    return pd.DataFrame(rows)


def seen_by(judge: Judge, replies: Sequence[str], contexts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """{dim: (C,) levels, which an unsure judge keeps away from 0 and 1; dim_share: 1 where at least .5}."""
    levels = judge.levels(replies, contexts)
    return levels | {f"{dim}_share": (values >= 0.5).astype(float) for dim, values in levels.items()}


def named(target: Target) -> str:
    return ", ".join(f"{dim}={level}" for dim, level in target.items()) or "none"


# ------------------------------------------------------------------------------------------------------ shown


def level(row: pd.Series, dim: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if math.isnan(row[f"{dim}_low"]):
        return f"{row[dim]:{sign}.2f}"
    return f"{row[dim]:{sign}.2f} [{row[f'{dim}_low']:{sign}.2f}, {row[f'{dim}_high']:{sign}.2f}]"


def texts_cost(replies: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """What replies are worth without any critic: BLEU-4 (normalised) and Distinct-2 in percent, words."""
    spelt = [normalise(text) for text in replies]
    return {
        "norm_bleu_4": bleu(spelt, [normalise(text) for text in gold], [4])[4].point,
        "distinct_2": distinct(replies, 2),
        "length": float(np.mean([len(words(text)) for text in replies])),
    }


def summary(table: pd.DataFrame, measure: str = "") -> str:
    """Control: the difference of each dimension's level (or "_share") between its targets, by each judge."""
    rows = []
    groups = table.groupby(["judge", "way", "weight", "candidates"], sort=False)
    for (judge, way, weight, count), part in groups:
        by_target = {row["target"]: row for _, row in part.iterrows()}
        moved = [level(by_target[f"{dim}: 1 - 0"], dim + measure, True) for dim in DIMENSIONS]
        aimed = [row for name, row in by_target.items() if "=" in name]
        costs = [f"{np.mean([row[c] for row in aimed]):.2f}" for c in ("log_probability", "norm_bleu_4")]
        rows.append([judge, way, f"{weight:g}", f"{count:g}", *moved, *costs])
    costs = ["log-prob. under a target", "BLEU-4 under a target"]
    return markup.table(["judge", "way", "weight", "N", *DIMENSIONS, *costs], rows) + "\n"


def details(table: pd.DataFrame, judge: str, way: str, weight: float) -> str:
    """Every target's levels by one judge, and what it costs."""
    rows = []
    own = (table["way"] == way) & (table["weight"] == weight)
    part = table[(table["judge"] == judge) & (own | table["way"].isna())]
    for _, row in part.iterrows():
        if row["target"].endswith("1 - 0"):
            continue
        count = "" if pd.isna(row["candidates"]) else f"{row['candidates']:g}"
        costs = ["" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in COSTS]
        rows.append([row["target"], count, *(level(row, dim) for dim in DIMENSIONS), *costs])
    return markup.table(["target", "N", *DIMENSIONS, *COSTS.values()], rows) + "\n"


def page(
    options: ControlOptions, panel: Sequence[str], contexts: int, table: pd.DataFrame, notes: Sequence[str]
) -> str:
    """`panel`: the judges' names."""
    parts = [
        "# Control\n",
        f"{options.run}, {contexts} contexts of {options.split}, candidates ranked by "
        f"{options.ranker}: {options.likelihood_w:g} x log-probability - weight x distance to the target.\n",
        "## Difference of the judged level between target 1 and target 0\n",
        summary(table),
        "## Difference of the share of replies that show it (judged level at least .5)\n",
        summary(table, "_share"),
    ]
    for judge in panel:
        for way in options.ways:
            weight = 0.0 if way == "marks" else options.empathy_w[0]
            parts += [f"## Levels as {judge} sees them, {way}, weight {weight:g}\n"]
            parts += [details(table, judge, way, weight)]
    parts += ["Log-probabilities are by the model that is told no marks, whatever it was told.\n"]
    parts += [
        f"In brackets: 95 % intervals by a bootstrap over conversations ({LEAST_DRAWN} or more).\n",
        *(f"{n}\n" for n in notes),
    ]
    return "\n".join(parts)


def run(options: ControlOptions, paths: Paths, session: Session) -> dict:
    """Write control.csv, table.md, control.png, candidates.csv and metrics.json to results/NAME/."""
    folder = paths.results / options.name
    names = ("metrics.json", "table.md", "control.csv", "control.png", "candidates.csv")
    files = {n: folder / n for n in names}
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # written last
    storage.require_room_for(folder)
    sampler = Sampler(options, paths, session)
    (ranker,) = judges.load(paths, session, [options.ranker], role="ranker")
    panel = judges.load(paths, session, options.judge)
    for judge in panel:
        if same := [dim for dim, sha256 in judge.sha256.items() if sha256 in ranker.sha256.values()]:
            raise UserError(
                f"--judge {judge.name}: in {', '.join(same)} it is the ranker {ranker.name} itself; a judge "
                "must not have ranked what it judges"
            )
    pleased = [*lineage.served(Path(options.run), paths), *ranker.as_served()]
    marked = [target for target in TARGETS if target and set(options.ways) != {"ranking"}]
    examples = sampler.examples
    pools = {named(target): sampler.pool(target) for target in [{}, *marked]}
    seconds = sampler.seconds()
    found = sampler.told_nothing(choices(options, pools, ranker, examples))
    table = measured(found, panel, examples, seconds, options.seed)
    notes = judges.report(panel, [e.response for e in examples], [e.history for e in examples])
    notes += [
        f"Judge {judge.name} has learnt from pairs that the ranker has seen, or critics that the run was "
        f"trained to please: {', '.join(kinds)}; its levels may flatter."
        + " A ranker of --part a and a judge of --part b share none."
        * bool(lineage.shared(judge.halves, ranker.as_served()))
        for judge in panel
        if (kinds := lineage.shared(judge.halves, pleased))
    ]
    scales = {judge.name: judges.told_apart(judge, paths) for judge in panel}
    notes += [
        f"Scale: held-out replies that people labelled 1 differ from those labelled 0, as {name} sees "
        f"them, by {judges.listed(scale, '+.2f')}."
        for name, scale in scales.items()
        if scale
    ]
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # another process's
    files["metrics.json"].unlink(missing_ok=True)  # of a call that is overwritten: it says that all is whole
    storage.write_csv(files["control.csv"], table)
    plots.plot_control(table, files["control.png"])
    storage.write_csv(files["candidates.csv"], listed(pools, examples))
    text = page(options, [judge.name for judge in panel], len(examples), table, notes)
    storage.write_text(files["table.md"], text)
    content = {
        "run": options.run,
        "ranker": {"name": ranker.name, "sha256": dict(ranker.sha256)},
        "judges": {judge.name: dict(judge.sha256) for judge in panel},
        "scale": scales,
        "decoding": vars(options.decoding),
        "contexts": len(examples),
        "seconds": seconds,
        "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
    }
    storage.write_json(files["metrics.json"], content)
    print(text)
    print(f"written to {folder}: {', '.join(files)}")
    return content


def listed(pools: Mapping[str, Pool], examples: Sequence[Example]) -> pd.DataFrame:
    """Every candidate with the marks that it was written under and its log-probability, for people."""
    tables = []
    for name, pool in pools.items():
        contexts, count = pool.replies.shape
        keys = [e.key for e in examples for _ in range(count)]
        columns = {
            "conv_id": [conv for conv, _ in keys],
            "utterance_idx": [number for _, number in keys],
            "marks": name,
            "candidate": list(range(count)) * contexts,
            "response": pool.replies.ravel(),
            "log_probability": pool.log_probability.ravel().round(4),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)
