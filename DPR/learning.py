"""What a retriever learns from (questions with their passages), how it ranks held-out ones, its training."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import storage
from advice import makes
from dataloaders import Data, in_pieces, pad, require_same_words, tokenizer_hash
from DPR import sentence_transformers_format
from DPR.biencoder import (
    BiEncoder,
    dpr_loss,
    embed,
    load_side,
    own_pooling,
    require_fitting,
    resolve,
    tokenize,
)
from options import Paths, UserError
from pretrained import load_tokenizer, offline
from records import json_value
from session import Session
from settings import RetrieverOptions, TrainingOptions
from training import Loop
from updates import Objective

PASSAGE_LISTS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")


# ------------------------------------------------------------------------------------------------------- data


def read_entries(path: Path, drop_without_positive: bool = False) -> list[dict]:
    """The JSON of DPR.prepare_dpr_data (or published DPR data), checked.

    An entry without a positive is refused, or with `drop_without_positive` left out, and counted aloud.
    """
    again = f"make it with: {makes(path, 'python -m DPR.prepare_dpr_data')}"
    if not path.exists():
        raise UserError(f"{path}: no such file; {again}")
    entries = json_value(storage.decode(path.read_bytes(), path), str(path), f"; {again}")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a JSON list of questions; {again}")
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
        order, pieces = in_pieces([len(encoded[n]) for n in chosen])
        place = torch.tensor(order).argsort()  # where each passage stands then
        chosen = [chosen[n] for n in order]
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
            "passage_pieces": pieces,
            "positive": place[sizes.cumsum(0) - sizes],  # (B,): of each question's passages the first
            "text_numbers": torch.tensor(chosen),  # (N,)
        }

    read = [sum(len(encoded[number[t]]) for t in row) for row in passages]
    return Data([len(q) for q in questions], collate, [read])


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

    scores (Q, P), positive (Q,). A positive among equals may stand in any of their places: its rank is the
    middle one, its recall the share of them before k.
    """
    own = scores[np.arange(len(positive)), positive][:, None]
    above, equal = (scores > own).sum(1), (scores == own).sum(1)
    ranks = above + (equal - 1) / 2
    recalls = {f"recall_{k}": 100 * float(np.clip((k - above) / equal, 0, 1).mean()) for k in (1, 10, 50)}
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
    for split, file in zip(("train", "valid"), files.values(), strict=True):
        storage.warn_if_stale(file, paths.dpr_sources(split))
    for kind, asked in (("hard_", options.hard_negatives), ("", options.other_negatives)):
        most = max(len(e.get(f"{kind}negative_ctxs", [])) for e in entries)
        if asked > max(most, 1):  # 1 is what nobody has asked for
            flag = f"--{kind.replace('_', '-') or 'other-'}negatives"
            session.say(
                f"note: {flag} {asked}: no question of {files['questions train']} has more than {most}"
            )
    begin = options.begin
    with offline(f"{shlex.join(['--encoder', str(paths.bert_tiny)])} (random weights)"):
        pooling = options.pooling or own_pooling(resolve(begin["question"]))
        tokenizers = {side: load_tokenizer(resolve(place)) for side, place in begin.items()}
        encoders = [load_side(place, side, pooling) for side, place in begin.items()]
    model: Any = BiEncoder(*encoders).to(session.device)
    sides = {"question": model.question, "context": model.context}
    lengths = {"question": options.max_length, "context": options.max_passage_length}
    require_fitting(model.question, tokenizers["question"], "--max-length", options.max_length)
    require_fitting(model.context, tokenizers["context"], "--max-passage-length", options.max_passage_length)
    # negatives are part of a batch, so micro-batches matter here as nowhere else (see `Loop`)
    data = training_data(entries, options, tokenizers)
    # a fixed draw: ranks among other passages would not be comparable between evaluations
    held = HeldOut.draw(held_entries, options.valid_queries, options.seed)

    def vectors(side: str, texts: list[str], title: str) -> np.ndarray:
        size = min(128, 4 * loop.batch_size)  # what is trained on decides what fits
        return embed(
            sides[side], tokenizers[side], texts, session, lengths[side], side == "question", title, size
        )

    def evaluate() -> dict[str, float]:
        questions = vectors("question", held.questions, "valid questions")
        passages = vectors("context", held.passages, "valid passages")
        return rank_report(questions, passages, held.positive)

    def export(folder: Path) -> None:
        for side, encoder in sides.items():
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
        flags=flags | {"pooling": pooling},
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
    first = loop.run.logged("valid", step=0)  # none where metrics.jsonl was taken away
    result |= {"before": first[0]} if first else {}
    result["after"] = loop.measure()
    for when in ("before", "after"):
        if when in result:
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
