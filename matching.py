"""Which listener turns the replies of a file answer: by key, else by history and reference as normalising.py
writes them, else by order.

Every reply finds one item of the split, or is named in a note, or the file is refused.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from corpora import Example
from layouts import Reply, joined_turns
from normalising import words
from options import UserError

#: what tokenizers write for their control tokens
CONTROL_TOKEN = re.compile(
    r"</?s>|<pad>|<unk>|<mask>|<[be]os>|<extra_id_\d+>|\[(?:PAD|SEP|CLS|UNK|MASK)\]|<\|\w+\|>|__eo[ut]__"
)
#: who speaks, before a turn of a history
SPEAKER = re.compile(r"\b(?:speaker|listener|user|system|human|assistant|agent|bot)\s?\d*\s?:", re.IGNORECASE)
#: where nothing but single references finds an item, the share of a file's replies that must: "I'm so sorry
#: to hear that!" is a reference of any split
FEWEST_LONE = 0.2
#: the share of replies beside another item's history or reference at which a file's keys are not believed
MOST_OTHER = 0.2
Found = dict[int, list[Reply]]  # number of an item -> the replies to it
Pair = tuple[str | None, str | None]  # history and reference
#: by what a reply finds its item: the places of (history, reference) that must agree, and what a note says
WAYS: tuple[tuple[tuple[int, ...], str], ...] = (
    ((0, 1), ""),
    ((0,), "matched by the history alone"),
    ((1,), "matched by the reference alone"),
)


def matched(replies: Sequence[Reply], examples: Sequence[Example], path: Path) -> tuple[Found, list[str]]:
    """The items that `replies`, all of one system, answer, and notes of what could not be matched.

    Raises `UserError` for unknown and doubled keys, and for keys that the file's own histories or references
    contradict; for replies of control tokens or all in quotation marks; and where no item is answered.
    """
    _check_quotes(path, replies)
    _check_control_tokens(path, replies)
    if replies[0].key is not None:
        return _by_key(replies, examples, path)
    first: dict[Pair, int] = {}  # of a context its smallest number leads
    for reply in replies:
        pair = (reply.history, reply.reference)
        first[pair] = min(reply.sample, first.get(pair, reply.sample))
    leading = [r for r in replies if r.sample == first[r.history, r.reference]]
    found, notes = _by_text(leading, examples, path)
    _follow(found, replies, first)
    return found, notes


def items_called(which: str, examples: Sequence[Example]) -> list[int]:
    """Numbers of the listener turns of a set, ascending: all; the last of each conversation; non-last, the
    others."""
    last = set({e.conv_id: n for n, e in enumerate(examples)}.values())
    return [n for n in range(len(examples)) if which == "all" or (n in last) == (which == "last")]


def _check_control_tokens(path: Path, replies: Sequence[Reply]) -> None:
    """Refuse replies of nothing but control tokens; warn of one inside a reply, since it counts as a word."""
    inside = []
    for reply in replies:
        if CONTROL_TOKEN.search(reply.text):
            inside.append(reply.line)
            if not CONTROL_TOKEN.sub("", reply.text).strip():
                raise UserError(
                    f"{path}, line {reply.line}: the reply is nothing but control tokens "
                    f"({reply.text[:40]!r}); decode without them (skip_special_tokens=True) and write the "
                    "file again"
                )
    if inside:
        print(
            f"warning: {path}: {len(inside):,} replies hold control tokens (first: line {inside[0]}), which "
            "count as words here; decode without them (skip_special_tokens=True) and write the file again"
        )


def _check_quotes(path: Path, replies: Sequence[Reply]) -> None:
    """Refuse replies that some writer has quoted and nobody has unquoted."""
    texts = [r for r in replies if r.text.strip()]
    quoted = [r for r in texts if len(r.text) > 1 and r.text[0] == r.text[-1] == '"']
    if len(quoted) == len(texts) > 1:
        raise UserError(
            f"{path}, line {quoted[0].line}: every reply stands in quotation marks; write them without, or "
            "as a csv with a header"
        )
    escaped = [r.line for r in replies if '\\"' in r.text or "\\n" in r.text]
    if escaped:
        print(
            f"warning: {path}: {len(escaped):,} replies hold escaped marks or line ends (first: line "
            f"{escaped[0]}), which count as words here; write the file again without them"
        )


def _by_key(replies: Sequence[Reply], examples: Sequence[Example], path: Path) -> tuple[Found, list[str]]:
    keys = [r.key for r in replies if r.key is not None]
    _refuse_unknown(path, keys, examples)
    number = {e.key: n for n, e in enumerate(examples)}
    found: Found = {}
    taken: set[tuple] = set()
    differing = 0
    for reply, key in zip(replies, keys, strict=True):
        if (key, reply.sample) in taken:
            raise UserError(
                f"{path}, line {reply.line}: {key[0]}, utterance {key[1]} stands there twice; where a system "
                "gives several replies, number them in a column named sample"
            )
        taken.add((key, reply.sample))
        n = number[key]
        found.setdefault(n, []).append(reply)
        if reply.reference is not None:
            differing += _letters(reply.reference) != _letters(examples[n].response)
    notes = [f"references that differ from the split's: {differing:,}"] if differing else []
    if lines := _of_other_items(found, examples):
        said = (
            "replies beside the history or the reference of another turn than their key's: "
            f"{len(lines):,} of {len(replies):,} (first: line {lines[0]})"
        )
        if len(lines) > MOST_OTHER * len(replies):
            raise UserError(
                f"{path}: {said}; its keys and its replies are not in one order: write both from the same "
                "example, or leave the keys out, and replies are matched by what stands beside them"
            )
        notes.append(said)
    return found, notes


def _of_other_items(found: Found, examples: Sequence[Example]) -> list[int]:
    """The lines whose history is another conversation's, or whose reference is another item's, and not that
    of the item of their key. (A history that was cut to its beginning is an earlier item's.)"""
    answers = [(n, reply) for n, several in found.items() for reply in several]
    if all(reply.history is None and reply.reference is None for _, reply in answers):
        return []
    ours = [_item(example) for example in examples]
    references = {reference for _, reference in ours}
    said_in: dict[str, set[str]] = {}
    for example, (history, _) in zip(examples, ours, strict=True):
        said_in.setdefault(history, set()).add(example.conv_id)
    lines = []
    for n, reply in answers:
        before, gold = _pair(reply)
        elsewhere = before in said_in and examples[n].conv_id not in said_in[before]
        if elsewhere or (gold != ours[n][1] and gold in references):
            lines.append(reply.line)
    return sorted(lines)


def _refuse_unknown(path: Path, keys: Sequence[tuple[str, int]], examples: Sequence[Example]) -> None:
    """Raise `UserError` where a file of replies answers what is none of `examples`."""
    known = {e.key for e in examples}
    unknown = [key for key in keys if key not in known]
    if unknown:
        first = ", ".join(f"{conv} utterance {index}" for conv, index in unknown[:3])
        raise UserError(
            f"{path}: {len(unknown):,} of {len(keys):,} rows are no listener turn of this split (first: "
            f"{first}); give the predictions of this split, one row for each listener turn, as it calls them "
            f"({examples[0].conv_id} utterance {examples[0].utterance_idx} ...)"
        )


def _letters(text: str) -> str:
    """What two spellings of one text share: its words without marks, blanks and control tokens; marks where
    it has no word."""
    parts = words(CONTROL_TOKEN.sub(" ", text))
    return "".join(w for w in parts if w.isalnum()) or "".join(parts)


def _by_text(replies: Sequence[Reply], examples: Sequence[Example], path: Path) -> tuple[Found, list[str]]:
    """By history and reference; what is left by one of the two, where that stands once in the split and once
    in the file. Without histories first by order, where every reference agrees."""
    theirs, ours = [_pair(reply) for reply in replies], [_item(example) for example in examples]
    if all(pair == (None, None) for pair in theirs):
        raise UserError(
            f"{path}: nothing in it says which of the {len(examples):,} listener turns of this split its "
            f"{len(replies):,} replies answer; give the gold replies in their order, one a line: "
            "--references FILE"
        )
    if all(history is None for history, _ in theirs):
        for which in ("all", "last", "non-last"):
            numbers = items_called(which, examples)
            if [reference for _, reference in theirs] == [ours[n][1] for n in numbers]:
                return {n: [reply] for n, reply in zip(numbers, replies, strict=True)}, []
    found: Found = {}
    left, notes = list(range(len(replies))), []
    by_history = 0
    referring = any(reference for _, reference in theirs)
    for parts, how in WAYS:
        before = len(left)
        left = _matched(found, left, parts, theirs, ours, replies)
        by_history += (0 in parts) * (before - len(left))
        if how and before > len(left):
            why = ", their references being written otherwise" if parts == (0,) and referring else ""
            notes.append(f"replies {how}{why}: {before - len(left):,}")
    before = len(left)
    left = _between(found, left, theirs, ours, replies)
    if before > len(left):
        notes.append(
            f"replies matched by a reference that comes again, and their place: {before - len(left):,}"
        )
    if not found:
        first = next((reply.history for reply in replies if reply.history), "")
        shown = f" (of the first {first[:60]!r})" if first else ""
        raise UserError(
            f"{path}: none of its {len(replies):,} replies answers a listener turn of this split, neither by "
            f"its history{shown} nor by its reference; is it of another --split? Keys, which need neither, "
            "stand in columns conv_id and utterance_idx"
        )
    if not by_history and len(found) < FEWEST_LONE * len(replies):
        raise UserError(
            f"{path}: {len(found):,} of its {len(replies):,} replies find a listener turn of this split, "
            "these by a reference alone, which other turns have, too; is it of another --split?"
        )
    if left:
        first = ", ".join(str(replies[row].line) for row in left[:3])
        notes.append(
            f"replies left out, for they answer no listener turn of this split or one that is answered: "
            f"{len(left):,} of {len(replies):,} (first: line {first})"
        )
    return found, notes


def _follow(found: Found, replies: Sequence[Reply], first: Mapping[Pair, int]) -> None:
    """Put the further samples of a file without keys beside the first of the same history and reference; of
    rows that agree in both, the second sample numbered so beside the second, and so on."""
    number = {id(several[0]): n for n, several in found.items()}
    leaders: dict[Pair, list[int | None]] = {}
    for reply in replies:
        if reply.sample == first[reply.history, reply.reference]:
            leaders.setdefault((reply.history, reply.reference), []).append(number.get(id(reply)))
    seen: Counter[tuple] = Counter()
    for reply in replies:
        if reply.sample != first[reply.history, reply.reference]:
            places = leaders.get((reply.history, reply.reference), [])
            case = (reply.history, reply.reference, reply.sample)
            n = places[seen[case]] if seen[case] < len(places) else None
            seen[case] += 1
            if n is not None:
                found[n].append(reply)


def _history(text: str) -> str:
    return _letters(SPEAKER.sub(" ", text))


def _pair(reply: Reply) -> Pair:
    """What a reply's file says beside it, in letters."""
    history, reference = reply.history, reply.reference
    return (
        None if history is None else _history(history),
        None if reference is None else _letters(reference),
    )


def _item(example: Example) -> tuple[str, str]:
    return _history(joined_turns(example.history)), _letters(example.response)


def _matched(
    found: Found,
    left: list[int],
    parts: tuple[int, ...],
    theirs: list[Pair],
    ours: Sequence[Pair],
    replies: Sequence[Reply],
) -> list[int]:
    """Put the replies of the rows `left` beside free items that agree in `parts`; returns what is still
    left."""
    places: dict[tuple, list[int]] = {}
    for n, pair in enumerate(ours):
        places.setdefault(tuple(pair[part] for part in parts), []).append(n)
    asked = Counter(tuple(theirs[row][part] for part in parts) for row in left)
    rest = []
    for row in left:
        name = tuple(theirs[row][part] for part in parts)
        items = places.get(name, [])
        free = [n for n in items if n not in found]
        # of items that agree in both one is as good as the other; in one of the two it must be the only one
        if None in name or not free or (len(parts) == 1 and (len(items) > 1 or asked[name] > 1)):
            rest.append(row)
        else:
            found[free[0]] = [replies[row]]
    return rest


def _between(
    found: Found, left: list[int], theirs: list[Pair], ours: Sequence[Pair], replies: Sequence[Reply]
) -> list[int]:
    """Match replies by a reference that several items have, where the replies before and after them in a file
    without histories leave one such item between theirs; returns what is still left: all, where the others do
    not stand in the split's order."""
    number = {id(reply): n for n, several in found.items() for reply in several}
    at = [number.get(id(reply)) for reply in replies]
    known = [n for n in at if n is not None]
    if known != sorted(known):
        return left
    rest = []
    for row in left:
        before = next((n for n in reversed(at[:row]) if n is not None), -1)
        after = next((n for n in at[row + 1 :] if n is not None), len(ours))
        fits = [n for n in range(before + 1, after) if n not in found and ours[n][1] == theirs[row][1]]
        if theirs[row][0] is None and len(fits) == 1:
            found[fits[0]], at[row] = [replies[row]], fits[0]
        else:
            rest.append(row)
    return rest
