"""Critics in use: loaded, chosen for a loss, asked in bulk, and as judges. Knows nothing of generators.

What a critic computes stands in models.Critic, how it is trained in critic_training.py.
"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import advice
import bundled
import caches
import runs
import storage
from critic_set import CriticSet
from dataloaders import Data, critic_data, encode, plan_once, tokenizer_hash
from hub import Published, folder_given, folder_of
from models import Critic as CriticModel
from options import CRITICS, DIMENSIONS, SENTIMENT, Paths, UserError, by_flag, is_empty, texts_of, with_halves
from pretrained import load_tokenizer
from session import Session

# ------------------------------------------------------------------------------------------ loaded and chosen


def holds(kinds: Sequence[str]) -> str:
    """What a folder holds that was given for another kind, and what to do with it."""
    flags = " or ".join(f"--{kind}" for kind in kinds)
    return f"holds a critic of {', '.join(kinds)}; give it with {flags}"


@dataclass(frozen=True)
class LossCritics:
    """The frozen critics that a loss asks for, and what they were."""

    critics: CriticSet
    folders: dict[str, Path]
    checksums: dict[str, str]  # {kind: sha256 of its weights}


def choose_for_loss(
    folders: Mapping[str, Path],
    family: str,
    tokenizer: str,
    reply_len: int,
    session: Session,
    vocabulary: int | None = None,
) -> LossCritics:
    """The critics of `folders`, frozen; says how good each one is. `tokenizer`: the generator's hash.
    `vocabulary`: the length of its table of words.

    Raises `UserError` where one cannot read the generator's words, or fewer than `reply_len` tokens of a
    reply.
    """
    half = session.precision == "bf16"
    asked = {kind: critic.critic for kind, critic in load_critics(folders, family, session).items()}
    critics = CriticSet(asked, session.device, half)
    critics.check_tokenizer(tokenizer, vocabulary)
    for kind, folder in folders.items():
        reads = critics.critics[kind].settings.reply_len
        if reply_len > reads + 1:
            raise UserError(
                f"--tgt-len {reply_len}: the {kind} critic reads only {reads} tokens of a reply; give "
                f"at most {reads + 1}, or a critic that was trained with a longer --reply-len"
            )
        session.say(f"critic {kind}: {folder} | {quality(folder, kind)}")
    for folder in dict.fromkeys(folders.values()):
        if len(heads := [kind for kind, own in folders.items() if own == folder]) > 1:
            session.say(
                f"note: {', '.join(heads)} are heads of one encoder, and a loss reads it for each of them; "
                "critics of one dimension each cost as much, and can be smaller"
            )
    checksums = {k: storage.sha256(f / "model.safetensors") for k, f in folders.items()}
    return LossCritics(critics, dict(folders), checksums)


def result_of(folder: Path, kind: str) -> dict:
    """The result of a finished critic in one kind."""
    result = storage.read_json(folder / "result.json")
    return result.get("heads", {}).get(kind, result)


def is_useless(valid: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a critic is no better than always saying the mean, or the most frequent label."""
    if "mse" in valid:
        return not valid["mse"] < baselines["mean"]["mse"]
    majority = baselines["majority"]
    more_right = valid["accuracy"] > majority["accuracy"]
    return not more_right and not valid["macro_f1"] > majority["macro_f1"] + 5


def quality(folder: Path, kind: str) -> str:
    """A critic's own figures beside its baselines, and a plain warning where it is no better than chance."""
    result = result_of(folder, kind)
    valid, baselines = result["valid"], result["baselines"]
    if "mse" in valid:
        mean = baselines["mean"]["mse"]
        text = f"mse {valid['mse']:.4f} (the mean's {mean:.4f})"
    else:
        majority, tfidf = baselines["majority"], baselines["tfidf"]
        text = f"macro-F1 {valid['macro_f1']:.1f} "
        text += f"(majority class {majority['macro_f1']:.1f}, TF-IDF {tfidf['macro_f1']:.1f})"
    if is_useless(valid, baselines):
        text += (
            " | WARNING: no better than guessing, its loss will be noise; "
            "train it longer or set its weight to 0"
        )
    return text


# ------------------------------------------------------------------------------------------------------ asked


def loss_batches(data: Data, session: Session, examples: int) -> list[dict]:
    """At most so many examples, evenly spaced, 16 a batch."""
    count = min(examples, len(data))
    numbers = [i * len(data) // count for i in range(count)]
    return [session.move(data.collate(numbers[i : i + 16])) for i in range(0, len(numbers), 16)]


@torch.inference_mode()
def mean_losses(
    critics: CriticSet, batches: Sequence[dict], soft: Callable[[dict], Tensor], session: Session
) -> dict[str, float]:
    """{kind: mean loss} on what `soft` makes of each batch: soft replies (B, T, V)."""
    sums = dict.fromkeys(critics.critics, 0.0)
    for batch in batches:
        with session.autocast():
            found = critics.losses(soft(batch), batch)
        for kind in sums:
            sums[kind] += float(found[kind])
    count = sum(len(batch["labels"]) for batch in batches)
    return {kind: total / count for kind, total in sums.items()}


def uninformed_losses(
    critics: CriticSet, data: Data, session: Session, examples: int = 128
) -> dict[str, tuple[float, float]]:
    """{kind: (mean loss, loss of a guess)} on replies that say nothing: each word's frequency, at every
    position.

    The guess knows how frequent the labels are. Where a critic is far worse than guessing on a mixture of
    words, a generator that still writes mixtures is led by its errors.
    """
    if not critics:
        return {}
    batches = loss_batches(data, session, examples)
    words = torch.cat([b["labels"][b["reply_mask"] > 0] for b in batches])
    vocabulary = len(next(iter(critics.critics.values())).embeddings)  # the same for all: see check_tokenizer
    share = torch.bincount(words, minlength=vocabulary) / len(words)  # (V,)
    found = mean_losses(critics, batches, lambda batch: share.expand(*batch["labels"].shape, -1), session)
    out = {}
    for kind, critic in critics.critics.items():
        targets = torch.cat([b["critic_targets"][kind] for b in batches]).double()
        out[kind] = found[kind], guess_loss(targets, critic.settings.is_regressor)
    return out


def guess_loss(targets: Tensor, regression: bool) -> float:
    """The loss of always saying the mean, or the classes' frequencies (their entropy, in nats)."""
    if regression:
        return float(targets.var(correction=0))
    shares = targets.unique(return_counts=True)[1] / len(targets)
    return float((shares * shares.log()).sum().abs())


def say_uninformed(critics: CriticSet, data: Data, session: Session) -> None:
    """Before a training: each critic's loss on a reply that says nothing, and a warning where it is far
    off."""
    for kind, (loss, prior) in uninformed_losses(critics, data, session).items():
        line = f"critic {kind} on a reply that says nothing: loss {loss:.2f}, "
        line += f"of a guess by frequency {prior:.2f}"
        if loss > 2 * prior + 0.1:
            line += (
                " | WARNING: confidently wrong there; train it with --mixture-share 0.5, or give its loss a "
            )
            line += "weight of 0.1 or less where the generator begins from scratch"
        session.say(line)


#: padded tokens in one forward pass where no number of texts is asked for, by device: few enough to stay in a
#: processor's cache, enough to keep a GPU busy
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


def critic_scores(
    critic: CriticModel,
    data: Data,
    session: Session,
    title: str,
    batch_size: int = 0,
    keep: Path | None = None,
) -> np.ndarray:
    """(N, outputs) probabilities of a classifier, or (N, 1) scores of the regressor. `batch_size` 0: as many
    as `BATCH_TOKENS` hold. `keep`: see `caches.in_chunks`."""

    def work(group: list[list[int]]) -> dict[str, np.ndarray]:
        found = []
        for places in group:
            batch = session.move(data.collate(places))
            with torch.inference_mode(), session.autocast():
                scores = critic(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])
            found.append(critic.probabilities(scores))
        rows, numbers = torch.cat(found).cpu().numpy(), np.concatenate(group)  # all leave the device together
        bad = numbers[~np.isfinite(rows).all(1)]
        if len(bad):  # argmax would make a label of them
            raise UserError(
                f"{title}: the {critic.settings.kind} critic's score of row {bad[0]} is not finite; its "
                "weights are damaged, or --precision fp32 is needed"
            )
        return {"numbers": numbers, "scores": rows}

    tokens = 0 if batch_size else BATCH_TOKENS[session.device.type]
    plan = plan_once(data.lengths, batch_size or len(data), tokens)
    return caches.in_chunks(plan, work, keep, title)["scores"]


#: (the lowest score, its meaning), highest first; VADER's borders, but that exactly -0.05 is neutral
SENTIMENTS = ((0.05, "positive"), (-0.05, "neutral"), (-math.inf, "negative"))
UNKNOWN_WORDS = 0.1  # share of a text's tokens from which on a critic's view of it is doubtful


@dataclass(frozen=True)
class Score:
    """What one critic says of one reply."""

    value: float  # the expected level, the sum of level x probability; of sentiment the score in [-1, 1]
    level: int | None  # the most likely level; None of sentiment
    probabilities: tuple[float, ...]  # of each level; none of sentiment
    meaning: str  # in plain words


class Critic(Published):
    """A trained critic with its tokenizer: asked about plain texts, in batches.

    A text's score does not depend on the texts beside it. Safe to be used by several threads.
    """

    folder: Path

    def __init__(
        self, critic: CriticModel, tokenizer, session: Session, folder: Path, whole: "Critic | None" = None
    ):
        """`whole`: the critic of several heads that `critic` is one of."""
        self.critic, self.tokenizer = critic.to(session.device), tokenizer
        self.session, self.folder, self.whole = session, folder, whole or self

    @classmethod
    def from_pretrained(cls, run: str | Path, session: Session | None = None, kind: str = "") -> "Critic":
        """The critic of a run's folder, or of a name on the hub; of several heads the one of `kind`. Raises
        `UserError` where it holds none."""
        folder = folder_of(run)
        whole = CriticModel.from_pretrained(folder)
        if kind and kind not in (kinds := whole.settings.kinds):
            raise UserError(f"{folder}: holds a critic of {', '.join(kinds)}, none of {kind}")
        return cls(whole, load_tokenizer(folder), session or Session(), folder).of(kind)

    def of(self, kind: str) -> "Critic":
        """The critic of one kind: itself, or that head, with the encoder that all heads share."""
        part = self.critic.of(kind)
        if part is self.critic:
            return self
        return Critic(part, self.tokenizer, self.session, self.folder, self)

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Its columns, (N, labels), of what `whole` says."""
        if self.whole is self:
            return rows
        return self.whole.critic.parts(torch.from_numpy(rows))[self.kind].numpy()

    @property
    def kind(self) -> str:
        return self.critic.settings.kind

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that it can give."""
        return (-1, 1) if self.critic.settings.is_regressor else (0, self.critic.settings.outputs - 1)

    def score(
        self,
        replies: Sequence[str],
        contexts: Sequence[Sequence[str]] | None = None,
        batch_size: int = 0,
        keep: Path | None = None,
    ) -> list[Score]:
        """What the critic says of each reply, given the turns before it (oldest first), or by itself.

        A text in place of a list is a list of one: of the replies, or of the turns before one of them.
        `keep`: see `caches.in_chunks`.
        """
        if len(kinds := self.critic.settings.kinds) > 1:
            raise UserError(f"{self.folder}: a critic of {', '.join(kinds)}; name the one to ask: kind='emo'")
        return self.said(self.rows(replies, contexts, batch_size, keep))

    def rows(
        self,
        replies: Sequence[str],
        contexts: Sequence[Sequence[str]] | None = None,
        batch_size: int = 0,
        keep: Path | None = None,
    ) -> np.ndarray:
        """(N, outputs) probabilities, or (N, 1) scores of the regressor."""
        replies = texts_of(replies, "reply")
        if not replies:
            return np.zeros((0, self.critic.settings.outputs))
        if isinstance(contexts, str):
            raise UserError("contexts: one text; give a list, of the turns before each reply")
        # an empty cell of a table is no turn before
        before = [
            [] if turns is None or is_empty(turns) else texts_of(turns, f"context {number}, turn")
            for number, turns in enumerate([None] * len(replies) if contexts is None else contexts)
        ]
        if len(before) != len(replies):
            raise UserError(
                f"{len(replies)} replies, {len(before)} contexts; give the turns before each reply"
            )
        data = critic_data(before, replies, None, self.tokenizer, self.critic.settings)
        return critic_scores(self.critic, data, self.session, self.kind, batch_size, keep)

    def said(self, rows: np.ndarray) -> list[Score]:
        """(N, labels) in words."""
        return [self.score_of(row) for row in rows.tolist()]

    def score_of(self, row: Sequence[float]) -> Score:
        if self.critic.settings.is_regressor:
            meaning = next(text for least, text in SENTIMENTS if row[0] >= least)
            return Score(row[0], None, (), meaning)
        level = max(range(len(row)), key=row.__getitem__)
        known = DIMENSIONS[self.kind].meanings.get(len(row))
        meaning = known[level] if known else f"level {level} of 0 to {len(row) - 1}"
        return Score(sum(n * p for n, p in enumerate(row)), level, tuple(row), meaning)

    def unknown(self, texts: Sequence[str]) -> float:
        """The share of the texts' tokens that the critic's vocabulary does not have."""
        unknown = self.tokenizer.unk_token_id
        found = [encoded for text, encoded in encode(self.tokenizer, texts).items()]
        tokens = sum(map(len, found))
        return sum(int((ids == unknown).sum()) for ids in found) / max(tokens, 1)

    @property
    def guesses(self) -> bool:
        """Whether its own result.json says that it is no better than guessing."""
        if not (self.folder / "result.json").exists():
            return False
        result = result_of(self.folder, self.kind)
        return is_useless(result["valid"], result["baselines"])


Critics = dict[str, Critic]


def wholes(critics: Critics) -> list[Critic]:
    """What has to read a text so that all `critics` know it: of the heads of one encoder their `whole`."""
    return list(dict.fromkeys(critic.whole for critic in critics.values()))


def scores(
    critics: Critics,
    replies: Sequence[str],
    contexts: Sequence[Sequence[str]],
    batch_size: int = 0,
    keep: Mapping[Critic, Path] | None = None,
) -> dict[str, list[Score]]:
    """{kind: what it says of each reply}, as `Critic.score`, in one reading for all heads of an encoder.
    `keep`: of each of `wholes`."""
    rows = {c: c.rows(replies, contexts, batch_size, (keep or {}).get(c)) for c in wholes(critics)}
    return {kind: critic.said(critic.own(rows[critic.whole])) for kind, critic in critics.items()}


def unread(critics: Critics, replies: Sequence[str]) -> tuple[list[int], str]:
    """Which replies are longer than one of the critics reads, and that in words; empty where none is."""
    found: dict[int, None] = {}
    said: dict[str, list[str]] = {}
    lengths: dict[str, list[int]] = {}  # by the words that they are counted in, mostly those of all critics
    for kind, scorer in critics.items():
        reads, words = scorer.critic.settings.reply_len, tokenizer_hash(scorer.tokenizer)
        if words not in lengths:
            encoded = encode(scorer.tokenizer, replies)
            lengths[words] = [len(encoded[reply]) for reply in replies]
        if longer := [n for n, length in enumerate(lengths[words]) if length > reads]:
            found |= dict.fromkeys(longer)
            said.setdefault(f"{len(longer):,} replies are longer than the {reads} tokens that", []).append(
                kind
            )
    parts = [f"{text} {', '.join(kinds)} read{'s' * (len(kinds) == 1)}" for text, kinds in said.items()]
    return sorted(found), (", ".join(parts) + "; the rest of them is not seen") * bool(found)


def doubts(critics: Critics, texts: Sequence[str] = ()) -> list[str]:
    """Why the scores of these texts may be worth little, in plain words."""
    found = []
    if guessing := [kind for kind, scorer in critics.items() if scorer.guesses]:
        found.append(f"no better than guessing by their own result.json: {', '.join(guessing)}")
    shares: dict[str, list[str]] = {}
    for kind, scorer in critics.items():
        if (share := scorer.unknown(texts)) > UNKNOWN_WORDS:
            shares.setdefault(f"{share:.0%}", []).append(kind)
    found += [f"{share} of these words are unknown to {', '.join(kinds)}" for share, kinds in shares.items()]
    return found


def open_critics(folders: Mapping[str, Path], session: Session, flags: Collection[str] = ()) -> Critics:
    """The critic of each kind in `folders`, each folder read once: heads of one encoder have one `whole`.

    Raises `UserError` where a folder holds something else. `flags`: the kinds that were given by a flag.
    """
    critics = {}
    loaded: dict[Path, Critic] = {}
    for kind, folder in folders.items():
        flag = f"--{kind}" if kind in flags else ""  # not every command that judges has it
        with by_flag(flag):
            loaded[folder] = loaded.get(folder) or Critic.from_pretrained(folder, session)
            if kind not in (kinds := loaded[folder].critic.settings.kinds):
                taken = (
                    f"holds a critic of {', '.join(kinds)}, none of {kind}; it takes one of all dimensions, "
                    f"or the folder that holds one of each ({', '.join(f'{dim}/' for dim in DIMENSIONS)})"
                )
                raise UserError(f"{folder}: {holds(kinds) if flag else taken}")
        critics[kind] = loaded[folder].of(kind)
    return critics


def load_critics(folders: Mapping[str, Path], family: str, session: Session) -> Critics:
    """The finished critic of each kind; an error names the flag, or the command that makes it."""
    for kind, folder in folders.items():
        if not (folder / "result.json").exists():  # a published one has no more of its training
            runs.require_run(folder, advice.for_critic(folder, kind, family))
    return open_critics(folders, session, folders)


def load_finished(folders: Mapping[str, Path], session: Session, asked_for: Collection[str] = ()) -> Critics:
    """The finished critics among `folders` {kind: folder}; the others are named and left out.

    Raises `UserError` where one that was asked for is missing, or a folder holds something else.
    """
    missing = [k for k, f in folders.items() if not (f / "result.json").exists() and k not in asked_for]
    if missing:
        there = ", ".join(str(folders[k]) for k in missing)
        print(f"note: no {', '.join(missing)} critic ({there}): left out")
    return open_critics({k: f for k, f in folders.items() if k not in missing}, session, asked_for)


def find_critics(
    paths: Paths,
    families: Sequence[str],
    given: Mapping[str, Path],
    session: Session,
    needed: bool = False,
    bundled_too: bool = False,
) -> Critics:
    """The critics that were `given` {kind: folder or hub name}, and of each other kind the one of the first
    of `families` that has it, learnt from all pairs or else from those of one half of the seeker posts.

    `bundled_too`: else the one that comes with the repository, which is said. `needed`: an error where there
    is none at all.
    """
    chosen = {kind: folder_given(f"--{kind}", folder) for kind, folder in given.items()}
    names = [name for family in families for name in with_halves(family)]
    places = [{kind: paths.find_critic(kind, name) for kind in CRITICS} for name in names]
    own = {k: f for p in reversed(places) for k, f in p.items() if (f / "result.json").exists()} | chosen
    came = {k: f for k, f in bundled.critics().items() if bundled_too and k not in own}
    if came:
        which = f"no {', '.join(came)} critic" if own else "no critics"
        print(f"note: {which} of your own; the bundled ones serve ({bundled.MINI})", file=sys.stderr)
    found = came | own
    if not found:
        if needed:
            make = [advice.train_critic(kind, families[-1], paths.root) for kind in ("emo", SENTIMENT)]
            comes = bundled.critics().get("emo")
            said = f" ({comes} comes with the repository)" if comes else ""
            raise UserError(
                f"{places[0]['emo'].parent}: no trained critic of {' or '.join(families)}; make them with: "
                f"{make[0]} (and --dim exp, int); {make[1]}; or give one with --emo RUN{said}"
            )
        return {}
    # those that nobody has are named by where the first family's would lie
    wanted = {**(places[0] if places else {}), **found}
    return load_finished({k: wanted[k] for k in CRITICS if k in wanted}, session, given)
