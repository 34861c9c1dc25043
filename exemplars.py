"""Exemplars: the ways in which they enter a generator (DPR/retriever.py finds them).

A way is one class, and what it makes of a split's exemplars another (`Entering`): the ids it puts before a
source, or its part of a batch. What a way adds to a model's settings says `way_settings`; the layers that it
needs inside the model stand in models.Generator.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import advice
import caches
import runs
import storage
from corpora import Example, listener_turns, read_exemplars
from dataloaders import (
    CUTTING,
    EXEMPLAR_MARKER,
    Entering,
    encode,
    in_pieces,
    join,
    pad,
    plan_once,
    tokenizer_hash,
)
from glove_models import glove_config, load_vectors, set_word_vectors
from models import Generator, GeneratorSettings, masked_mean
from options import Paths, UserError
from pretrained import load_config, load_encoder, load_tokenizer, offline
from session import Session, own_random_stream
from settings import DPR_HUB, GeneratorOptions
from storage import fingerprint, require

EXEMPLAR_PREFIX = "paraphrase: "  # what the paper's pooled exemplar encoder was trained with
Texts = Sequence[Sequence[str]]  # each example's exemplars, best first
#: of the note beside a file of exemplars: how they were found
FOUND_BY = (
    "question",
    "context",
    "max_length",
    "max_passage_length",
    "candidates",
    "match",
    "index",
    "top_k",
)


def of_split(split: str, examples: Sequence[Example], top: int, paths: Paths) -> list[list[str]]:
    """The `top` exemplars of each example, best first; says where they are older than what they were found
    in, or found otherwise than the training's."""
    file = paths.exemplars(split)
    storage.require_file(file, advice.retrieve(paths.root, file.parent))
    made_of = {"dialogues": paths.dialogues(split), "corpus": paths.dialogues("train")}
    for side in DPR_HUB:
        if isinstance(encoder := storage.read_origin(file).get(side), dict):
            made_of[side] = paths.find(encoder["path"])
    storage.warn_if_stale(file, made_of)
    own, training = (storage.content(storage.read_origin(f)) for f in (file, paths.exemplars("train")))
    if other := [name for name in FOUND_BY if own and training and own.get(name) != training.get(name)]:
        print(f"note: {file}: found with another {', '.join(other)} than the training's beside it")
    return read_exemplars(file, examples, top)


def at_most(top: int, paths: Paths) -> int:
    """`top`, or how many exemplars the training's file was asked for, where that is fewer: in use a model
    gets as many."""
    file = paths.exemplars("train")
    there = storage.read_origin(file).get("top_k")
    if not isinstance(there, int) or there >= top:
        return top
    print(f"note: {file} has {there} exemplars of each turn, so --top-exemplars is {there} and not {top}")
    return there


# ------------------------------------------------------------------------------------------------------- ways


class Way:
    """How exemplars enter one generator: not at all. `split(texts)` gives their part in the data of one
    split."""

    def split(self, texts: Texts) -> Entering:
        return Entering()

    def live(self, texts: Texts) -> Entering:
        """The same for exemplars that were found just now: nothing of it is kept."""
        return self.split(texts)

    def inputs(self) -> dict[str, str]:
        """{name: sha256} of what this way depends on besides the exemplars' file."""
        return {}

    def sources(self) -> dict[str, dict[str, str]]:
        """{name: path and sha256} of the models of this way, for runs.sources."""
        return {}

    def save(self, folder: Path) -> None:
        """Write beside a generator what this way needs besides its weights."""


class Prepended(Way):
    """Their text stands before the dialogue (this project's default)."""

    def __init__(self, settings: GeneratorSettings, tokenizer, cache: Path):
        self.most, self.tokenizer, self.cache = settings.exemplar_len, tokenizer, cache

    def split(self, texts: Texts) -> Entering:
        return PrependedIds(texts, self.tokenizer, self.most, self.cache)

    def live(self, texts: Texts) -> Entering:
        return PrependedIds(texts, self.tokenizer, self.most)


class PrependedIds(Entering):
    def __init__(self, texts: Texts, tokenizer, most: int, cache: Path | None = None):
        self.texts, self.most, self.eos = texts, most, tokenizer.eos_token_id
        self.encoded = encode(tokenizer, [EXEMPLAR_MARKER, *(t for row in texts for t in row)], cache)

    def before(self, number: int) -> np.ndarray:
        marker = self.encoded[EXEMPLAR_MARKER]
        pieces = [np.append(marker, self.encoded[t]) for t in self.texts[number]]
        return exemplar_block(pieces, self.most, self.eos)


def exemplar_block(pieces: Sequence[np.ndarray], most: int, eos: int) -> np.ndarray:
    """As many whole exemplars, best first, as fit in `most` tokens with the </s> after them; the first may be
    cut."""
    total, kept = 1, list[np.ndarray]()
    for piece in pieces:
        total += len(piece)
        if kept and total > most:
            break
        kept.append(piece)
    return np.append(join(kept)[: most - 1], eos) if kept else join([])


class PooledFrozen(Way):
    """The mean over exemplars of the mean over their tokens, by a frozen T5 encoder (paper, eq. 2-4).

    Each distinct exemplar is encoded once in a run, and kept by content in the cache.
    """

    def __init__(self, settings: GeneratorSettings, session: Session, paths: Paths, place: str | Path | None):
        assert settings.exemplar_model is not None
        self.name, self.width = settings.exemplar_model, settings.exemplar_width
        self.max_len = settings.exemplar_len
        self.session, self.paths = session, paths
        self.vectors: dict[str, np.ndarray] = {}
        self.place = place = exemplar_model(str(place or self.name), paths)
        with own_random_stream(0):  # t5-tiny's weights are random: draw the same ones in training and in use
            self.tokenizer = load_tokenizer(place)
            self.encoder = load_encoder(place, from_scratch=self.name == "t5-tiny").eval()
        self._inputs = {
            "exemplar encoder": storage.weights_hash(self.encoder),
            "exemplar words": tokenizer_hash(self.tokenizer),
        }

    def inputs(self) -> dict[str, str]:
        return self._inputs

    def sources(self) -> dict[str, dict[str, str]]:
        name = "exemplar encoder"
        return {name: storage.source(self.place, self.paths, self._inputs[name])}

    def split(self, texts: Texts) -> Entering:
        asked = {t for row in texts for t in row}
        if not self.vectors or not asked <= self.vectors.keys():
            # one table for all splits: exemplars are training replies
            replies = {e.response for e in listener_turns(self.paths.dialogues("train"))}
            self.vectors = self.embed(sorted(asked | replies | self.vectors.keys()))
        return PooledVectors(texts, self.vectors, self.width)

    def live(self, texts: Texts) -> Entering:
        distinct = sorted({t for row in texts for t in row})
        table = self.encoded(distinct)
        return PooledVectors(texts, dict(zip(distinct, table, strict=True)), self.width)

    def embed(self, texts: list[str]) -> dict[str, np.ndarray]:
        """{text: (E,) vector}, kept in the cache."""
        key = fingerprint(*self.inputs().values(), self.max_len, self.session.precision, texts)[:32]
        file = self.paths.cache / f"exemplars-{key}.npz"
        table = caches.cached(file, lambda: {"vectors": self.encoded(texts)})["vectors"]
        self.encoder.cpu()  # a training has no more use for it
        return dict(zip(texts, table, strict=True))

    def encoded(self, texts: list[str]) -> np.ndarray:
        """(N, E)"""
        table = np.zeros((len(texts), self.width), dtype=np.float32)
        if not texts:
            return table
        session = self.session
        self.encoder.to(session.device)
        marked = [EXEMPLAR_PREFIX + t for t in texts]
        with CUTTING:
            rows = self.tokenizer(marked, truncation=True, max_length=self.max_len + 8)["input_ids"]
        batches = plan_once([len(r) for r in rows], 128)
        with torch.inference_mode(), session.autocast():
            for numbers in tqdm(batches, desc="exemplars", disable=None, leave=False):
                padded = pad([np.array(rows[i]) for i in numbers], self.tokenizer.pad_token_id)
                ids, mask = session.move(padded)
                hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                table[numbers] = masked_mean(hidden, mask).cpu().numpy()  # (B, L, E) -> (B, E)
        return table


class PooledVectors(Entering):
    """Batches of the mean of each example's frozen exemplar vectors, (B, E); zeros where there is no
    exemplar."""

    def __init__(self, texts: Texts, vectors: Mapping[str, np.ndarray], width: int):
        table = np.zeros((len(texts), width), dtype=np.float32)
        for n, row in enumerate(texts):
            if row:
                table[n] = np.mean([vectors[t] for t in row], axis=0)
        self.table = torch.from_numpy(table)

    def part(self, numbers: list[int]) -> dict[str, Any]:
        return {"exemplar_vectors": self.table[numbers]}


#: in a T5's run: the tokenizer of the GloVe encoder that reads its exemplars
OWN_WORDS = "exemplar_words"


class PooledTrained(Way):
    """The same pooled vector by a GloVe encoder that is trained along with the generator."""

    def __init__(self, settings: GeneratorSettings, tokenizer, paths: Paths, words: Path):
        """`tokenizer`: the generator's. A GloVe-T5's is its encoder's, too; for a T5 that lies in `words`."""
        self.max_len, self.cache, self.words = settings.exemplar_len, paths.cache, paths.glove
        self.tokenizer = tokenizer
        self.has_own_words = tokenizer_hash(tokenizer) != settings.exemplar_tokenizer
        if self.has_own_words:
            self.tokenizer = load_tokenizer(require(words))
        if tokenizer_hash(self.tokenizer) != settings.exemplar_tokenizer:
            raise UserError(
                f"{words}: its words are others than this model's exemplar encoder was trained with; "
                "--workdir names the place whose data/glove has them, or prepare_data.py --glove "
                "OTHER/data/glove takes them over"
            )

    def inputs(self) -> dict[str, str]:
        return {
            "exemplar_tokenizer": tokenizer_hash(self.tokenizer),
            "exemplar vectors": storage.identity(self.words),  # what a new one begins with
        }

    def save(self, folder: Path) -> None:
        if self.has_own_words:
            self.tokenizer.save_pretrained(str(folder / OWN_WORDS))

    def split(self, texts: Texts) -> Entering:
        return PooledTokens(texts, self.tokenizer, self.max_len, self.cache)

    def live(self, texts: Texts) -> Entering:
        return PooledTokens(texts, self.tokenizer, self.max_len)


class PooledTokens(Entering):
    """Batches for the encoder that is trained along: each distinct text once (U, L), with the pieces in which
    they are read, and each example's shares (B, U)."""

    def __init__(self, texts: Texts, tokenizer, max_len: int, cache: Path | None = None):
        self.texts, self.pad, self.eos = texts, tokenizer.pad_token_id, tokenizer.eos_token_id
        encoded = encode(tokenizer, [t for row in texts for t in row], cache)
        self.rows = {t: np.append(ids[: max_len - 1], self.eos) for t, ids in encoded.items()}

    def lengths(self) -> list[list[int]]:
        """All of an example's exemplars, and the longest, to which others are padded."""
        each = [[len(self.rows[t]) for t in row] for row in self.texts]
        return [list(map(sum, each)), [max(row, default=0) for row in each]]

    def part(self, numbers: list[int]) -> dict[str, Any]:
        distinct = list(dict.fromkeys(t for i in numbers for t in self.texts[i]))
        order, pieces = in_pieces([len(self.rows[t]) for t in distinct] or [1])
        distinct = [distinct[n] for n in order] if distinct else []
        place = {t: n for n, t in enumerate(distinct)}
        # (B, U): a row's mean over its exemplars
        share = np.zeros((len(numbers), max(1, len(distinct))), dtype=np.float32)
        for b, i in enumerate(numbers):
            for t in self.texts[i]:
                share[b, place[t]] += 1 / len(self.texts[i])
        ids, mask = pad([self.rows[t] for t in distinct] or [np.array([self.eos])], self.pad)
        return {
            "exemplar_ids": ids,
            "exemplar_mask": mask,
            "exemplar_pieces": pieces,
            "exemplar_share": torch.from_numpy(share),
        }


def enter(
    settings: GeneratorSettings,
    tokenizer,
    session: Session,
    paths: Paths,
    place: str | Path | None = None,
    words: Path | None = None,
) -> Way:
    """The way that a generator's settings name. `place`: where its frozen encoder lies, if not where its name
    says; `words`: where those of one that is trained along lie, if not in data/glove."""
    if settings.exemplars == "prepend":
        return Prepended(settings, tokenizer, paths.cache)
    if settings.exemplars == "t5":
        return PooledFrozen(settings, session, paths, place)
    if settings.exemplars == "glove-t5":
        return PooledTrained(settings, tokenizer, paths, words or paths.glove)
    return Way()


def enter_again(
    folder: Path,
    settings: GeneratorSettings,
    tokenizer,
    session: Session,
    paths: Paths,
    moved: str | None,
    flag: str,
) -> Way:
    """The way of a finished run, its frozen encoder sought where it lay in training, or in `moved`.

    Raises `UserError`, which names the flag that says so, where it is missing or another one.
    """
    made_from = runs.sources(folder, paths)
    noted = made_from.get("exemplar encoder")
    words = Path(folder) / OWN_WORDS  # which older runs do not have
    place: str | Path | None = moved
    if noted and moved is None and settings.exemplar_model != "t5-tiny" and noted.path.is_dir():
        place = noted.path
    with offline(f"say where its folder lies: {flag}"):
        way = enter(settings, tokenizer, session, paths, place, words if words.is_dir() else None)
    for name, source in way.sources().items():
        if name in made_from and made_from[name].sha256 != source["sha256"]:
            raise UserError(
                f"{folder}: the {name} in {source['path']} has other weights than in its training; "
                f"bring those back, or say where they lie: {flag}"
            )
    return way


#: the sides of the retriever that found a run's exemplars, as `retriever` names them
FOUND_WITH = ("question encoder", "context encoder")


def retriever(file: Path) -> dict[str, dict[str, str]]:
    """What the note beside an exemplars' file says that they were found with: {name: path and sha256}."""
    made_from = storage.read_origin(file)
    found = {f"{side} encoder": made_from.get(side) for side in DPR_HUB}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def found_by(file: Path) -> str:
    """What the exemplars of a file were found by: `reply`, or `context` (dpr_exemplar_retriever.py
    --match)."""
    return "context" if storage.read_origin(file).get("match") == "context" else "reply"


def matched_by(run: Path, paths: Paths) -> str:
    """The same of a run's exemplars, also where only its config.json is left (from the hub)."""
    if noted := storage.read_json(Path(run) / "config.json").get("match"):
        return noted
    entry = runs.sources(run, paths).get("exemplars train")  # of a run that was made before this was noted
    return found_by(entry.path) if entry else "reply"


def exemplar_model(name: str, paths: Paths) -> str | Path:
    """Where a frozen encoder lies: a folder, as it was given or seen from the workdir, or a hub name."""
    if name == "t5-tiny":
        return require(paths.t5_tiny)
    if Path(name).is_dir():
        return name
    return found if (found := paths.find(name)).is_dir() else name


def way_settings(options: GeneratorOptions, size: str, paths: Paths) -> dict:
    """What the chosen way adds to a new generator's settings. `size` (glove_models.SIZES): of an encoder
    trained along."""
    if options.add_exemplars == "t5":
        name = options.exemplar_model
        with offline("--exemplar-model t5-tiny (random weights)"):
            config = load_config(exemplar_model(name, paths))
        if config.model_type != "t5":
            raise UserError(
                f"--exemplar-model {options.exemplar_model}: a {config.model_type} model, not a T5; give a "
                "T5, or --add-exemplars prepend"
            )
        if name != "t5-tiny" and Path(name).is_dir():  # where it lies says sources.json
            name = paths.name(name)
        return {"exemplar_model": name, "exemplar_width": config.d_model}
    if options.add_exemplars == "glove-t5":
        words = load_tokenizer(require(paths.glove))
        config = glove_config(words, size, options.dropout, num_layers=options.exemplar_layers)
        return {"exemplar_backbone": config.to_dict(), "exemplar_tokenizer": tokenizer_hash(words)}
    return {}


def begin(model: Generator, paths: Paths, seed: int) -> None:
    """Where a new generator has an encoder of its own for exemplars, it begins with GloVe's vectors."""
    if model.settings.exemplar_backbone:
        words = model.exemplar_encoder.get_input_embeddings()
        set_word_vectors(words, load_vectors(paths.glove), seed)
