"""What a critic learns from a better one: texts without labels, and the teacher's view of each."""

import random
import re
from collections.abc import Sequence

import numpy as np

import judges
from answers import Turns
from corpora import listener_turns
from critics import Critic
from options import Paths, UserError
from session import Session
from settings import TeacherOptions

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SHORTEST, LONGEST = 3, 40  # words of a run


def pieces(
    contexts: Sequence[Turns], replies: Sequence[str], count: int, seed: int = 0
) -> tuple[list[Turns], list[str]]:
    """Distinct texts made of `replies`, none of which is one of them, each with a reply's context.

    Of every reply: its sentences, where it has several; `count` runs of its words; and `count` times half of
    its sentences before half of those of a reply drawn by chance. What a level hangs on is in some of them
    and not in others, which a few thousand whole replies do not show.
    """
    rng = random.Random(seed)
    parts = [[part for part in SENTENCE_END.split(reply) if part.strip()] for reply in replies]
    found: dict[str, Turns] = {}

    def half(sentences: list[str]) -> list[str]:
        return rng.sample(sentences, -(-len(sentences) // 2))

    for context, own in zip(contexts, parts, strict=True):
        words = " ".join(own).split()
        made = [*own] if len(own) > 1 else []
        for _ in range(count):
            if len(words) > SHORTEST:
                length = rng.randint(SHORTEST, min(len(words), LONGEST))
                start = rng.randint(0, len(words) - length)
                made.append(" ".join(words[start : start + length]))
            made.append(" ".join([*half(own), *half(rng.choice(parts))]))
        for text in made:
            found.setdefault(text, context)
    for text in ["", *replies]:
        found.pop(text, None)
    return list(found.values()), list(found)


def taught(
    options: TeacherOptions,
    kind: str,
    outputs: int,
    pairs: tuple[Sequence[Turns], Sequence[str]],
    paths: Paths,
    session: Session,
) -> tuple[list[Turns], list[str], np.ndarray]:
    """(contexts, replies, the teacher's probabilities (N, outputs)) of listener turns of the training
    dialogues and of pieces of the training `pairs` (contexts, replies); of several teachers, their mean.

    What a teacher says is kept in the cache. Raises `UserError` where one is no critic of these labels.
    """
    if session.world > 1:
        raise UserError("--teacher: it labels in one process; run it without torchrun")
    teachers = [Critic.from_pretrained(folder, session).of(kind) for folder in options.teacher]
    for teacher in teachers:
        known = teacher.critic.settings
        if (known.kind, known.outputs) != (kind, outputs):
            raise UserError(
                f"--teacher {teacher.folder}: a critic of {known.kind} with {known.outputs} labels; what is "
                f"learnt is {kind} with {outputs}"
            )
    turns = listener_turns(paths.dialogues("train"))
    if 0 < options.turns < len(turns):
        turns = [turns[i] for i in sorted(random.Random(0).sample(range(len(turns)), options.turns))]
    contexts: list[Turns] = [e.history for e in turns]
    replies = [e.response for e in turns]
    if options.pieces:
        befores, texts = pieces(*pairs, options.pieces)
        contexts, replies = contexts + befores, replies + texts
    views = []
    for teacher in teachers:
        teaches = judges.answers_of(teacher.whole, f"{kind}, as {teacher.folder.name} sees it", paths.cache)
        views.append(teacher.own(teaches(replies, contexts)))
    return contexts, replies, np.mean(views, axis=0)
