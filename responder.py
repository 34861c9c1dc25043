"""A reply to one's own words: candidates are sampled, judged, and the best of them is the reply.

Exemplars are found live, in a pool, without knowing the emotion. Any generator serves through `Writer`.
"""

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advice
import distress
import exemplars
import runs
from chats import causal_data, prompt_data
from corpora import EMOTIONS, Example
from critics import Critics, Score, open_critics, scores
from dataloaders import encode, generator_data
from DPR.retriever import Hit, Pool, Retriever
from hub import Published, folder_of
from marks import in_words, of_target
from metrics import unknown_words
from models import Generator, token_nll, until_end
from options import CRITICS, Paths, UserError, texts_of
from predicting import decoding_arguments
from pretrained import decoded, load_tokenizer
from records import require_utf8
from searching import check_emotion
from session import Session, own_random_stream
from settings import IN_USE, Decoding, Weights
from storage import read_json
from vocabulary import logits_nll

Written = list[tuple[str, float]]  # replies, each with the mean log-probability of its tokens (nats)

# ---------------------------------------------------------------------------------------------------- writers


class Writer(ABC):
    """All that a responder asks of a generator: one dialogue as a batch, and n replies to it."""

    family: str  # whose critics know its words best
    reads_exemplars: bool
    top_exemplars: int
    marks: Mapping[str, int]  # {dimension: levels} that it was trained to be told; empty: none
    tokenizer: Any

    def unknown(self, turns: Sequence[str]) -> list[str]:
        """The words of a dialogue that it cannot tell from one another."""
        found = unknown_words(self.tokenizer, turns)
        return sorted(word for word in found if any(letter.isalnum() for letter in word))

    @abstractmethod
    def encode(
        self, turns: Sequence[str], texts: Sequence[str], marks: Mapping[str, int] | None = None
    ) -> dict:
        """A batch of one dialogue (oldest turn first) with its exemplars (best first), and the levels that
        the reply is to show."""

    @abstractmethod
    def unread(self, turns: Sequence[str]) -> int:
        """How many of the oldest turns are not read, or not read whole."""

    @abstractmethod
    def generate(self, batch: dict, count: int, decoding: Decoding) -> Written:
        """`count` replies, drawn from torch's current random stream."""

    @abstractmethod
    def log_probability(self, turns: Sequence[str], texts: Sequence[str], reply: str) -> float:
        """The mean over the tokens of a given reply, its end included, in nats, by the model that is told no
        marks."""


def dialogue(turns: Sequence[str], reply: str = "") -> Example:
    """One's own words as the readers of corpora give a listener's turn."""
    return Example("dialogue", len(turns) + 1, "", tuple(turns), reply)


def mean_log_probability(each: Tensor, ended: Tensor) -> list[float]:
    """(N, T) of each token, and whether it is an end -> the mean up to the first end, itself included."""
    counted = until_end(ended)
    return (each.masked_fill(~counted, 0).sum(1) / counted.sum(1)).tolist()


class Seq2SeqWriter(Writer):
    """models.Generator: T5 and GloVe-T5, with any way of exemplars."""

    def __init__(self, folder: Path, session: Session, paths: Paths, base: str | None = None):
        self.model = Generator.from_pretrained(folder).to(session.device)
        self.settings, self.session = self.model.settings, session
        self.tokenizer = load_tokenizer(folder)
        self.way = exemplars.enter_again(
            folder, self.settings, self.tokenizer, session, paths, base, "--base"
        )
        self.family = self.settings.family or "t5"
        self.reads_exemplars = self.settings.exemplars != "none"
        self.top_exemplars, self.marks = self.settings.top_exemplars, self.settings.marks

    def encode(
        self,
        turns: Sequence[str],
        texts: Sequence[str],
        marks: Mapping[str, int] | None = None,
        reply: str = "",
    ) -> dict:
        entering = self.way.live([texts])
        data = generator_data(
            [dialogue(turns, reply)],
            self.tokenizer,
            src_len=self.settings.src_len,
            tgt_len=None,
            exemplars=entering,
            marks=[in_words(marks)] if marks else None,
            start=self.model.t5.config.decoder_start_token_id,
        )
        return self.session.move(data.collate([0]))

    def unread(self, turns: Sequence[str]) -> int:
        ids = encode(self.tokenizer, turns)
        left = self.settings.src_len
        for n, turn in enumerate(reversed(turns)):
            left -= len(ids[turn]) + 1
            if left < 0:
                return len(turns) - n
        return 0

    def generate(self, batch: dict, count: int, decoding: Decoding) -> Written:
        out: Any = self.model.generate(
            batch,
            num_return_sequences=count,
            return_dict_in_generate=True,
            output_logits=True,
            **decoding_arguments(decoding, self.tokenizer, self.model.vocabulary),
        )
        # of the model itself, not of what sampling leaves of it
        each = self.model.t5.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
        said = out.sequences[:, -each.shape[1] :]  # (N, T) without what it was made to begin with
        likely = mean_log_probability(each, said == self.tokenizer.eos_token_id)
        return list(zip(decoded(self.tokenizer, said), likely, strict=True))

    def log_probability(self, turns: Sequence[str], texts: Sequence[str], reply: str) -> float:
        batch = self.encode(turns, texts, reply=reply)
        nll = token_nll(self.model(batch), batch["labels"])  # (1, T)
        return -float(nll.sum() / batch["reply_mask"].sum())


class CausalWriter(Writer):
    """causal_models.CausalGenerator: a chat with a language model."""

    family = "t5"  # it has no critics of its own

    def __init__(self, folder: Path, session: Session, paths: Paths, base: str | None = None):
        from causal_generators import load  # late: brings peft

        model = load(folder, paths, session, base)
        self.model, self.session = model.for_use(session.device, session.precision), session
        self.settings, self.tokenizer = model.settings, model.tokenizer
        self.reads_exemplars = self.settings.exemplars != "none"
        self.top_exemplars, self.marks = self.settings.top_exemplars, self.settings.marks

    def prompt(self, turns: Sequence[str], texts: Sequence[str] = (), **changes: Any) -> dict:
        layout: dict[str, Any] = self.settings.layout | changes
        return prompt_data([dialogue(turns)], self.tokenizer, exemplars=[texts], **layout).collate([0])

    def encode(
        self, turns: Sequence[str], texts: Sequence[str], marks: Mapping[str, int] | None = None
    ) -> dict:
        return self.session.move(self.prompt(turns, texts, marks=[in_words(marks or {})]))

    def unread(self, turns: Sequence[str]) -> int:
        read = self.prompt(turns)["input_ids"].shape[1]
        for first in range(0, len(turns), 2):
            if self.prompt(turns[first:], src_len=10**9)["input_ids"].shape[1] <= read:
                return first
        return len(turns)  # the last turn itself is cut

    def generate(self, batch: dict, count: int, decoding: Decoding) -> Written:
        from sampling import sample

        draws = torch.rand(1, count, decoding.max_new_tokens)
        found = sample(self.model, batch, draws, decoding)
        return list(zip(self.model.replies(found.ids), found.log_probability.tolist(), strict=True))

    def log_probability(self, turns: Sequence[str], texts: Sequence[str], reply: str) -> float:
        layout: dict[str, Any] = self.settings.layout | {"tgt_len": None, "exemplars": [texts]}
        data = causal_data([dialogue(turns, reply)], self.tokenizer, packed=False, **layout)
        batch = self.session.move(data.collate([0]))
        return -float(logits_nll(self.model(batch), batch["target_ids"]).mean())  # (N, V), (N,) -> ()


WRITERS: dict[str, type[Writer]] = {"Generator": Seq2SeqWriter, "CausalGenerator": CausalWriter}


def open_writer(folder: Path, session: Session, paths: Paths, base: str | None = None) -> Writer:
    """The generator of a run's folder. `base`: where the model lies that it was trained on, if it was moved.

    Raises `UserError` where the folder holds something else, or that model is missing.
    """
    kind = runs.model_in(folder)
    if kind == "Critic":
        config = read_json(Path(folder) / "config.json")
        flags = " or ".join(f"--{critic}" for critic in config.get("heads") or [config.get("kind")])
        raise UserError(f"{folder}: a critic, not a generator; respond.py takes it with {flags}")
    if kind not in WRITERS:
        if (Path(folder) / "args.json").exists():
            runs.require_run(folder, "")  # begun, and not finished: the command that goes on
        what = "no such folder" if not Path(folder).is_dir() else "holds no trained generator"
        raise UserError(
            f"{folder}: {what}; give the folder of a finished run, as saved/t5/lempex, "
            f"or make one with: {advice.command('train_t5.py', workdir=paths.root)}"
        )
    return WRITERS[kind](Path(folder), session, paths, base)  # type: ignore[call-arg]


# --------------------------------------------------------------------------------------------------- replying


@dataclass(frozen=True)
class Candidate:
    """One sampled reply."""

    text: str
    log_probability: float  # mean over its tokens, its end included, in nats
    scores: dict[str, Score]  # by each critic
    total: float  # what it was ranked by


@dataclass(frozen=True)
class Answer:
    """A reply, and what it came from."""

    reply: str
    candidates: list[Candidate]  # best first; the first is the reply
    exemplars: list[Hit]  # best first
    unread: int  # oldest turns that were not read, or not whole
    notice: str | None  # where words of acute distress were said
    seed: int  # gives the same reply again
    unknown: Sequence[str] = ()  # words that the generator does not know
    target: Mapping[str, float] = field(default_factory=dict)  # what it was to come close to

    @property
    def notes(self) -> list[str]:
        """What of the dialogue did not reach the generator, a sentence each."""
        found = []
        if self.unread:
            found.append(f"the dialogue is long; its oldest {self.unread} turns were left out or cut")
        if self.unknown:
            words = ", ".join(f"{w[:40]}..." if len(w) > 40 else w for w in self.unknown[:5])
            words += " ..." if len(self.unknown) > 5 else ""
            found.append(f"words that this generator does not know: {words}")
        return found

    @property
    def scores(self) -> dict[str, Score]:
        """What each critic says of the reply."""
        return self.candidates[0].scores


class Responder(Published):
    """Replies to a dialogue, by a trained generator; critics, a retriever and a pool are used where given.

    Safe to be used by several threads.
    """

    #: one for all: the random streams that a reply is drawn from are the process's
    drawing = threading.Lock()

    def __init__(
        self,
        writer: Writer,
        critics: Critics,
        retriever: Retriever | None,
        pool: Pool | None,
        session: Session,
        weights: Weights | None = None,
        decoding: Decoding | None = None,
    ):
        self.writer, self.critics, self.session = writer, critics, session
        self.retriever, self.pool = retriever, pool
        self.weights = weights or Weights()
        self.decoding = decoding or IN_USE

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path,
        critics: Mapping[str, str | Path] | None = None,
        retriever: str | Path | Retriever | None = None,
        pool: Pool | Sequence[str] | None = None,
        session: Session | None = None,
        workdir: str | Path = ".",
        base: str | None = None,
        **settings: Any,
    ) -> "Responder":
        """The generator of a run, with critics {kind: run} and exemplars out of `pool`.

        A run is a folder, or a name on the hub (user/name, downloaded once). `base`: where the model lies
        that an adapter (or an encoder of pooled exemplars) was trained on, if it was moved.
        `settings`: weights and decoding. Raises `UserError` where a folder holds something else.
        """
        session = session or Session()
        paths = Paths(workdir)
        folder = folder_of(run)
        writer = open_writer(folder, session, paths, base)
        if isinstance(critics, str | Path):
            raise UserError(f"critics: {critics} is one place; give each by what it scores: {{'emo': RUN}}")
        folders = {kind: folder_of(critic) for kind, critic in (critics or {}).items()}
        finder = (
            Retriever.from_pretrained(retriever, session) if isinstance(retriever, str | Path) else retriever
        )
        if isinstance(pool, str | Path):
            raise UserError(f"pool: {pool} is one text; give a list of replies, or read the file first")
        if (finder is None) != (pool is None):
            raise UserError(f"{run}: exemplars need both a retriever and a pool; give both or none")
        if finder is not None and not writer.reads_exemplars:
            raise UserError(
                f"{run}: was trained without exemplars and reads none; leave retriever and pool out"
            )
        replies = pool if isinstance(pool, Pool) else None
        if finder is not None and pool is not None and replies is None:
            replies = finder.pool(pool)  # type: ignore[arg-type]
        judges = open_critics(folders, session, folders)
        made = cls(writer, judges, finder, replies, session, **settings)
        made.folder = folder
        return made

    @property
    def has_exemplars(self) -> bool:
        return self.writer.reads_exemplars and self.retriever is not None and bool(self.pool)

    def check_target(self, target: Mapping[str, float]) -> None:
        """Raises `UserError` where neither a critic nor a mark of the generator's knows the dimension, or one
        that does not know the level."""
        for kind, value in target.items():
            known = []
            if kind in self.critics:
                critic = self.critics[kind]
                known.append((critic.limits, "this critic knows values", f" ({critic.folder})"))
            if kind in self.writer.marks:
                known.append(((0, self.writer.marks[kind] - 1), "this generator's marks have levels", ""))
            if not known and kind not in CRITICS:
                raise UserError(f"--target {kind}: no such dimension; there are {', '.join(CRITICS)}")
            if not known:
                there = ", ".join(self.critics) or "none"
                raise UserError(
                    f"--target {kind}: there is no {kind} critic (critics: {there}); give one with "
                    f"--{kind} RUN"
                )
            for (low, high), who, where in known:
                if not low <= value <= high:
                    raise UserError(f"--target {kind}={value:g}: {who} from {low} to {high}{where}")

    def reply(
        self,
        turns: Sequence[str],
        n_candidates: int = 8,
        target: Mapping[str, float] | None = None,
        seed: int | None = None,
        emotion: str | None = None,
    ) -> Answer:
        """The best of `n_candidates` sampled replies to a dialogue: its turns, oldest first, the speaker's
        last, or one turn alone.

        `target`: {critic: level, or sentiment} that a reply should come close to; a generator with marks is
        told, too; dimensions that are not named are left alone. `seed`: the same one gives the same reply.
        `emotion`: restricts the exemplars.
        """
        turns = [" ".join(t.split()) for t in texts_of(turns, "turn")]
        check_turns(turns)
        if n_candidates < 1:
            raise UserError(f"{n_candidates} candidates: the best is chosen among one at least")
        if isinstance(target, str):
            raise UserError(f"target: {target!r} is a text; give levels by their dimension: {{'emo': 1}}")
        target = dict(target or {})
        self.check_target(target)
        seed = secrets.randbelow(2**31) if seed is None else seed
        if emotion is not None and not self.writer.reads_exemplars:
            who = self.folder or "this generator"
            raise UserError(f"{who}: reads no exemplars, so no emotion restricts them; leave it out")
        check_emotion(emotion, EMOTIONS if self.pool is None else self.pool.emotions)
        hits: list[Hit] = []
        if self.has_exemplars:
            assert self.retriever is not None and self.pool is not None
            wanted = None if emotion is None else [emotion]
            asked = [" ".join(turns)]
            (hits,) = self.retriever.search(asked, self.pool, self.writer.top_exemplars, emotions=wanted)
        batch = self.writer.encode(turns, [hit.text for hit in hits], of_target(target, self.writer.marks))
        with self.drawing, own_random_stream(seed), torch.inference_mode(), self.session.autocast():
            written = self.writer.generate(batch, n_candidates, self.decoding)
        candidates = self.ranked([w for w in written if w[0]], turns, target)
        if not candidates:
            raise UserError("every candidate was empty; try another --seed, or more --candidates-per-reply")
        spoken = distress.notice(turns[::2])
        unread, unknown = self.writer.unread(turns), self.writer.unknown(turns)
        return Answer(candidates[0].text, candidates, hits, unread, spoken, seed, unknown, dict(target))

    def ranked(self, written: Written, turns: Sequence[str], target: Mapping[str, float]) -> list[Candidate]:
        """The candidates with all that is known of them, best first; equal ones in the order of their
        drawing."""
        texts = [text for text, _ in written]
        said = scores(self.critics, texts, [tuple(turns)] * len(texts))
        candidates = []
        for n, (text, log_probability) in enumerate(written):
            own = {kind: found[n] for kind, found in said.items()}
            distances = {}
            for kind in (k for k in target if k in self.critics):
                low, high = self.critics[kind].limits
                distances[kind] = abs(own[kind].value - target[kind]) / (high - low)
            total = self.weights.total(log_probability, distances)
            candidates.append(Candidate(text, log_probability, own, total))
        return sorted(candidates, key=lambda c: -c.total)


def check_turns(turns: Sequence[str]) -> None:
    """Raises `UserError` where a reply cannot be written to these turns."""
    if not turns or not all(turns):
        raise UserError("a dialogue needs turns, each with a text; leave empty ones out")
    require_utf8(turns)
    if len(turns) % 2 == 0:
        raise UserError(
            f"{len(turns)} turns: the last must be the speaker's, and the speaker begins, so their number "
            "is odd (speaker, listener, speaker); leave one out"
        )
