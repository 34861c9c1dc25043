"""Critics trained: the tasks of the four, what each begins from, and the stage behind their scripts.

What a critic computes stands in models.Critic, critics in use in critics.py.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

import lineage
import metrics
import storage
import teaching
from corpora import choose_pairs, in_one_spacing, read_pairs, read_vader
from critics import guess_loss, is_useless
from dataloaders import critic_data, plan_once, require_same_words, tokenizer_hash, too_much_cut
from DPR.biencoder import resolve
from glove_models import glove_config, load_vectors, set_word_vectors
from mixtures import Mixtures, loss_of_nothing, mean_target, word_frequencies
from models import Critic as CriticModel
from models import CriticSettings, Mixture
from options import DIMENSIONS, JOINT, SENTIMENT, Paths, UserError, by_flag, refuse_existing
from pretrained import (
    begin_from,
    load_encoder,
    load_tokenizer,
    new_encoder,
    offline,
    positions,
    require_words,
)
from session import Session
from settings import CriticCommand, CriticOptions, TeacherOptions
from storage import fingerprint, require
from training import Loop
from updates import Objective

#: contexts (each its turns, oldest first), replies, and what is to be predicted of them
Side = tuple[Sequence[Sequence[str]], Sequence[str], list]
NO_LABEL = -100  # of a pair in a dimension that it is not labelled in
HEAD_FIGURES = ("macro_f1", "accuracy", "calibration_error")  # of each head, where there are several


class CriticObjective(Objective):
    """Cross-entropy of the labels, or squared error of the sentiment, in examples.

    Targets are labels, or rows with a weight for each label: such an example counts as the row's sum. With
    class weights an example counts as its class's weight, in the sum and in the units.
    """

    def __init__(
        self,
        critic: CriticModel,
        class_weights: Sequence[float] | None,
        device: torch.device,
        mixtures: Mixtures | None = None,
    ):
        self.critic, self.kind, self.mixtures = critic, critic.settings.kind, mixtures
        self.weights = {self.kind: 1.0}
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.on_device = None if self.class_weights is None else self.class_weights.to(device)
        self.frequencies = None if mixtures is None else mixtures.frequencies.to(device)

    def prepare(self, model: nn.Module, batch: dict) -> dict:
        return self.mixtures.draw(batch) if self.mixtures else batch

    def units(self, batch: dict) -> dict[str, float]:
        targets = batch["targets"]
        if targets.ndim == 2:
            weights = targets if self.class_weights is None else targets * self.class_weights
            return {self.kind: float(weights.sum())}
        if self.class_weights is None:
            return {self.kind: len(targets)}
        return {self.kind: float(self.class_weights[targets].sum())}

    def terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        mixture = None
        if self.frequencies is not None and "own" in batch:
            mixture = Mixture(batch["own"], batch["rest"], batch["others"], self.frequencies)
        scores = model(batch["input_ids"], batch["attention_mask"], batch["reply_mask"], mixture)
        return {self.kind: self.critic.loss_sum(scores, batch["targets"], self.on_device)}


class JointObjective(Objective):
    """Cross-entropy of each head, in the examples that are labelled in its dimension. Targets (B, heads):
    labels, `NO_LABEL` where there is none."""

    def __init__(self, critic: CriticModel):
        self.critic = critic
        self.weights = dict.fromkeys(critic.settings.heads, 1.0)

    def units(self, batch: dict) -> dict[str, float]:
        labelled = (batch["targets"] != NO_LABEL).sum(0).tolist()
        return dict(zip(self.weights, labelled, strict=True))

    def terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        scores = model(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])
        losses = {}
        for n, (kind, part) in enumerate(self.critic.parts(scores).items()):
            targets = batch["targets"][:, n]
            losses[kind] = F.cross_entropy(part, targets, ignore_index=NO_LABEL, reduction="sum")
        return losses


@dataclass(frozen=True)
class CriticTask:
    """What a critic is to learn, and how it is measured: where critics differ."""

    kind: str
    outputs: int
    train: Side
    valid: Side
    # (gold, raw scores (N, outputs))
    measure: Callable[[list, list[list[float]]], dict[str, float]]
    metric: str  # of `measure`: what decides which evaluation is kept
    mode: str  # max or min
    baselines: dict[str, dict[str, float]]
    inputs: Mapping[str, Path]  # the files that the sides were read from
    posts: str = ""  # of one half: a hash of its seeker posts
    class_weights: Sequence[float] | None = None
    variant: str = ""  # of the data, at the end of the family's name
    tasks: Mapping[str, "CriticTask"] = field(default_factory=dict)  # {kind: its own}, of several heads

    @property
    def heads(self) -> dict[str, int]:
        return {kind: task.outputs for kind, task in self.tasks.items()}


def empathy_task(
    dim: str, paths: Paths, weigh_classes: bool, split_by: str = "files", part: str = "all"
) -> CriticTask:
    """A dimension's label of a response, given the post before it. `weigh_classes`: by inverse frequency;
    `split_by`, `part`: see `choose_pairs`."""
    files = {f"pairs {split}": paths.pairs(dim, split) for split in ("train", "valid")}
    prepared = {name: read_pairs(file) for name, file in files.items()}
    train, valid = choose_pairs(prepared["pairs train"], prepared["pairs valid"], split_by, part)
    if not len(train) or not len(valid):
        raise UserError(
            f"{files['pairs train']}: too few seeker posts for --split-by {split_by} --part {part}"
        )
    labels = int(max(train["label"].max(), valid["label"].max())) + 1
    counts = train["label"].value_counts()
    if len(counts) < 2:
        file = files["pairs train"]
        raise UserError(
            f"{file}: every label is {train['label'].iloc[0]}; there is nothing to learn; give "
            "pairs of two levels or more, or leave --part out"
        )
    weights = None
    if weigh_classes:
        weights = [len(train) / (labels * max(int(counts.get(i, 0)), 1)) for i in range(labels)]
    sides: list[Side] = []
    for table in (train, valid):
        posts = [(post,) for post in table["seeker_post"]]
        sides.append((posts, table["response_post"].tolist(), table["label"].tolist()))

    def measure(gold: list, scores: list[list[float]]) -> dict[str, float]:
        found = softmax(np.array(scores), axis=1)
        return {
            **metrics.classification(gold, found.argmax(1).tolist(), labels),
            "calibration_error": metrics.calibration_error(gold, found),
        }

    return CriticTask(
        kind=dim,
        outputs=labels,
        train=sides[0],
        valid=sides[1],
        measure=measure,
        metric="macro_f1",
        mode="max",
        baselines=metrics.classification_baselines(sides[0][1:], sides[1][1:], labels),
        inputs=files,
        posts=fingerprint(*sorted(set(map(in_one_spacing, train["seeker_post"])))) if part != "all" else "",
        class_weights=weights,
        variant=("-seeker" if split_by == "seeker" else "") + (f"-{part}" if part != "all" else ""),
    )


def joint_task(paths: Paths, split_by: str, part: str) -> CriticTask:
    """All three dimensions by one encoder: each pair once, with the labels that it has.

    The sides are each dimension's own, so that a pair on the validation side of one may be learnt from in
    another, by the other label; with `split_by` "seeker" none is. The figure that decides is the mean
    macro-F1.
    """
    tasks = {dim: empathy_task(dim, paths, False, split_by, part) for dim in DIMENSIONS}
    sides = [merged([getattr(task, side) for task in tasks.values()]) for side in ("train", "valid")]

    def measure(gold: list, scores: list[list[float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        start, labels, logits = 0, np.array(gold), np.array(scores)
        for n, (dim, task) in enumerate(tasks.items()):
            there = labels[:, n] != NO_LABEL
            own = logits[there, start : start + task.outputs].tolist()
            figures = task.measure(labels[there, n].tolist(), own)
            found |= {f"{dim}_{name}": figures[name] for name in HEAD_FIGURES}
            start += task.outputs
        return {"macro_f1": float(np.mean([found[f"{dim}_macro_f1"] for dim in tasks])), **found}

    return CriticTask(
        kind=JOINT,
        outputs=sum(task.outputs for task in tasks.values()),
        train=sides[0],
        valid=sides[1],
        measure=measure,
        metric="macro_f1",
        mode="max",
        baselines={},
        inputs={f"{name}, {dim}": file for dim, task in tasks.items() for name, file in task.inputs.items()},
        posts=fingerprint(*(task.posts for task in tasks.values())) if part != "all" else "",
        variant=tasks["emo"].variant,
        tasks=tasks,
    )


def merged(sides: Sequence[Side]) -> Side:
    """Each pair of several sides once, with a label of each side, or `NO_LABEL`; of doubled pairs the first
    of one side goes with the first of another. Its texts are as the first side spaces them."""
    known: dict[tuple, tuple[tuple[str, ...], str, list[int]]] = {}
    for n, (contexts, replies, labels) in enumerate(sides):
        seen: Counter[tuple] = Counter()
        for context, reply, label in zip(contexts, replies, labels, strict=True):
            pair = pair_of(context, reply)
            row = known.setdefault((pair, seen[pair]), (tuple(context), reply, [NO_LABEL] * len(sides)))
            row[-1][n] = label
            seen[pair] += 1
    contexts, replies, labels = zip(*known.values(), strict=True)
    return list(contexts), list(replies), list(labels)


def pair_of(context: Sequence[str], reply: str) -> tuple[str, ...]:
    """By which a pair is known in every dimension."""
    return (*map(in_one_spacing, context), in_one_spacing(reply))


def sentiment_task(paths: Paths) -> CriticTask:
    """VADER's score of every utterance, given the turns before it."""
    files = {f"vader {split}": paths.vader(split) for split in ("train", "valid")}
    sides: list[Side] = []
    for file in files.values():
        table = read_vader(file)
        contexts: list[tuple[str, ...]] = []
        for _, turns in table.groupby("conv_id", sort=False)["utterance"]:
            contexts += [tuple(turns.iloc[:n]) for n in range(len(turns))]
        sides.append((contexts, table["utterance"].tolist(), table["sentiment"].tolist()))
    train, valid = sides
    mean = sum(train[2]) / len(train[2])
    return CriticTask(
        kind=SENTIMENT,
        outputs=1,
        train=train,
        valid=valid,
        measure=lambda gold, scores: metrics.regression(gold, [row[0] for row in scores]),
        metric="mse",
        mode="min",
        baselines={"mean": metrics.regression(valid[2], [mean] * len(valid[2]))},
        inputs=files,
    )


def warn_of_other_split(flag: str, folder: Path, flags: Mapping[str, Any], session: Session) -> None:
    """Say where the run to begin from, or a teacher, may have learnt from pairs that this one holds out, or
    from posts that its --part leaves to others."""
    made_with = storage.read_if_there(folder / "args.json").get("args", {})
    # by seeker all dimensions hold out the same posts; as prepared each its own
    names = ["split_by"] + ["dim"] * (made_with.get("split_by") != "seeker")
    if "dim" not in flags or "dim" not in made_with:
        return
    other = [f"--{n.replace('_', '-')} {made_with[n]}" for n in names if made_with.get(n) != flags[n]]
    if other:
        session.say(
            f"WARNING: {flag} {folder}: trained with {' '.join(other)}, it may have learnt from pairs "
            "that are held out here; figures of the validation side are then too good"
        )
    learnt = made_with.get("part", "all")
    if flags["part"] not in ("all", learnt):
        session.say(
            f"WARNING: {flag} {folder}: trained with --part {learnt}, so what --part {flags['part']} makes "
            "of it has learnt from the other half of the seeker posts, too; a judge of that half is no "
            "stranger to it"
        )


def with_teacher(task: CriticTask, options: TeacherOptions, paths: Paths, session: Session) -> CriticTask:
    """The task with texts beside its pairs, as a teacher sees them: targets become rows, 1 at a pair's label,
    a teacher's probabilities times --teacher-w."""
    contexts, replies, rows = teaching.taught(
        options, task.kind, task.outputs, task.train[:2], paths, session
    )
    labels = [*np.eye(task.outputs)[task.train[2]].tolist(), *(options.teacher_w * rows).tolist()]
    train = ([*task.train[0], *contexts], [*task.train[1], *replies], labels)
    return replace(task, train=train, inputs={**task.inputs, "dialogues train": paths.dialogues("train")})


def load_backbone(options: CriticOptions, paths: Paths) -> tuple:
    """(tokenizer, encoder, the folder or hub name they begin from) for `--model` and `--size`."""
    if options.model == "glove-t5":
        tokenizer = load_tokenizer(require(paths.glove))
        size = options.size if options.size in ("tiny", "small") else "paper"
        encoder = new_encoder(glove_config(tokenizer, size, options.dropout, num_layers=options.layers))
        set_word_vectors(encoder.get_input_embeddings(), load_vectors(paths.glove), options.seed)
        return tokenizer, encoder, paths.glove
    if options.model == "t5" and options.size == "tiny":
        place = require(paths.t5_tiny)
        return load_tokenizer(place), load_encoder(place, from_scratch=True, dropout=options.dropout), place
    name = f"t5-{options.size}" if options.model == "t5" else resolve(options.model)
    with offline("--model glove-t5, or --model t5 --size tiny (random weights)"):
        tokenizer, encoder = load_tokenizer(name), load_encoder(name, dropout=options.dropout)
    require_words(tokenizer, encoder.get_input_embeddings().weight, name)
    require_positions(options, encoder, tokenizer.cls_token_id is not None)
    return tokenizer, encoder, name


def require_positions(options: CriticOptions, encoder: nn.Module, begins: bool) -> None:
    """Raises `UserError` where an encoder can read fewer tokens than the two lengths allow. `begins`: the
    layout begins with a token of its own."""
    most = positions(encoder)
    special = 2 + begins  # one ends the context, one the reply
    asked = options.context_len + options.reply_len + special
    if most is not None and asked > most:
        raise UserError(
            f"--context-len {options.context_len} and --reply-len {options.reply_len} make, with {special} "
            f"special tokens, {asked} positions, but {options.model} reads only {most}: lower them to at "
            f"most {max(0, most - special)} together"
        )


def build(
    command: CriticCommand, task: CriticTask, tokenizer: Any, encoder: Any, session: Session
) -> CriticModel:
    """A critic to be trained: with a new head, or the weights of `--init-from`."""
    options = command.options
    settings = CriticSettings(
        kind=task.kind,
        outputs=task.outputs,
        pooling=options.pooling,
        context_len=options.context_len,
        reply_len=options.reply_len,
        head_dropout=options.head_dropout,
        word_dropout=options.word_dropout,
        backbone=encoder.config.to_dict(),
        tokenizer=tokenizer_hash(tokenizer),
        heads=task.heads,
    )
    critic = CriticModel(settings, encoder)
    if options.init_from:
        folder = Path(options.init_from)
        with by_flag("--init-from"):
            trained = CriticModel.from_pretrained(folder).of(task.kind)
            require_same_words(folder, load_tokenizer(folder), settings.tokenizer)
            if trained.settings.kind != task.kind:
                trained.head = critic.head  # another dimension's has learnt nothing of this one
            begin_from(critic, trained, folder)
        warn_of_other_split("--init-from", folder, command.flags, session)
    return critic


def run(command: CriticCommand, task: CriticTask, teacher: TeacherOptions | None = None) -> dict:
    """Train the critic of one task: the one function behind all of them."""
    options, paths = command.options, command.paths
    session = Session(**command.device)
    if teacher:
        for folder in map(Path, teacher.teacher):
            warn_of_other_split("--teacher", folder, command.flags, session)
        task = with_teacher(task, teacher, paths, session)
    tokenizer, encoder, begin = load_backbone(options, paths)
    critic = build(command, task, tokenizer, encoder, session)
    settings = critic.settings
    # one layout for training, evaluation and use: what the critic is asked later looks like this
    data = critic_data(*task.train, tokenizer, settings, paths.cache)
    held = critic_data(*task.valid, tokenizer, settings, paths.cache)
    read = {"--reply-len": options.reply_len, "--context-len": options.context_len}
    for warning in too_much_cut(data, read):
        session.say(warning)
    frequencies = word_frequencies(data, len(critic.embeddings))
    mixtures = None
    if options.mixture_share:
        mixtures = Mixtures(options.mixture_share, frequencies, mean_target(task.train[2], task.outputs))
    objective: Objective = CriticObjective(critic, task.class_weights, session.device, mixtures)
    if task.tasks:
        objective = JointObjective(critic)

    def evaluate() -> dict[str, float]:
        found: list = []
        for numbers in session.over(plan_once(held.lengths, 4 * loop.batch_size)):
            batch = session.move(held.collate(numbers))
            with session.autocast():
                scores = critic(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])
            found += zip(numbers, scores.tolist(), strict=True)
        # batches are dealt to processes by length: the measure needs the file's order
        by_number = dict(session.gather(found))
        return task.measure(task.valid[2], [by_number[i] for i in range(len(held))])

    def export(folder: Path) -> None:
        critic.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    def reload(folder: Path) -> CriticModel:
        require_same_words(folder, load_tokenizer(folder), settings.tokenizer)
        return CriticModel.from_pretrained(folder)

    def probe(model: nn.Module) -> Tensor:
        batch = session.move(held.collate([0]))
        return model(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])

    sources = {name: storage.source(file, paths) for name, file in task.inputs.items()}
    sources["model"] = storage.source(begin, paths, storage.identity(begin))
    sources |= storage.sources_of({"init": options.init_from, **numbered(teacher)}, paths)
    inputs = {k: s["sha256"] for k, s in sources.items()} | {"tokenizer": settings.tokenizer}
    if task.posts:
        inputs[lineage.POSTS] = task.posts
    place = paths.critic(task.kind, options.family + task.variant)
    loop = Loop(
        command.training,
        session,
        critic,
        objective,
        data,
        evaluate,
        export,
        place.with_name(command.name or place.name),
        flags=command.flags,
        inputs=inputs,
        sources=sources,
        metric=task.metric,
        mode=task.mode,
        micro_batches_matter=bool(options.mixture_share),
        reload=reload,
        probe=probe,
    )
    result = loop.train()
    if result.get("already_finished"):
        return result
    result |= {"kind": task.kind, "valid": loop.measure(), "baselines": task.baselines}
    if task.tasks:
        result["heads"] = of_heads(result["valid"], task)
        for of_one in result["heads"].values():
            report(of_one, session)
        loop.finish(result)
        return result
    report(result, session)
    # in fp32: no more at a time than were trained on
    size, tokens = min(128, loop.batch_size), loop.options.batch_tokens
    nothing = loss_of_nothing(critic, held, frequencies.to(session.device), session, size, tokens)
    guess = guess_loss(torch.tensor(task.valid[2]).double(), critic.settings.is_regressor)
    result |= {"loss_of_nothing": nothing, "loss_of_a_guess": guess}
    session.say(f"  loss on a reply that says nothing {nothing:.3f}, of a guess by frequency {guess:.3f}")
    loop.finish(result)
    return result


def numbered(teacher: TeacherOptions | None) -> dict[str, str]:
    """{teacher, teacher 2, ...: folder}."""
    folders = teacher.teacher if teacher else ()
    return {f"teacher {n}" if n > 1 else "teacher": folder for n, folder in enumerate(folders, 1)}


def of_heads(valid: Mapping[str, float], joint: CriticTask) -> dict[str, dict]:
    """{kind: its part of a result}, laid out as that of a critic of one kind; and the share of its held-out
    pairs that were learnt from, by another label."""
    learnt, found = set(map(pair_of, *joint.train[:2])), {}
    for kind, task in joint.tasks.items():
        own = {name: valid[f"{kind}_{name}"] for name in HEAD_FIGURES}
        held = list(map(pair_of, *task.valid[:2]))
        again = sum(pair in learnt for pair in held) / len(held)
        found[kind] = {"kind": kind, "valid": own, "baselines": task.baselines, "learnt_elsewhere": again}
    return found


def report(result: dict, session: Session) -> None:
    """The critic beside its baselines, one row each."""
    names = list(result["valid"])
    kind = result["kind"]
    session.say(
        f"{kind}: on the validation side, whose best epoch was chosen there too (a little flattering)"
    )
    session.say("  " + " ".join(f"{n:>12}" for n in ["", *names]))
    for row, values in {**result["baselines"], "this critic": result["valid"]}.items():
        cells = [f"{values[n]:{max(12, len(n))}.3f}" for n in names]
        session.say("  " + " ".join([f"{row:>12}", *cells]))
    if is_useless(result["valid"], result["baselines"]):
        session.say(
            f"WARNING: the {kind} critic is no better than guessing: what it labels or leads is led by "
            "noise. Train it longer, with another --lr, or from another --model"
        )


def write_baselines(task: CriticTask, paths: Paths, overwrite: bool) -> dict:
    """{baseline: {valid: its figures}}, and how many examples each side has, to
    results/classifiers/KIND-VARIANT.json."""
    target = paths.results / "classifiers" / f"{task.kind}{task.variant}.json"
    refuse_existing([target], overwrite)
    content: dict = {name: {"valid": figures} for name, figures in task.baselines.items()}
    content["examples"] = {"train": len(task.train[2]), "valid": len(task.valid[2])}
    storage.write_json(target, content)
    for name, figures in task.baselines.items():
        print(f"{task.kind}, {name}: macro-F1 {figures['macro_f1']:.1f}, accuracy {figures['accuracy']:.1f}")
    print(f"written: {target}")
    return content
