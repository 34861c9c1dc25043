"""Validated rows -> token ids -> batches. Knows collation, and no model.

The readers of what is on disk stand in corpora.py.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caches import cached
from corpora import Example
from options import UserError
from storage import fingerprint, hash_seed

#: stands before each exemplar in the source; plain words, so that a pretrained tokenizer knows them too
EXEMPLAR_MARKER = "example:"


# ----------------------------------------------------------------------------------------------------- tokens


def tokenizer_hash(tokenizer) -> str:
    """sha256 of the whole vocabulary with its ids: what a model's table of words has learnt."""
    return fingerprint(sorted(f"{i} {w}" for w, i in tokenizer.get_vocab().items()))


def require_same_words(folder: Path, tokenizer, expected: str) -> None:
    """Raise `UserError` where `tokenizer`, loaded from `folder`, is not the one of the hash `expected`."""
    if tokenizer_hash(tokenizer) != expected:
        raise UserError(
            f"{folder}: its tokenizer has other words than the one that was trained with (GloVe: a workdir's "
            "data/glove; prepare_data.py --glove OTHER/data/glove takes over another workdir's)"
        )


def encode(
    tokenizer, texts: Sequence[str], cache: Path | None = None, controls: bool = False
) -> dict[str, np.ndarray]:
    """text -> token ids (int32, no special tokens). Each distinct text is tokenised once, and cached by
    content.

    A control token that stands in a text literally (</s>, <pad>) is words like any other; with `controls` it
    is the control token, as in the marks of a chat template.
    """
    distinct = list(dict.fromkeys(texts))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = None
    if cache:  # the hash of a vocabulary takes longer than a dialogue's tokens
        # one vocabulary can be read in two ways: by other rules, other merges or scores
        whole = json.loads(backend.to_str()) if backend else {}
        rules = str([whole.get(part) for part in ("normalizer", "pre_tokenizer", "model")])
        name = fingerprint(tokenizer_hash(tokenizer), rules, f"control tokens: {controls}", distinct)[:32]
        file = Path(cache) / f"{name}.npz"

    def tokenise() -> dict[str, np.ndarray]:
        rows = _ids(tokenizer, distinct)
        known = {} if controls else _controls(tokenizer)
        literal = re.compile("|".join(map(re.escape, known.values())) or r"(?!)")
        never = known.keys() - {getattr(tokenizer, "unk_token_id", None)}  # an unknown word is unknown
        # rare; all other texts are given to the tokenizer as they are
        held = [n for n, t in enumerate(distinct) if literal.search(t) or not never.isdisjoint(rows[n])]
        apart = [_apart(distinct[n], literal, getattr(backend, "normalizer", None)) for n in held]
        for n, row in zip(held, _ids(tokenizer, apart), strict=True):
            rows[n] = row
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        count = int(ends[-1]) if len(ends) else 0
        flat = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=count)
        return {"ids": flat, "ends": ends}

    found = cached(file, tokenise)
    flat, ends = found["ids"], found["ends"]
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return {text: flat[a:b] for text, a, b in zip(distinct, starts, ends, strict=True)}


#: a tokenizer that cuts remembers how, and refuses to be told while another thread uses it
CUTTING = threading.Lock()


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def _controls(tokenizer) -> dict[int, str]:
    """{id: how it is written} of the tokens that are no words: end, padding, unknown, T5's extra ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items() if token.special}


def _apart(text: str, literal: re.Pattern, normalizer) -> str:
    """`text` with a blank inside each literal control token, which a tokenizer then reads as words.

    `split_special_tokens=True` is not enough: T5's vocabulary holds </s> as a piece, and its model finds it.
    """

    def cut(uncut: str) -> str:
        return literal.sub(lambda found: f"{found[0][0]} {found[0][1:]}", uncut)

    text = cut(text)
    # a normaliser may make a control token of other characters (full-width ones)
    if normalizer is not None and literal.search(normal := normalizer.normalize_str(text)):
        text = cut(normal)
    return text


def pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows -> (B, longest) int64 ids and their (B, longest) 0/1 mask; a batch of empty rows has width
    1."""
    lengths = np.array([len(r) for r in rows])[:, None]  # (B, 1)
    width = max(1, int(lengths.max()))
    places = np.arange(width)
    real = places >= width - lengths if left else places < lengths  # (B, longest)
    ids = np.full(real.shape, value, dtype=np.int64)
    ids[real] = np.concatenate(rows)  # not row by row: a GPU waits for its batch
    return torch.from_numpy(ids), torch.from_numpy(real.astype(np.int64))


#: texts that are read at once, however they differ in length
FEWEST = 16


def in_pieces(lengths: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """(order, [(texts, width)]): how texts of these lengths are read with little padding: shortest first, in
    at most four pieces, each as wide as its longest (`models.read_pieces`). Few texts are one piece, in their
    own order."""
    left, counts = len(lengths), list[int]()
    while left >= 2 * FEWEST and len(counts) < 3:
        counts.append(left // 2)
        left -= left // 2
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if counts else list(range(left))
    widths, end = list[int](), 0
    for count in (*counts, left):
        end += count
        widths.append(max([1, *(lengths[n] for n in order[end - count : end])]))
    return order, list(zip((*counts, left), widths, strict=True))


# ---------------------------------------------------------------------------------------------------- batches


def plan_epoch(
    lengths: Sequence[int], *, batch_size: int, batch_tokens: int = 0, seed: int, epoch: int
) -> list[list[int]]:
    """The steps of one epoch, each a list of example numbers of like length: a function of its arguments
    alone.

    Shuffled, sorted by length inside pools of 100 batches, cut (`plan_once`), and the batches shuffled again.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    steps: list[list[int]] = []
    for start in range(0, len(order), 100 * batch_size):
        pool = order[start : start + 100 * batch_size]
        batches = plan_once([lengths[i] for i in pool], batch_size, batch_tokens)
        steps += [[pool[i] for i in batch] for batch in batches]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def plan_once(lengths: Sequence[int], batch_size: int, batch_tokens: int = 0) -> list[list[int]]:
    """All examples, longest first (running out of memory shows at once), in batches of like length.

    A batch closes at `batch_size` examples or, where `batch_tokens` > 0, before examples x longest would
    exceed it. A length counts source and reply together; these are padded apart, which can take more.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batches and (
            len(batches[-1]) == batch_size
            or (batch_tokens and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens)
        )
        if full or not batches:
            batches.append([])
        batches[-1].append(i)
    return batches


@dataclass
class Data:
    """Examples ready for the loop: `collate(list of numbers)` gives one batch of CPU tensors, `lengths` its
    cost.

    `bare_lengths`: without exemplars and marks, where these lengthen an example. Batches are made by them
    where no `batch_tokens` bounds what is padded: runs of one seed then learn the same turns in the same
    order, whatever is put before these.
    `further_lengths`: of what else takes memory, each of all examples: replies to be written (their
    logits), a question's passages, exemplars that are read apart.
    `cut`: {flag: how many examples have a text of more tokens than it lets through}.
    """

    lengths: list[int]
    collate: Callable[[list[int]], dict]
    further_lengths: list[list[int]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    bare_lengths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def plan(self, batch_size: int, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
        lengths = self.lengths if batch_tokens else self.bare_lengths or self.lengths
        return plan_epoch(lengths, batch_size=batch_size, batch_tokens=batch_tokens, seed=seed, epoch=epoch)


#: what a flag cuts, and from which share of it on the flag is too small for its tokenizer: of cut replies few
#: learn to end
CUTS = {
    "--tgt-len": ("replies, which lose their end", 0.05),
    "--src-len": ("dialogues", 0.2),
    "--reply-len": ("replies, whose rest is not read", 0.5),
    "--context-len": ("dialogues", 0.5),
}


def too_much_cut(data: Data, now: Mapping[str, int]) -> list[str]:
    """Warnings of flags that cut too many of the training's texts. `now`: {flag: its tokens}."""
    return [
        f"WARNING: {flag} {now[flag]} cuts {data.cut[flag]:,} of {len(data):,} training {what}; raise "
        "it (a tokenizer of bytes or letters needs about four times as much)"
        for flag, (what, share) in CUTS.items()
        if now.get(flag) and data.cut.get(flag, 0) > share * len(data)
    ]


@dataclass(frozen=True)
class SplitData:
    """The turns of one split that are to be written, and their batches."""

    examples: list[Example]
    data: Data


def join(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The turns' ids one after the other; nothing for no turns."""
    return np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int32)


def latest(row: np.ndarray, most: int) -> np.ndarray:
    """The last `most` ids: what is too long loses its oldest part."""
    return row[-most:] if most else row[:0]


def reply_layout(
    context: np.ndarray, reply: np.ndarray, sep: int, bos: int | None, context_len: int, reply_len: int
) -> tuple[np.ndarray, int]:
    """The one layout of every critic: `[bos] context </s> reply </s>`, and where the reply begins.

    The context keeps its latest `context_len` tokens, the reply its first `reply_len`.
    """
    head = [] if bos is None else [bos]
    context = latest(context, context_len)
    row = np.concatenate([head, context, [sep], reply[:reply_len], [sep]]).astype(np.int64)
    return row, len(head) + len(context) + 1


def critic_data(
    contexts: Sequence[Sequence[str]],
    replies: Sequence[str],
    targets: Sequence[float] | None,
    tokenizer,
    settings,
    cache: Path | None = None,
) -> Data:
    """Context (its turns, oldest first) and reply of each example in the critics' layout.

    `settings` (models.CriticSettings): `context_len` and `reply_len` say how much the critic reads.
    """
    encoded = encode(tokenizer, [t for c in contexts for t in c] + list(replies), cache)
    # a start token only where there is no </s>: a critic with one can be a loss, whose layout has no start
    eos = tokenizer.eos_token_id
    sep, bos = (eos, None) if eos is not None else (tokenizer.sep_token_id, tokenizer.cls_token_id)
    rows = []
    cut = {"--reply-len": 0, "--context-len": 0}
    for context, reply in zip(contexts, replies, strict=True):
        said = join([encoded[turn] for turn in context])
        cut["--reply-len"] += len(encoded[reply]) > settings.reply_len
        cut["--context-len"] += len(said) > settings.context_len
        rows.append(reply_layout(said, encoded[reply], sep, bos, settings.context_len, settings.reply_len))

    def collate(numbers: list[int]) -> dict:
        input_ids, mask = pad([rows[i][0] for i in numbers], tokenizer.pad_token_id)  # (B, L)
        begins = torch.tensor([rows[i][1] for i in numbers])[:, None]
        batch = {
            "names": [f"row {i}" for i in numbers],
            "input_ids": input_ids,
            "attention_mask": mask,
            # the reply and its final </s>
            "reply_mask": mask * (torch.arange(input_ids.shape[1])[None] >= begins),
        }
        if targets is not None:
            batch["targets"] = torch.tensor([targets[i] for i in numbers])
        return batch

    return Data([len(r[0]) for r in rows], collate, cut=cut)


class Entering:
    """How exemplars enter the batches of a split: not at all. The ways of exemplars.py give other answers."""

    def before(self, number: int) -> np.ndarray:
        """Token ids that stand before the dialogue of example `number`."""
        return join([])

    def part(self, numbers: list[int]) -> dict[str, Any]:
        """What a batch of these examples holds besides."""
        return {}

    def lengths(self) -> list[list[int]]:
        """Of what stands in `part`, tokens of each example, by each measure of what that costs."""
        return []


@dataclass(frozen=True)
class GeneratorRow:
    """One example as token ids."""

    source: np.ndarray
    speakers: np.ndarray  # of each source token: 0 exemplar, 1 speaker, 2 listener
    reply: np.ndarray
    context: np.ndarray  # what stands before the soft reply in a critic's input: the latest turns, then </s>


def generator_data(
    examples: Sequence[Example],
    tokenizer,
    *,
    src_len: int,
    tgt_len: int | None,
    cache: Path | None = None,
    exemplars: Entering | None = None,
    labels: dict[str, list] | None = None,
    critic_context_len: int = 0,
    marks: Sequence[str] | None = None,
    start: int = 0,
) -> Data:
    """Source, speakers, target, and what the critics need, for each listener turn.

    Source: `[exemplars] turn </s> turn </s> ...`; exemplars carry speaker id 0; the dialogue keeps its latest
    `src_len` tokens, speaker 1 and listener 2 in turn. Target: `reply </s>`, cut to `tgt_len` tokens; a cut
    one has no end, for its reply does not end there. `tgt_len=None` keeps replies whole. `labels`: {critic:
    one target an example}, of the critics that the loss asks. `marks`: words for each example, or "", which
    the decoder reads after the token that it starts with, `start`, and before the reply.
    """
    entering = exemplars or Entering()
    encoded = encode(tokenizer, [t for e in examples for t in (*e.history, e.response)], cache)
    marked = encode(tokenizer, marks or (), cache)
    eos = tokenizer.eos_token_id
    rows = []
    cut = {"--src-len": 0, "--tgt-len": 0}
    for n, example in enumerate(examples):
        turns = [encoded[t] for t in example.history]
        # every turn ends with </s>, so that the model sees where the speaker changes
        dialogue = join([np.append(t, eos) for t in turns])
        # one speaker id a token, </s> included: the same cut below keeps the two aligned
        speakers = join([np.full(len(t) + 1, 1 + i % 2) for i, t in enumerate(turns)])
        before = entering.before(n)
        # whole exemplars, then as much of the dialogue's end as fits
        source = np.concatenate([before, latest(dialogue, src_len)])
        speakers = np.concatenate([np.zeros(len(before), dtype=np.int64), latest(speakers, src_len)])
        reply = encoded[example.response]
        target = np.append(reply, eos)[:tgt_len]
        cut["--src-len"] += len(dialogue) > src_len
        cut["--tgt-len"] += len(target) <= len(reply)
        context = np.append(latest(join(turns), critic_context_len), eos)
        rows.append(GeneratorRow(source, speakers, target, context))
    names = [f"{e.conv_id} utterance {e.utterance_idx}" for e in examples]

    def collate(numbers: list[int]) -> dict:
        chosen = [rows[i] for i in numbers]
        source_ids, source_mask = pad([r.source for r in chosen], tokenizer.pad_token_id)
        # (B, T), T the longest reply of this batch
        reply_ids, reply_mask = pad([r.reply for r in chosen], -100)
        batch = {
            "names": [names[i] for i in numbers],
            "numbers": list(numbers),
            "source_ids": source_ids,  # (B, S)
            "source_mask": source_mask,
            "speaker_ids": pad([r.speakers for r in chosen], 0)[0],
            "labels": reply_ids,
            "reply_mask": reply_mask,
            "reply_places": reply_mask.flatten().nonzero()[:, 0],  # (N,) of the real tokens among B * T
        }
        batch |= entering.part(numbers)
        if marks is not None:
            # padded on the left, so that the reply follows its marks directly whatever else is in the batch
            prefixes = [np.append(start, marked[marks[i]]) for i in numbers]
            batch["prefix_ids"], batch["prefix_mask"] = pad(prefixes, tokenizer.pad_token_id, left=True)
        if labels:
            # padded on the left, so that a soft reply follows its context directly whatever else is in the
            # batch
            contexts = [r.context for r in chosen]
            batch["context_ids"], batch["context_mask"] = pad(contexts, tokenizer.pad_token_id, left=True)
            batch["critic_targets"] = {k: torch.tensor([v[i] for i in numbers]) for k, v in labels.items()}
        return batch

    lengths = [len(r.source) + len(r.reply) for r in rows]
    # in a source speaker 0 is an exemplar's
    bare = [length - int((r.speakers == 0).sum()) for length, r in zip(lengths, rows, strict=True)]
    return Data(lengths, collate, [[len(r.reply) for r in rows], *entering.lengths()], cut, bare)
