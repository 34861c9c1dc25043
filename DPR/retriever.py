"""The retriever's stage: questions with their passages, what it learns, how it ranks, and exemplars found
with it."""

import json
import shlex
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import storage
from advice import makes
from commands import DPR_HUB, RetrieverOptions, SearchOptions, TrainingOptions
from dataloaders import (
    EXEMPLAR_COLUMNS,
    Data,
    Example,
    hash_seed,
    listener_turns,
    pad,
    require_same_words,
    tokenizer_hash,
)
from DPR import sentence_transformers_format
from DPR.biencoder import (
    BiEncoder,
    dpr_loss,
    embed,
    load_saved,
    load_side,
    require_fitting,
    resolve,
    tokenize,
)
from exemplars import Index
from hub import Published, folder_of
from models import load_tokenizer, offline
from options import Paths, UserError
from session import Session
from storage import fingerprint
from training import Loop
from updates import Objective

PASSAGE_LISTS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")


# ------------------------------------------------------------------------------------------------------- data


def read_entries(path: Path, drop_without_positive: bool = False) -> list[dict]:
    """The JSON of DPR.prepare_dpr_data (or published DPR data), checked.

    An entry without a positive is refused, or with `drop_without_positive` left out, and counted aloud.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make it with: {makes(path, 'python -m DPR.prepare_dpr_data')}"
        )
    try:
        entries = json.loads(storage.decode(path.read_bytes(), path))
        json.dumps(entries, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a JSON list of questions")
    kept = []
    for n, entry in enumerate(entries):
        if not well_formed(entry):
            raise UserError(
                f"{path}, entry {n}: needs question, and positive_ctxs, hard_negative_ctxs, negative_ctxs "
                "with a text each"
            )
        if entry.get("positive_ctxs"):
            kept.append(entry)
        elif not drop_without_positive:
            raise UserError(
                f"{path}, entry {n}: has no positive passage (positive_ctxs); --drop-without-positive "
                "leaves such entries out"
            )
    if not kept:
        raise UserError(f"{path}: none of its {len(entries):,} entries has a positive passage")
    if len(kept) < len(entries):
        dropped = len(entries) - len(kept)
        print(f"{path}: {dropped:,} of {len(entries):,} entries left out: they have no positive passage")
    return kept


def well_formed(entry: Any) -> bool:
    """A question, and a text in every passage."""
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
        return False
    for name in PASSAGE_LISTS:
        passages = entry.get(name, [])
        if not isinstance(passages, list):
            return False
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in passages):
            return False
    return True


def passages_of(entry: dict, hard: int, other: int) -> list[str]:
    """The positive first, then the negatives of the question itself."""
    chosen = entry["positive_ctxs"][:1]
    chosen = chosen + entry.get("hard_negative_ctxs", [])[:hard] + entry.get("negative_ctxs", [])[:other]
    return [p["text"] for p in chosen]


def training_data(entries: list[dict], options: RetrieverOptions, tokenizers: dict[str, Any]) -> Data:
    """Batches of questions with their passages; `text_numbers` tells copies of one text apart from
    negatives."""
    asked = [e["question"] for e in entries]
    questions = tokenize(tokenizers["question"], asked, options.max_length, keep_latest=True)
    passages = [passages_of(e, options.hard_negatives, options.other_negatives) for e in entries]
    texts = list(dict.fromkeys(t for row in passages for t in row))
    number = {t: i for i, t in enumerate(texts)}
    encoded = tokenize(tokenizers["context"], texts, options.max_passage_length, keep_latest=False)

    def collate(numbers: list[int]) -> dict:
        chosen = [number[t] for i in numbers for t in passages[i]]
        sizes = torch.tensor([len(passages[i]) for i in numbers])
        question_ids, question_mask = pad(
            [questions[i] for i in numbers], tokenizers["question"].pad_token_id
        )
        passage_ids, passage_mask = pad([encoded[n] for n in chosen], tokenizers["context"].pad_token_id)
        return {
            "names": [f"question {i}" for i in numbers],
            "question_ids": question_ids,  # (B, L)
            "question_mask": question_mask,
            "passage_ids": passage_ids,  # (N, L)
            "passage_mask": passage_mask,
            "positive": sizes.cumsum(0) - sizes,  # (B,): where each question's passages begin, its positive
            "text_numbers": torch.tensor(chosen),  # (N,)
        }

    return Data([len(q) for q in questions], collate)


# --------------------------------------------------------------------------------------------------- training


class RetrieverObjective(Objective):
    """Negative log-likelihood of each question's positive among the passages of all processes, over
    questions."""

    def __init__(self, session: Session):
        self.weights, self.session = {"nll": 1.0}, session

    def units(self, batch: dict) -> dict[str, float]:
        return {"nll": len(batch["positive"])}

    def terms(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        questions, passages = model(batch)  # (B, E), (N, E)
        numbers, positive = batch["text_numbers"], batch["positive"]
        own = numbers[positive]  # (B,) text of each question's positive
        if self.session.world > 1:
            stand_in = batch["stand_in"]
            passages, numbers, before = self.session.gather_rows(passages, numbers, counted=not stand_in)
            positive = positive * 0 if stand_in else positive + before
        return {"nll": dpr_loss(questions, passages, positive, own[:, None] == numbers[None])}


@dataclass(frozen=True)
class HeldOut:
    """Questions, all their passages, and the place of each question's positive among these."""

    questions: list[str]
    passages: list[str]
    positive: np.ndarray  # (Q,)

    @classmethod
    def draw(cls, entries: list[dict], most: int, seed: int) -> "HeldOut":
        """`most` of the entries (0: all), the same for one seed."""
        numbers = np.random.default_rng(seed).permutation(len(entries))[: most or None]
        held = [entries[i] for i in sorted(numbers)]
        pool = list(dict.fromkeys(t for e in held for t in passages_of(e, 1, 1)))
        place = {t: i for i, t in enumerate(pool)}
        positive = np.array([place[e["positive_ctxs"][0]["text"]] for e in held])
        return cls([e["question"] for e in held], pool, positive)


def rank_report(questions: np.ndarray, passages: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """`rank_scores` by inner product; questions (Q, E), passages (P, E), positive (Q,)."""
    return rank_scores(questions @ passages.T, positive)  # (Q, E) @ (E, P) -> (Q, P)


def rank_scores(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Average rank (0 is best) of each question's positive among all passages; recall@k and mean reciprocal
    rank in percent.

    scores (Q, P), positive (Q,). Ties count half, so that constant vectors rank in the middle.
    """
    own = scores[np.arange(len(positive)), positive][:, None]
    ranks = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    recalls = {f"recall_{k}": 100 * float((ranks < k).mean()) for k in (1, 10, 50)}
    return {"average_rank": float(ranks.mean()), **recalls, "mrr": 100 * float((1 / (ranks + 1)).mean())}


def without_rivals(
    updates: list[list[int]], passages: list[list[str]], accumulate: int, world: int
) -> list[int]:
    """The questions of an epoch in whose forward pass no text but their own positive stands: their loss is 0.

    `updates` as `Loop.plan` gives them, dealt out as `updates.Update.deal` does; what stands in one forward
    pass of all processes is gathered.
    """
    alone = []
    for numbers in updates:
        pieces = accumulate * world
        for start in range(0, pieces, world):
            together = [i for piece in range(start, start + world) for i in numbers[piece::pieces]]
            if len({text for i in together for text in passages[i]}) == 1:
                alone += together
    return alone


def require_rivals(entries: list[dict], options: RetrieverOptions, loop: Loop, file: Path) -> None:
    """Raises `UserError` where no question has anything to tell its positive from; says how many have not."""
    passages = [passages_of(e, options.hard_negatives, options.other_negatives) for e in entries]
    alone = without_rivals(loop.plan(0), passages, loop.options.accumulate, loop.session.world)
    size = loop.batch_size
    if len(alone) == len(entries):
        raise UserError(
            f"{file}: nothing to tell the positives from: no other passage stands in any forward pass, and "
            f"every loss would be 0. Give a --batch-size above {size}, or negatives (hard_negative_ctxs, "
            "negative_ctxs)"
        )
    if alone:
        loop.session.say(
            f"WARNING: {len(alone):,} of {len(entries):,} questions (the first is entry {min(alone)}) stand "
            "in a forward pass without any passage but their own positive in the first epoch: nothing to "
            f"tell it from, so that they teach nothing. They have no negatives; --batch-size {size} leaves "
            "them alone, or alone at an epoch's end"
        )


def train(
    options: RetrieverOptions,
    training: TrainingOptions,
    session: Session,
    paths: Paths,
    name: str,
    flags: dict,
) -> dict | None:
    """Fine-tune both encoders; the run's folder holds them as question_encoder/ and context_encoder/."""
    files = {f"questions {split}": paths.dpr_data(options.dataset, split) for split in ("train", "valid")}
    entries, held_entries = (read_entries(f, options.drop_without_positive) for f in files.values())
    begin = options.begin
    with offline(f"{shlex.join(['--encoder', str(paths.bert_tiny)])} (random weights)"):
        tokenizers = {side: load_tokenizer(resolve(place)) for side, place in begin.items()}
        encoders = [load_side(place, side, options.pooling) for side, place in begin.items()]
    model: Any = BiEncoder(*encoders).to(session.device)
    require_fitting(model.question, tokenizers["question"], "--max-length", options.max_length)
    require_fitting(model.context, tokenizers["context"], "--max-passage-length", options.max_passage_length)
    # negatives are part of a batch, so micro-batches matter here as nowhere else (see `Loop`)
    data = training_data(entries, options, tokenizers)
    # a fixed draw: ranks among other passages would not be comparable between evaluations
    held = HeldOut.draw(held_entries, options.valid_queries, options.seed)

    def evaluate() -> dict[str, float]:
        questions = embed(
            model.question,
            tokenizers["question"],
            held.questions,
            session,
            options.max_length,
            True,
            "valid questions",
        )
        passages = embed(
            model.context,
            tokenizers["context"],
            held.passages,
            session,
            options.max_passage_length,
            False,
            "valid passages",
        )
        return rank_report(questions, passages, held.positive)

    lengths = {"question": options.max_length, "context": options.max_passage_length}

    def export(folder: Path) -> None:
        for side, encoder in (("question", model.question), ("context", model.context)):
            place = folder / f"{side}_encoder"
            encoder.save_pretrained(str(place))
            tokenizers[side].save_pretrained(str(place))
            sentence_transformers_format.write(place, side, encoder, lengths[side])

    def reload(folder: Path) -> BiEncoder:
        saved = {side: folder / f"{side}_encoder" for side in begin}
        for side, place in saved.items():
            require_same_words(place, load_tokenizer(place), tokenizer_hash(tokenizers[side]))
        return BiEncoder(*(load_side(place, side) for side, place in saved.items()))

    def probe(encoders: nn.Module) -> Tensor:
        return torch.cat(encoders(session.move(data.collate([0]))))  # (1 + its passages, E)

    sources = {name: storage.source(file, paths) for name, file in files.items()}
    for side, place in begin.items():
        found = resolve(place)
        sources[f"{side} encoder"] = storage.source(found, paths, storage.identity(found))
    inputs = {name: entry["sha256"] for name, entry in sources.items()}
    inputs |= {f"{side} tokenizer": tokenizer_hash(tokenizer) for side, tokenizer in tokenizers.items()}
    loop = Loop(
        training,
        session,
        model,
        RetrieverObjective(session),
        data,
        evaluate,
        export,
        paths.saved / "dpr" / name,
        flags=flags,
        inputs=inputs,
        sources=sources,
        metric="average_rank",
        mode="min",
        reload=reload,
        probe=probe,
        micro_batches_matter=True,
        evaluate_first=True,
    )
    require_rivals(entries, options, loop, files["questions train"])
    session.say(f"held out: {len(held.questions):,} questions, {len(held.passages):,} passages")
    result = loop.train()
    if result.get("already_finished"):
        return None
    result |= {"questions": len(held.questions), "passages": len(held.passages)}
    result |= {"before": loop.run.logged("valid")[0], "after": loop.measure()}
    for when in ("before", "after"):
        session.say(f"{when}: {result[when]}")
    middle = (len(held.passages) - 1) / 2  # where constant vectors rank
    if not result["after"]["average_rank"] < middle:
        session.say(
            f"WARNING: the positive's average rank is no better than chance ({middle:.1f}): exemplars found "
            "with this retriever are drawn blindly. Train it longer, with another --lr, or from another "
            "--encoder"
        )
    loop.finish(result)
    return result


# -------------------------------------------------------------------------------------------------- exemplars


class Encoders:
    """Both encoders of a retriever, as trained or as pretrained, with what identifies them."""

    def __init__(self, options: SearchOptions, paths: Paths):
        self.options = options
        self.sides: dict[str, tuple[Any, Any]] = {}
        self.origin: dict[str, Any] = {}  # with the places, for people; see `identity`
        if options.path:
            folder = Path(options.path)
            self.sides = load_saved(folder)
            for side in DPR_HUB:
                place = folder / f"{side}_encoder"
                self.origin[side] = storage.source(place, paths, storage.sha256(place / "model.safetensors"))
            return
        self.origin["pooling"] = options.pooling
        for side in DPR_HUB:
            name = options.encoder or DPR_HUB[side]
            begin = resolve(name)
            with offline("--path with a retriever that DPR.train_dpr has trained"):
                self.sides[side] = (load_side(name, side, options.pooling), load_tokenizer(begin))
            self.origin[side] = storage.source(begin, paths, storage.identity(begin))

    @property
    def identity(self) -> dict[str, Any]:
        """What they are, wherever they lie."""
        return storage.content(self.origin)

    def require_fitting(self) -> None:
        """Raises `UserError` where an encoder cannot read as many tokens as it is asked to."""
        require_fitting(*self.sides["question"], "--max-length", self.options.max_length)
        require_fitting(*self.sides["context"], "--max-passage-length", self.options.max_passage_length)

    def embed(
        self, side: str, texts: list[str], session: Session, title: str, keep: Path | None = None
    ) -> np.ndarray:
        """(N, E); of too long a question the latest tokens are kept, of a candidate the first."""
        asking = side == "question"
        most = self.options.max_length if asking else self.options.max_passage_length
        place = keep and keep / title
        return embed(*self.sides[side], texts, session, most, asking, title, self.options.batch_size, place)


class Matching:
    """Candidates by their vectors' inner product with the dialogue's: of the replies, or of the dialogues
    that they answer."""

    def __init__(self, options: SearchOptions, session: Session, paths: Paths):
        self.options, self.session, self.encoders = options, session, Encoders(options, paths)
        self.encoders.require_fitting()
        self.origin = self.encoders.origin | {
            "max_length": options.max_length,
            "max_passage_length": options.max_passage_length,
        }
        if options.match != "reply":
            self.origin["match"] = options.match

    def read(self, corpus: Sequence[Example], groups: Sequence[str] | None, keep: Path) -> None:
        """The candidates, and the emotion of each where a dialogue sees only its own emotion's."""
        self.keep = keep
        for model, _ in self.encoders.sides.values():
            model.to(self.session.device)
        if self.options.match == "context":
            side, texts = "question", [" ".join(c.history) for c in corpus]
        else:
            side, texts = "context", [c.response for c in corpus]
        vectors = self.encoders.embed(side, texts, self.session, "candidates", keep)
        self.index = Index(vectors, [c.conv_id for c in corpus], groups)

    def hits(
        self, split: str, examples: Sequence[Example], own: Sequence[str | None]
    ) -> list[list[tuple[int, float]]]:
        """For each example the places of its best candidates with their scores, none of its `own`
        conversation."""
        asked = [" ".join(e.history) for e in examples]
        queries = self.encoders.embed("question", asked, self.session, split, self.keep)
        return self.index.search(queries, self.options.top_k, own, [e.emotion for e in examples])


class Drawn:
    """Candidates by chance, under the same rules: what exemplars do only by being there."""

    def __init__(self, options: SearchOptions):
        self.options = options
        self.origin: dict[str, Any] = {"match": "random", "seed": options.seed}

    def read(self, corpus: Sequence[Example], groups: Sequence[str] | None, keep: Path) -> None:
        self.owners = np.array([c.conv_id for c in corpus], dtype=object)
        self.grouped = groups is not None
        self.places: dict[str, list[int]] = {}
        for place, group in enumerate(groups or [""] * len(corpus)):
            self.places.setdefault(group, []).append(place)

    def hits(
        self, split: str, examples: Sequence[Example], own: Sequence[str | None]
    ) -> list[list[tuple[int, float]]]:
        draw = np.random.default_rng(hash_seed(self.options.seed, split))
        found = []
        for example, owner in zip(examples, own, strict=True):
            places = np.array(self.places.get(example.emotion if self.grouped else "", []), dtype=int)
            allowed = places[self.owners[places] != owner]
            chosen = draw.permutation(allowed)[: self.options.top_k]
            found.append([(int(place), 0.0) for place in chosen])
        return found


def find(options: SearchOptions, session: Session, paths: Paths, overwrite: bool) -> None:
    """{split}_dpr.csv: the exemplars of every listener turn, out of the training split's replies."""
    matching = Drawn(options) if options.match == "random" else Matching(options, session, paths)
    shared: dict[str, Any] = matching.origin | {"candidates": options.candidates, "top_k": options.top_k}
    shared |= {"corpus": storage.sha256(paths.dialogues("train"))}
    todo = {}
    for split in options.splits:
        origin = {**shared, "dialogues": storage.sha256(paths.dialogues(split))}
        if not storage.ready(paths.exemplars(split), origin, overwrite):
            todo[split] = origin
    if not todo:
        return
    corpus = listener_turns(paths.dialogues("train"))
    # an interrupted stage goes on there; outputs of all splits share the candidates' vectors
    keep = (
        paths.cache
        / f"vectors-{fingerprint(str(storage.content(shared)), session.precision, options.batch_size)[:16]}"
    )
    # the paper's rule: replies of the same (gold) emotion only
    same_emotion = options.candidates == "same-emotion"
    groups = [c.emotion for c in corpus] if same_emotion else None
    matching.read(corpus, groups, keep)
    for split, origin in todo.items():
        examples = listener_turns(paths.dialogues(split))
        own: Sequence[str | None] = [e.conv_id for e in examples]
        if split != "train":
            own = own_conversations(examples, corpus)
        hits = matching.hits(split, examples, own)
        write_exemplars(paths.exemplars(split), examples, corpus, hits, origin)
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
    warn_of_nobody(file, counts, origin.get("candidates") == "same-emotion")


def warn_of_nobody(file: Path, counts: list[int], same_emotion: bool) -> None:
    """Says how many listener turns get no exemplar at all, and why."""
    nobody = counts.count(0)
    if not nobody:
        return
    who = "no listener turn gets an exemplar" if nobody == len(counts) else f"{nobody:,} get no exemplar"
    of = (
        "and of the same emotion: --candidates all drops that rule"
        if same_emotion
        else "in the training split"
    )
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


class Retriever(Published):
    """Both encoders with their tokenizers: finds the replies of a pool that answer a text best.

    Exact; equal scores stand in the pool's order. Safe to be used by several threads.
    """

    def __init__(self, encoders: Encoders, session: Session):
        self.encoders, self.session = encoders, session
        for model, _ in encoders.sides.values():
            model.to(session.device)

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path | None = None,
        session: Session | None = None,
        *,
        encoder: str | None = None,
        pooling: str = "cls",
        max_length: int = 128,
        max_passage_length: int = 64,
        batch_size: int = 128,
    ) -> "Retriever":
        """The encoders of a train_dpr run, a folder or a name on the hub; or, with `encoder` in place of
        `run`, as pretrained."""
        folder = folder_of(run) if run else None
        options = SearchOptions(
            path=str(folder) if folder else None,
            encoder=encoder,
            pooling=pooling,
            candidates="all",
            top_k=0,
            splits=[],
            max_length=max_length,
            max_passage_length=max_passage_length,
            batch_size=batch_size,
        )
        made = cls(Encoders(options, Paths()), session or Session())
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
        compared = list(texts if answering is None else answering)
        side = "context" if answering is None else "question"
        origin: dict[str, Any] = {"encoders": self.encoders.identity, "pool": fingerprint(compared)}
        options = self.encoders.options
        if answering is not None:  # read by the other encoder
            origin |= {"side": side, "max_length": options.max_length}
        origin |= {"max_passage_length": options.max_passage_length, "precision": self.session.precision}

        def make() -> np.ndarray:
            keep = file and file.parent / f".vectors-{fingerprint(str(origin))[:16]}"
            found = self.encoders.embed(side, compared, self.session, "pool", keep)
            if keep:
                shutil.rmtree(keep, ignore_errors=True)
            return found

        vectors = make() if file is None else kept_vectors(file, origin, make, overwrite)
        return Pool(texts, vectors, owners or [""] * len(texts), emotions)

    def search(
        self,
        texts: Sequence[str],
        pool: Pool | Sequence[str],
        k: int = 10,
        owners: Sequence[str] | None = None,
        emotions: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """The best `k` of `pool` for each text, best first.

        `owners`: the conversation whose replies a text must not get. `emotions`: restrict each text to
        replies of one emotion. Nothing is left out otherwise.
        """
        if not texts:
            return []
        found = pool if isinstance(pool, Pool) else self.pool(pool)
        if emotions is not None and found.emotions is None:
            raise UserError("--emotion: the replies of this pool have no emotions; leave it out")
        queries = self.encoders.embed("question", list(texts), self.session, "questions")
        index = Index(found.vectors, found.owners, found.emotions if emotions is not None else None)
        hits = index.search(queries, k, owners or [None] * len(texts), emotions)
        return [[Hit(found.texts[place], score, place) for place, score in row] for row in hits]


def kept_vectors(file: Path, origin: dict, make: Callable[[], np.ndarray], overwrite: bool) -> np.ndarray:
    """The vectors in `file` where its note says that they are of `origin`, else `make()`, kept there."""
    origin = json.loads(json.dumps(origin))
    made_of = storage.read_origin(file)
    if file.exists() and not made_of and not overwrite:
        raise UserError(f"{file}: already there, and no index of this program; move it, or add --overwrite")
    if file.exists() and made_of == origin:
        try:
            with np.load(file, allow_pickle=False) as stored:
                return stored["vectors"]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            print(f"warning: {file}: cannot be read ({error}); it is made again")
    elif file.exists():
        print(f"note: {file}: of other texts or encoders; it is made again")
    vectors = make()
    try:
        with storage.whole_file(file, origin) as part, open(part, "wb") as handle:
            np.savez(handle, vectors=vectors)
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in storage.READ_ONLY:
            raise
        print(f"note: {file.parent}: may not be written, so the index is not kept")
    return vectors
