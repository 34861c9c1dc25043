"""The turns of a dialogue in people's own files: what they are called there, who says what, who listens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from options import UserError, is_empty

LONGEST = 100_000  # characters of a turn: a csv field holds 131,072
#: characters that show nothing: a blank, those of no width, marks of a text's direction
UNSEEN = (
    " \u200b\u200c\u200d\u2060\ufeff\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
#: what a part of a dialogue is called in people's files, the first that is there; capitals do not matter
NAMES = {
    "turns": ("turns", "dialogue", "dialog", "conversation", "conversations", "messages", "utterances"),
    "conversation": (
        *("conversation", "conversation_id", "conv_id", "conv"),
        *("dialogue", "dialogue_id", "dialog", "dialog_id", "id"),
    ),
    "id": ("id", "conversation_id", "conv_id", "dialogue_id", "dialog_id"),
    "speaker": ("speaker", "speaker_id", "speaker_idx", "role", "name", "author", "from"),
    "text": ("text", "utterance", "content", "message", "turn", "value"),
    "order": (
        *("utterance_idx", "utterance_index", "utterance_id"),
        *("turn_idx", "turn_index", "turn_number", "turn_no", "turn_num", "turn_id"),
        "turn",  # where the text stands under another name
    ),
    "emotion": ("emotion", "feeling"),
    "split": ("split", "fold"),
}
#: a person of such a name listens, whoever begins
LISTENERS = {"listener", "assistant", "bot", "chatbot", "gpt", "model"}
LISTENERS |= {"supporter", "helper", "counselor", "counsellor", "therapist"}
INSTRUCTIONS = "system"  # no person, where two others speak, or where it only opens a dialogue


@dataclass(frozen=True)
class Cast:
    """A dialogue's texts as speaker and listener take turns, the speaker first."""

    texts: list[str]
    joined: int  # turns that were joined to the one before, by the same person
    opening: bool  # whether a turn of the listener stood first, which answers nothing and is left out
    people: tuple[str, ...]  # who speaks, then who listens


def pick(row: Mapping[str, Any], part: str) -> Any:
    """What a row holds under one of the names of `part`; None where there is none."""
    lower = {str(key).strip().lower(): value for key, value in row.items()}
    if part == "turns":  # "conversation" may be a dialogue's name as well as its turns
        lists = [lower[name] for name in NAMES[part] if isinstance(lower.get(name), list)]
        if lists:
            return lists[0]
    names = [name for name in NAMES[part] if lower.get(name) is not None]
    if part == "order" and names == ["turn"] and not set(NAMES["text"]) - {"turn"} & set(lower):
        return None
    return lower[names[0]] if names else None


def word(value: Any, what: str, place: str) -> str:
    """A name, number or text as one line, "" for none, also as Python writes what pandas found empty (NaN).
    Raises `UserError` for anything else."""
    if value is None or is_empty(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: the {what} is {str(value)[:40]!r}, expected a text")
    return " ".join(str(value).split())


def said_by(turns: Sequence[Any], place: str) -> list[tuple[str, str]]:
    """(speaker, text) of each turn, oldest first. Raises `UserError` for a turn that holds neither, or where
    some have a speaker and some have none."""
    said = [a_turn(turn, n, f"{place}, turn {n + 1}") for n, turn in enumerate(turns)]
    if len({isinstance(turn, str) for turn in turns}) > 1:
        raise UserError(f"{place}: some turns have a speaker and some have none; give it to all or none")
    numbered = [(turn, f"{place}, turn {n}") for n, turn in enumerate(turns, 1) if isinstance(turn, Mapping)]
    require_order(numbered)
    return said


def require_order(turns: Sequence[tuple[Mapping[str, Any], str]]) -> None:
    """Raises `UserError` where the turns (turn, place) of a conversation do not stand in the order of their
    numbers; what is said and its answer may share one."""
    before, who = -1, None
    for turn, place in turns:
        number, speaker = str(pick(turn, "order")).removesuffix(".0"), pick(turn, "speaker")
        if not number.isdecimal():
            return
        if int(number) < before or (int(number) == before and speaker == who):
            raise UserError(
                f"{place}: turn {number} after turn {before}; sort the turns of a conversation, the oldest "
                "first, or leave these numbers out"
            )
        before, who = int(number), speaker


def a_turn(turn: Any, number: int, place: str) -> tuple[str, str]:
    """(speaker, text) of a turn: an object, or a text alone, whose speakers alternate."""
    if isinstance(turn, str):
        speaker, text = str(number % 2), word(turn, "text", place)
    elif isinstance(turn, Mapping):
        speaker = word(pick(turn, "speaker"), "speaker", place)
        text = word(pick(turn, "text"), "text", place)
    else:
        raise UserError(f'{place}: expected {{"speaker": ..., "text": ...}} or a text')
    for what, value in (("speaker", speaker), ("text", text)):
        if value.strip(UNSEEN):
            continue
        if isinstance(turn, str) or set(NAMES[what]) & {str(name).strip().lower() for name in turn}:
            raise UserError(f"{place}: its {what} is empty; fill it in, or leave the turn out")
        names = f"it stands under one of {', '.join(NAMES[what])} (found: {', '.join(map(str, turn))[:200]})"
        raise UserError(f"{place}: no {what}; {names}")
    return speaker, text


def cast(said: Sequence[tuple[str, str]], place: str, listener: str | None = None) -> Cast:
    """Who is speaker, who listener: `listener`, or who has a listener's name, or the second to speak.

    Consecutive turns of one person are joined to one; instructions ("system") are left out.
    Raises `UserError` where more than two speak, or neither of two has the listener's name.
    """
    people = list(dict.fromkeys(speaker for speaker, _ in said))
    if len(people) > 2 or all(who.lower() != INSTRUCTIONS for who, _ in said[1:]):
        said = [(who, text) for who, text in said if who.lower() != INSTRUCTIONS]
        people = list(dict.fromkeys(speaker for speaker, _ in said))
    if len(people) > 2:
        raise UserError(
            f"{place}: {len(people)} speakers ({', '.join(people)[:100]}), expected two; leave the "
            "turns of the others out, or the dialogue"
        )
    if listener is not None and listener not in people and len(people) > 1:
        raise UserError(f"{place}: nobody is called {listener!r} (--listener); {', '.join(people)}")
    named = [who for who in people if who.lower() in LISTENERS]
    if listener is None and len(named) == 1:
        listener = named[0]
    texts: list[str] = []
    heard: list[str] = []
    last, joined, opening = None, 0, False
    for speaker, text in said:
        if not texts and speaker == listener:
            opening = True
        elif speaker == last:
            texts[-1] += f" {text}"
            joined += 1
        else:
            texts.append(text)
            heard.append(speaker)
            last = speaker
    if (longest := max(map(len, texts), default=0)) > LONGEST:
        raise UserError(
            f"{place}: a turn (all that one person says until the other does) of {longest:,} "
            f"characters, more than {LONGEST:,}; shorten it"
        )
    return Cast(texts, joined, opening, tuple(heard[:2]))
