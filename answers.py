"""What a model says of texts, kept: no text is read twice, in whatever table and beside whatever others it
comes again."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import caches

Turns = Sequence[str]  # what was said before a reply, oldest first
PROBE = 64  # texts by which a speed is measured
#: (replies, what was said before each) -> (N, K) numbers
Ask = Callable[[Sequence[str], Sequence[Turns]], np.ndarray]


def key_of(reply: str, turns: Turns) -> bytes:
    text = "\0".join([reply, *turns])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Answers:
    """`ask`, which is asked about each distinct text once, with what was said before it only where it
    `reads_context`.

    `file` (npz) is named by what is asked, weights and precision; without one nothing outlives the process.
    Of two processes at the same file the later one's answers are kept, and the other's, where it has read
    them.
    """

    def __init__(self, ask: Ask, file: Path | None = None, reads_context: bool = True):
        self.ask, self.file, self.reads_context = ask, file, reads_context
        self.known: dict[bytes, np.ndarray] | None = None  # read when first asked

    def read(self) -> dict[bytes, np.ndarray]:
        if self.file is None or not self.file.exists():
            return {}
        found = caches.cached(self.file, lambda: {"keys": np.zeros((0, 16), np.uint8), "rows": np.zeros(0)})
        return {key.tobytes(): row for key, row in zip(found["keys"], found["rows"], strict=True)}

    def new(self, replies: Sequence[str], contexts: Sequence[Turns]) -> dict[bytes, int]:
        """{key: place} of the texts that it does not know yet, each once."""
        if self.known is None:
            self.known = self.read()
        found: dict[bytes, int] = {}
        for place, key in enumerate(self.keys(replies, contexts)):
            if key not in self.known:
                found.setdefault(key, place)
        return found

    def keys(self, replies: Sequence[str], contexts: Sequence[Turns]) -> list[bytes]:
        before = contexts if self.reads_context else [()] * len(replies)
        return [key_of(*pair) for pair in zip(replies, before, strict=True)]

    def __call__(self, replies: Sequence[str], contexts: Sequence[Turns]) -> np.ndarray:
        """(N, K)"""
        new = self.new(replies, contexts)
        assert self.known is not None
        if new:
            before = [contexts[n] if self.reads_context else () for n in new.values()]
            rows = self.ask([replies[n] for n in new.values()], before)
            self.known.update(zip(new, rows, strict=True))
            self.write()
        return np.stack([self.known[key] for key in self.keys(replies, contexts)])

    def write(self) -> None:
        if self.file is None or not self.known:
            return
        known = self.read() | self.known
        keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16)
        fresh = {"keys": keys, "rows": np.stack(list(known.values()))}
        caches.keep_arrays(self.file, fresh)


@dataclass(frozen=True)
class Valued:
    """What a call makes of answers, (N,) of (N, K). Several of them share what was said in one reading."""

    answers: Answers
    value: Callable[[np.ndarray], np.ndarray]

    def __call__(self, replies: Sequence[str], contexts: Sequence[Turns]) -> np.ndarray:
        return self.value(self.answers(replies, contexts))


def announce(
    asked: Iterable[tuple[Answers, Sequence[str], Sequence[Turns]]], say: Callable[[str], None]
) -> None:
    """Says about how long it takes to ask each of `asked` about its texts, from how long a few of them take;
    nothing where that is less than a minute."""
    seconds, count = 0.0, (0, 0)
    for answers, replies, contexts in asked:
        new = list(answers.new(replies, contexts).values())
        if len(new) < 10 * PROBE:
            continue
        some = new[:: len(new) // PROBE]
        for part in (some[:8], some[8:]):  # the first call is slow
            began = time.monotonic()
            answers([replies[n] for n in part], [contexts[n] for n in part])
        seconds += (time.monotonic() - began) / len(some[8:]) * (len(new) - len(some))
        count = max(count, (len(new), len(replies)))
    if seconds >= 60:
        say(
            f"{count[0]:,} of {count[1]:,} replies are new to the judges and critics, which take about "
            f"{seconds / 60:.0f} minutes to read them; what they say is kept for other tables"
        )
