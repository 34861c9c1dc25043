"""A retriever in use: its encoders, the exemplars of every listener turn, and a search in one's own texts."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import advice
import caches
import runs
import storage
from corpora import EXEMPLAR_COLUMNS, Example, listener_turns
from DPR.biencoder import embed, load_saved, load_side, own_pooling, require_fitting, resolve
from DPR.index import APPROXIMATE_FROM, Index, by_value
from DPR.sentence_transformers_format import length_of
from hub import Published, folder_of
from options import Paths, UserError, texts_of
from pretrained import load_tokenizer, offline, positions
from session import Session
from settings import CANDIDATES, DPR_HUB, EncoderOptions, SearchOptions
from storage import fingerprint, hash_seed

#: tokens that an encoder reads of a text where neither its training nor a flag says how many
LENGTHS = {"question": 128, "context": 64}


class Encoders:
    """Both encoders of a retriever, as trained or as pretrained, with what identifies them."""

    def __init__(self, options: EncoderOptions, paths: Paths):
        self.options = options
        asked = {"question": options.max_length, "context": options.max_passage_length}
        self.lengths: dict[str, int] = {}  # tokens that each side reads of a text
        for side, usual in LENGTHS.items():
            trained = length_of(Path(options.path) / f"{side}_encoder") if options.path else None
            self.lengths[side] = asked[side] or trained or usual
        self.sides: dict[str, tuple[Any, Any]] = {}
        self.origin: dict[str, Any] = {}  # with the places, for people; see `identity`
        if options.path:
            folder = Path(options.path)
            self.sides = load_saved(folder)
            self.origin |= storage.sources_of({s: folder / f"{s}_encoder" for s in DPR_HUB}, paths)
            return
        places = {side: resolve(options.encoder or hub) for side, hub in DPR_HUB.items()}
        with offline("--path with a retriever that DPR.train_dpr has trained"):
            pooling = self.origin["pooling"] = options.pooling or own_pooling(places["question"])
            for side, begin in places.items():
                self.sides[side] = (load_side(begin, side, pooling), load_tokenizer(begin))
        for side, begin in places.items():
            self.origin[side] = storage.source(begin, paths, storage.identity(begin))

    @property
    def identity(self) -> dict[str, Any]:
        """What they are, wherever they lie."""
        return storage.content(self.origin)

    def to(self, device: Any) -> None:
        for model, _ in self.sides.values():
            model.to(device)

    def shorten(self, *asked: int | None) -> None:
        """Where nobody has `asked` for a length, no side reads more tokens than its encoder can."""
        for side, length in zip(self.sides, asked, strict=True):
            most = positions(self.sides[side][0])
            if length is None and most is not None:
                self.lengths[side] = min(self.lengths[side], most)

    def require_fitting(self) -> None:
        """Raises `UserError` where an encoder cannot read as many tokens as it is asked to."""
        require_fitting(*self.sides["question"], "--max-length", self.lengths["question"])
        require_fitting(*self.sides["context"], "--max-passage-length", self.lengths["context"])

    def embed(
        self, side: str, texts: list[str], session: Session, title: str, keep: Path | None = None
    ) -> np.ndarray:
        """(N, E); of too long a question the latest tokens are kept, of a candidate the first."""
        asking, most, size = side == "question", self.lengths[side], self.options.batch_size
        place = keep and keep / title
        return embed(*self.sides[side], texts, session, most, asking, title, size, place)


class Matching:
    """Candidates by their vectors' inner product with the dialogue's: of the replies, or of the dialogues
    that they answer."""

    def __init__(self, options: SearchOptions, session: Session, paths: Paths):
        self.options, self.session, self.encoders = options, session, Encoders(options, paths)
        self.encoders.require_fitting()
        self.origin = self.encoders.origin | {
            "max_length": self.encoders.lengths["question"],
            "max_passage_length": self.encoders.lengths["context"],
        }
        if options.match != "reply":
            self.origin["match"] = options.match
        if options.index != "flat":
            self.origin["index"] = options.index

    def read(self, corpus: Sequence[Example], groups: Sequence[str], keep: Path) -> None:
        """The candidates, and the group of each: a dialogue sees its own group's alone."""
        self.keep = keep
        self.known: dict[str, dict[str, np.ndarray]] = {}
        self.encoders.to(self.session.device)
        if self.options.match == "context":
            side, texts = "question", [" ".join(c.history) for c in corpus]
        else:
            side, texts = "context", [c.response for c in corpus]
        vectors = self.embed(side, texts, "candidates")
        owners = [c.conv_id for c in corpus]
        self.index = Index(vectors, owners, groups, self.options.index, self.session.device)
        if self.options.index != "flat" and not self.index.approximate:
            self.session.say(
                f"note: --index {self.options.index}: every search is exact, no dialogue has "
                f"{APPROXIMATE_FROM:,} candidates"
            )

    def embed(self, side: str, texts: list[str], title: str) -> np.ndarray:
        """(N, E); what that side has read before, among the candidates or in another split, is not read
        again."""
        known = self.known.setdefault(side, {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            vectors = self.encoders.embed(side, new, self.session, title, self.keep)
            known.update(zip(new, vectors, strict=True))
        return np.stack([known[text] for text in texts])

    def hits(
        self, split: str, examples: Sequence[Example], own: Sequence[str | None], groups: Sequence[str]
    ) -> list[list[tuple[int, float]]]:
        """For each example the places of its best candidates with their scores, of its group and none of its
        `own` conversation."""
        asked = [" ".join(e.history) for e in examples]
        queries = self.embed("question", asked, split)
        return self.index.search(queries, self.options.top_k, own, groups)


class Drawn:
    """Candidates by chance, under the same rules: what exemplars do only by being there."""

    def __init__(self, options: SearchOptions):
        self.options = options
        self.origin: dict[str, Any] = {"match": "random", "seed": options.seed}

    def read(self, corpus: Sequence[Example], groups: Sequence[str], keep: Path) -> None:
        self.codes: dict[str | None, int] = {}  # of conversations
        owners = [self.codes.setdefault(c.conv_id, len(self.codes)) for c in corpus]
        self.owners = np.array(owners)
        self.places = by_value(groups)

    def hits(
        self, split: str, examples: Sequence[Example], own: Sequence[str | None], groups: Sequence[str]
    ) -> list[list[tuple[int, float]]]:
        draw = np.random.default_rng(hash_seed(self.options.seed, split))
        found = []
        for owner, group in zip(own, groups, strict=True):
            places = self.places.get(group, np.zeros(0, dtype=int))
            allowed = places[self.owners[places] != self.codes.get(owner, -1)]
            chosen = draw.choice(allowed, min(self.options.top_k, len(allowed)), replace=False)
            found.append([(int(place), 0.0) for place in chosen])
        return found


def find(options: SearchOptions, session: Session, paths: Paths, overwrite: bool) -> None:
    """{split}_dpr.csv: the exemplars of every listener turn, out of the training split's replies."""
    for split in dict.fromkeys(("train", *options.splits)):
        storage.require_file(paths.dialogues(split), advice.prepare(paths.root))
    matching = Drawn(options) if options.match == "random" else Matching(options, session, paths)
    shared: dict[str, Any] = matching.origin | {"candidates": options.candidates, "top_k": options.top_k}
    shared |= {"corpus": storage.sha256(paths.dialogues("train"))}
    todo = {}
    for split in options.splits:
        origin = {**shared, "dialogues": storage.sha256(paths.dialogues(split))}
        if not storage.ready(paths.exemplars(split), origin, overwrite):
            todo[split] = origin
    if not any(session.gather([bool(todo)])):  # of all processes, before any of them has written
        return
    corpus = listener_turns(paths.dialogues("train"))
    # an interrupted stage goes on there; outputs of all splits share the candidates' vectors
    made_of = str(storage.content(shared)), session.precision, options.batch_size, options.splits
    keep = paths.cache / f"vectors-{fingerprint(*made_of)[:16]}"
    caches.sweep_kept(keep)
    group = CANDIDATES[options.candidates]
    matching.read(corpus, [group(c) for c in corpus], keep)
    for split, origin in todo.items():
        examples = listener_turns(paths.dialogues(split))
        own: Sequence[str | None] = [e.conv_id for e in examples]
        if split != "train":
            own = own_conversations(examples, corpus)
        hits = matching.hits(split, examples, own, [group(e) for e in examples])
        if storage.ready(paths.exemplars(split), origin, overwrite):  # another process was faster
            continue
        made = origin | {"command": runs.command_line()}
        write_exemplars(paths.exemplars(split), examples, corpus, hits, made)
    session.wait()  # another process may still keep what it has made there
    if session.main:
        shutil.rmtree(keep, ignore_errors=True)


def own_conversations(examples: Sequence[Example], corpus: Sequence[Example]) -> list[str | None]:
    """The conversation of `corpus` that each of `examples`, from another split, is a part of; None for none.

    Own data may number conversations from 1 in each split, so the same conv_id is not enough: the first turn
    and the first reply are compared too.
    """
    first_turns: dict[str, tuple[str, ...]] = {}
    for turn in corpus:
        first_turns.setdefault(turn.conv_id, (*turn.history, turn.response)[:2])
    own: list[str | None] = []
    for example in examples:
        begins = (*example.history, example.response)[:2]
        own.append(example.conv_id if first_turns.get(example.conv_id) == begins else None)
    return own


def write_exemplars(
    file: Path,
    examples: Sequence[Example],
    corpus: Sequence[Example],
    hits: list[list[tuple[int, float]]],
    origin: dict,
) -> None:
    """One row a listener turn, its exemplars' texts, keys and scores as JSON lists, best first."""
    rows = []
    for example, row in zip(examples, hits, strict=True):
        found = [corpus[place] for place, _ in row]
        rows.append(
            (
                example.conv_id,
                example.utterance_idx,
                example.emotion,
                json.dumps(example.history, ensure_ascii=False),
                example.response,
                json.dumps([c.response for c in found], ensure_ascii=False),
                json.dumps([c.key for c in found]),
                json.dumps([round(score, 4) for _, score in row]),
            )
        )
    storage.write_csv(file, pd.DataFrame(rows, columns=list(EXEMPLAR_COLUMNS)), origin=origin)
    counts = [len(row) for row in hits]
    first = [row[0][1] for row in hits if row]
    print(
        f"{file}: {len(rows):,} listener turns, {min(counts)} to {max(counts)} exemplars each, "
        f"mean score of the first {sum(first) / max(len(first), 1):.3f}"
    )
    warn_of_nobody(file, counts, origin.get("candidates", "all"))


def warn_of_nobody(file: Path, counts: list[int], candidates: str) -> None:
    """Says how many listener turns get no exemplar at all, and why."""
    nobody = counts.count(0)
    if not nobody:
        return
    who = "no listener turn gets an exemplar" if nobody == len(counts) else f"{nobody:,} get no exemplar"
    of = f"that --candidates {candidates} allows; --candidates all drops that rule"
    of = "in the training split" if candidates == "all" else of
    print(f"WARNING: {file}: {who}; there is no candidate of another conversation {of}")


# ------------------------------------------------------------------------------------------- one's own texts


@dataclass(frozen=True)
class Hit:
    """One exemplar: its text, its score (inner product), its place in the pool."""

    text: str
    score: float
    place: int


@dataclass(frozen=True)
class Pool:
    """Replies to be searched, as vectors (P, E)."""

    texts: Sequence[str]
    vectors: np.ndarray
    owners: Sequence[str]  # the conversation of each, "" where it has none
    emotions: Sequence[str] | None = None  # of each, where they are known
    built: dict[tuple[bool, str], Index] = field(default_factory=dict, compare=False, repr=False)

    def index(self, by_emotion: bool, device: Any) -> Index:
        """For all searches from then on; a chat asks once a reply."""
        key = (by_emotion, str(device))
        if key not in self.built:
            groups = self.emotions if by_emotion else None
            self.built[key] = Index(self.vectors, self.owners, groups, device=device)
        return self.built[key]


class Retriever(Published):
    """Both encoders with their tokenizers: finds the replies of a pool that answer a text best.

    Exact; equal scores stand in the pool's order. Safe to be used by several threads.
    """

    def __init__(self, encoders: Encoders, session: Session):
        self.encoders, self.session = encoders, session
        encoders.to(session.device)

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path | None = None,
        session: Session | None = None,
        *,
        encoder: str | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        max_passage_length: int | None = None,
        batch_size: int = 128,
    ) -> "Retriever":
        """The encoders of a train_dpr run, a folder or a name on the hub; or, with `encoder` in place of
        `run`, as pretrained. They read as many tokens as they were trained to, or are told. `pooling`: cls or
        mean, in place of what the encoder's own folder says."""
        session = session or Session()  # first: it quietens what loads
        folder = folder_of(run) if run else None
        place = str(folder) if folder else None
        options = EncoderOptions(place, encoder, pooling, max_length, max_passage_length, batch_size)
        encoders = Encoders(options, Paths())
        encoders.shorten(max_length, max_passage_length)
        encoders.require_fitting()
        made = cls(encoders, session)
        made.folder = folder
        return made

    def pool(
        self,
        texts: Sequence[str],
        file: Path | None = None,
        owners: Sequence[str] | None = None,
        emotions: Sequence[str] | None = None,
        overwrite: bool = False,
        answering: Sequence[str] | None = None,
    ) -> Pool:
        """Texts made ready to be searched. `file`: where their vectors are kept, and taken from where they
        are of the same texts and encoders. `answering`: the dialogues that they answer, where these are to be
        compared in place of the texts."""
        texts = texts_of(texts, "reply")
        if not texts:
            raise UserError("a pool needs replies to be searched; this one is empty")
        compared = texts if answering is None else texts_of(answering, "dialogue")
        for what, given in (("dialogues", answering), ("owners", owners), ("emotions", emotions)):
            require_as_many(what, given, len(texts), "replies")
        side = "context" if answering is None else "question"
        origin: dict[str, Any] = {"encoders": self.encoders.identity, "pool": fingerprint(compared)}
        lengths = self.encoders.lengths
        if answering is not None:  # read by the other encoder
            origin |= {"side": side, "max_length": lengths["question"]}
        origin |= {"max_passage_length": lengths["context"], "precision": self.session.precision}

        def make() -> np.ndarray:
            keep = file and file.parent / f".vectors-{fingerprint(str(origin))[:16]}"
            if keep:
                caches.sweep_kept(keep)
            found = self.encoders.embed(side, compared, self.session, "pool", keep)
            if keep:
                shutil.rmtree(keep, ignore_errors=True)
            return found

        vectors = make() if file is None else kept_vectors(file, origin, make, overwrite)
        return Pool(texts, vectors, [""] * len(texts) if owners is None else owners, emotions)

    def search(
        self,
        texts: Sequence[str],
        pool: Pool | Sequence[str],
        k: int = 10,
        owners: Sequence[str] | None = None,
        emotions: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """The best `k` of `pool` for each text (or for one alone), best first.

        `owners`: the conversation whose replies a text must not get. `emotions`: restrict each text to
        replies of one emotion. Nothing is left out otherwise.
        """
        texts = texts_of(texts)
        if not texts:
            return []
        if k < 1:
            raise UserError(f"{k} replies to each text: at least one")
        for what, given in (("owners", owners), ("emotions", emotions)):
            require_as_many(what, given, len(texts), "texts")
        found = pool if isinstance(pool, Pool) else self.pool(pool)
        if emotions is not None and found.emotions is None:
            raise UserError("--emotion: the replies of this pool have no emotions; leave it out")
        queries = self.encoders.embed("question", texts, self.session, "questions")
        index = found.index(emotions is not None, self.session.device)
        hits = index.search(queries, k, [None] * len(texts) if owners is None else owners, emotions)
        return [[Hit(found.texts[place], score, place) for place, score in row] for row in hits]


def require_as_many(what: str, given: Sequence | None, wanted: int, of: str) -> None:
    """Raises `UserError` where there is not one for each."""
    if isinstance(given, str):
        raise UserError(f"{what}: one text; give a list, one for each of the {of}")
    if given is not None and len(given) != wanted:
        raise UserError(f"{len(given)} {what} for {wanted} {of}; give one for each")


def kept_vectors(file: Path, origin: dict, make: Callable[[], np.ndarray], overwrite: bool) -> np.ndarray:
    """The vectors in `file` where its note says that they are of `origin`, else `make()`, kept there."""
    origin = json.loads(json.dumps(origin))
    made_of = storage.read_origin(file)
    if file.exists() and not made_of and not overwrite:
        raise UserError(f"{file}: already there, and no index of this program; move it, or add --overwrite")
    if file.exists() and made_of == origin:
        if "vectors" in (found := caches.read_arrays(file) or {}):
            return found["vectors"]
    elif file.exists():
        print(f"note: {file}: of other texts or encoders; it is made again", file=sys.stderr)
    vectors = make()
    caches.keep_arrays(file, {"vectors": vectors}, origin=origin)
    return vectors
