"""What the commands can be asked for: the frozen settings in which their `args` end, and the doors to them.

As light as options.py, so that `--help` answers at once.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from options import CRITICS, DIMENSIONS, FAMILIES, SENTIMENT, Paths, Wrong, number
from storage import split_revision

EXEMPLAR_WAYS = ("none", "prepend", "t5", "glove-t5")
PARAPHRASER = "Vamsi/T5_Paraphrase_Paws"
#: the sides of a retriever, and where each begins by default
DPR_HUB = {
    "question": "facebook/dpr-question_encoder-single-nq-base",
    "context": "facebook/dpr-ctx_encoder-single-nq-base",
}

#: --candidates: a listener turn (corpora.Example) sees those training replies of which this is the same
CANDIDATES: dict[str, Callable[[Any], str]] = {
    "same-emotion": lambda turn: turn.emotion,  # the paper's rule; of test dialogues the gold emotion, too
    "all": lambda turn: "",
}


#: flags that change neither the updates nor which of them is kept; what a path leads to is compared by
#: content
FREE = {
    "workdir",
    "overwrite",
    "device",
    "resume",
    "log_every",
    "save_every",
    "name",
    "deterministic",
    "labels",
    "exemplars",
    *CRITICS,
    "family",
    "model",
    "exemplar_model",
    "base",
    "init_from",
    "teacher",
    "encoder",
    "question_encoder",
    "context_encoder",
}


@dataclass(frozen=True)
class TrainingOptions:
    """The flags of the training loop (`add_training` says what each one means)."""

    epochs: int
    max_steps: int
    lr: float
    batch_size: int | str  # "auto" until the loop has tried out what fits
    effective_batch: int  # examples in an update where batch_size is "auto"
    batch_tokens: int
    accumulate: int
    schedule: str
    warmup_steps: int
    weight_decay: float
    clip: float
    patience: int
    eval_every: int
    save_every: int
    log_every: int
    resume: str
    overwrite: bool
    seed: int
    compile: bool


@dataclass(frozen=True)
class Decoding:
    """How replies are written: sampling among the `top_k` most likely tokens, and of these the fewest that
    reach the share `top_p`, or beam search where `beams` > 1; no `no_repeat_ngram` tokens in a row a second
    time (0: they may come again)."""

    top_k: int
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    beams: int = 1
    no_repeat_ngram: int = 0
    predict_batch_size: int = 1
    seed: int = 0
    predict: bool = True  # False: no replies, only the gold replies' likelihood
    replies: int = 1  # to each context


#: how a reply is written in use, where nothing else is asked for (chosen by judges and by reading, LOG.md)
IN_USE = Decoding(top_k=20, temperature=0.9, max_new_tokens=60)


@dataclass(frozen=True)
class Weights:
    """What counts in the choice among candidates:

    likelihood x mean log-probability (nats) - the sum over target dimensions of weight x distance,

    the distance as a share of the critic's range: 0 where its value is the target, 1 at the other end.
    """

    likelihood: float = 1.0
    empathy: float = 5.0
    sentiment: float = 5.0

    def total(self, log_probability: Any, distances: Mapping[str, Any]) -> Any:
        """Of one candidate, or element by element of arrays. `distances`: {target dimension: share}."""
        total = self.likelihood * log_probability
        for kind, distance in distances.items():
            total = total - (self.sentiment if kind == "sentiment" else self.empathy) * distance
        return total


def given_flags(decoding: Decoding) -> dict[str, Any]:
    """The flags of a decoding for a printed command, without those that change nothing."""
    usual = {field.name: field.default for field in dataclasses.fields(decoding)}
    return {name: value for name, value in vars(decoding).items() if value != usual[name]}


@dataclass(frozen=True)
class SampledOptions:
    """A loss on replies that the model samples (`add_sampled_flags` says what each flag means)."""

    sampled_loss_w: float
    sampled_reward: str
    samples: int
    sampled_examples: int
    sampled_top_k: int
    sampled_temperature: float

    def decoding(self, max_new_tokens: int) -> Decoding:
        """How these replies are drawn."""
        return Decoding(self.sampled_top_k, self.sampled_temperature, max_new_tokens)


@dataclass(frozen=True)
class GeneratorOptions:
    """What a generator is and learns from (`add_generator_flags` says what each flag means)."""

    add_exemplars: str
    top_exemplars: int
    exemplar_len: int
    exemplar_model: str
    exemplar_layers: int
    main_loss_w: float
    empathy_loss_w: float
    sentiment_loss_w: float
    strategy: int
    src_len: int
    tgt_len: int
    dropout: float
    control: str | None
    seed: int
    init_from: str | None = None
    critic_targets: str = "labels"
    critic_ramp: int = 0
    balance: float = 0.0
    log_gradients: bool = False
    targets: str | None = None
    empathy_losses: list[str] | None = None  # None: all of them

    @property
    def dimensions(self) -> list[str]:
        """Those of empathy whose critics' losses count: none where their weight is 0."""
        chosen = self.empathy_losses or DIMENSIONS
        return [dim for dim in DIMENSIONS if dim in chosen and self.empathy_loss_w > 0]

    @property
    def critics(self) -> list[str]:
        """The critics that the loss needs: none where both weights are 0."""
        return self.dimensions + [SENTIMENT] * (self.sentiment_loss_w > 0)

    def weight(self, term: str) -> float:
        """The weight of a loss term (paper, eq. 14)."""
        empathy = dict.fromkeys(DIMENSIONS, self.empathy_loss_w)
        return {"nll": self.main_loss_w, SENTIMENT: self.sentiment_loss_w, **empathy}[term]

    @property
    def default_name(self) -> str:
        """lempex, or what the ablation leaves of it; -marks where replies are marked with their levels,
        -all-turns where the speaker's turns are learnt, too."""
        marks = "-marks" if self.control else ""
        return self.of_losses + marks + ("-all-turns" if self.targets else "")

    @property
    def of_losses(self) -> str:
        name = {"none": "plain", "prepend": "exemplars", "t5": "pool-t5", "glove-t5": "pool-glove"}[
            self.add_exemplars
        ]
        if self.critics == list(CRITICS):
            return {"exemplars": "lempex"}.get(name, f"{name}-critics")
        empathy = "".join(f"-{dim}" for dim in self.dimensions)
        if self.dimensions == list(DIMENSIONS):
            empathy = "-empathy"
        sentiment = "-sentiment" if self.sentiment_loss_w > 0 else ""
        return name + empathy + sentiment


@dataclass(frozen=True)
class CriticOptions:
    """What a critic is (`add_critic_flags` says what each flag means)."""

    model: str
    size: str
    pooling: str
    layers: int | None
    context_len: int
    reply_len: int
    dropout: float
    word_dropout: float
    head_dropout: float
    seed: int
    init_from: str | None = None
    mixture_share: float = 0.0

    @property
    def family(self) -> str:
        """t5, glove-t5, minilm, or the last part of a name (without its revision) or folder: names the run,
        so that the commands chain."""
        if self.model in FAMILIES:
            return self.model
        return split_revision(self.model)[0].rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class StageCommand:
    """What the scripts of all generators are asked for."""

    training: TrainingOptions
    decoding: Decoding
    paths: Paths
    sampled: SampledOptions
    rewards: dict[str, Path]  # the run folder of each critic that sampled replies are rewarded by
    leading: str  # the family whose critics lead and reward, where none are named
    name: str
    predict_split: str | None  # None: no predictions after training
    inference: str | None
    output: str | None  # of inference: where predictions go, if not to the run
    device: dict[str, Any]  # arguments of session.Session
    flags: dict[str, Any]  # for the record, and to compare on resume


@dataclass(frozen=True)
class GeneratorCommand(StageCommand):
    """All that the script of a T5 or GloVe-T5 was asked for."""

    family: str
    options: GeneratorOptions
    critics: dict[str, Path]  # the run folder of each critic that the loss asks for


def stage_fields(args: argparse.Namespace, leading: str, name: str) -> dict[str, Any]:
    """The fields of a `StageCommand`; `leading`: whose critics reward; `name`: the run's, where none is
    given, without what its loss on sampled replies adds."""
    rewarded = f"-{args.sampled_reward}" if args.sampled_loss_w else ""
    rewarding = CRITICS if args.sampled_loss_w else ()
    return {
        "name": args.name or name + rewarded,
        "training": pick(TrainingOptions, args),
        "decoding": pick(Decoding, args),
        "paths": Paths(args.workdir, labels=args.labels, exemplars=args.exemplars),
        "sampled": pick(SampledOptions, args),
        "leading": leading,
        "rewards": {kind: critic_folder(args, kind, leading) for kind in rewarding},
        "predict_split": args.predict_split if args.predict else None,
        "inference": args.inference,
        "output": args.output,
        "device": device_flags(args),
        "flags": vars(args),
    }


def generator_command(args: argparse.Namespace, family: str) -> GeneratorCommand:
    """The door at which a generator's `args` end."""
    options = pick(GeneratorOptions, args)
    leading = args.family or family
    critics = {kind: critic_folder(args, kind, leading) for kind in options.critics}
    return GeneratorCommand(
        family=family, options=options, critics=critics, **stage_fields(args, leading, options.default_name)
    )


def critic_folder(args: argparse.Namespace, kind: str, family: str) -> Path:
    """The run folder of a critic: the one given, or the family's."""
    return Path(getattr(args, kind) or Paths(args.workdir).find_critic(kind, family))


@dataclass(frozen=True)
class CausalOptions:
    """What a causal language model is and learns from (train_causal_lm.py says what each flag means)."""

    model: str
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    add_exemplars: str
    top_exemplars: int
    exemplar_len: int
    src_len: int
    tgt_len: int
    valid_conversations: int
    pack: bool
    control: str | None
    seed: int
    init_from: str | None = None
    base: str | None = None

    @property
    def default_name(self) -> str:
        """plain or exemplars, and -marks where replies are marked with their levels."""
        name = "plain" if self.add_exemplars == "none" else "exemplars"
        return f"{name}-marks" if self.control else name


@dataclass(frozen=True)
class CausalCommand(StageCommand):
    """All that the script of the causal language models was asked for."""

    options: CausalOptions


def causal_command(args: argparse.Namespace) -> CausalCommand:
    """The door at which a causal language model's `args` end."""
    options = pick(CausalOptions, args)
    return CausalCommand(options=options, **stage_fields(args, args.family, options.default_name))


@dataclass(frozen=True)
class TeacherOptions:
    """Critics that label texts for another one (`add_teacher_flags` says what each flag means)."""

    teacher: Sequence[str]
    turns: int
    pieces: int
    teacher_w: float


@dataclass(frozen=True)
class CriticCommand:
    """All that a critic's script was asked for."""

    options: CriticOptions
    training: TrainingOptions
    paths: Paths
    name: str | None
    device: dict[str, Any]  # arguments of session.Session
    flags: dict[str, Any]  # for the record, and to compare on resume


def critic_command(args: argparse.Namespace) -> CriticCommand:
    """The door at which a critic's `args` end."""
    return CriticCommand(
        options=pick(CriticOptions, args),
        training=pick(TrainingOptions, args),
        paths=Paths(args.workdir),
        name=args.name,
        device=device_flags(args),
        flags=vars(args),
    )


@dataclass(frozen=True)
class RetrieverOptions:
    """What the retriever learns from (DPR/train_dpr.py says what each flag means)."""

    dataset: str
    encoder: str | None
    question_encoder: str
    context_encoder: str
    pooling: str
    max_length: int
    max_passage_length: int
    hard_negatives: int
    other_negatives: int
    valid_queries: int
    seed: int
    drop_without_positive: bool = False

    @property
    def begin(self) -> dict[str, str]:
        """{side: hub name or folder from which its encoder begins}."""
        return {
            "question": self.encoder or self.question_encoder,
            "context": self.encoder or self.context_encoder,
        }


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoders a retriever has, and how they read (dpr_exemplar_retriever.py explains each flag)."""

    path: str | None
    encoder: str | None
    pooling: str | None
    max_length: int | None
    max_passage_length: int | None
    batch_size: int


@dataclass(frozen=True)
class SearchOptions(EncoderOptions):
    """How exemplars are found with them."""

    candidates: str
    match: str
    index: str
    top_k: int
    splits: list[str]
    seed: int


def device_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that session.Session takes."""
    names = ("device", "precision", "seed", "deterministic")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


Settings = TypeVar("Settings")


def pick(kind: Callable[..., Settings], args: argparse.Namespace) -> Settings:
    """A settings dataclass out of the flags of the same names: here `args` ends."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names})


def target(text: str) -> Any:
    """What a reply should be like, {critic: level, or sentiment}, from emo=1,sentiment=0.4; or what is
    wrong."""
    found = {}
    for part in re.sub(r"\s*=\s*", "=", text.strip()).replace(" ", ",").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        if name not in CRITICS:
            return Wrong(
                f"{text}: no dimension {name!r}; the known ones are {', '.join(CRITICS)}, as in emo=1,exp=0"
            )
        if name in found:
            return Wrong(f"{text}: {name} is named twice; name each dimension once")
        if not value:
            return Wrong(f"{text}: {name} must be given a level, as in {name}=1")
        limits = {"least": -1, "most": 1} if name == SENTIMENT else {"least": 0, "most": 2}
        found[name] = number(float, **limits)(value)
        if isinstance(found[name], Wrong):
            return Wrong(f"{text}: {name}: {found[name].problem}")
    return found
