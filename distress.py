"""Words of acute distress, and the notice that stands before anything is written to them: both only here."""

import re
from collections.abc import Iterable

from options import APOSTROPHES

NOTICE = (
    "This is a research program. It cannot understand you, and it is no help in a crisis. If you are in "
    "danger or think of harming yourself, please turn to a person now: somebody you trust, a doctor, a "
    "crisis line, or your local emergency number."
)

#: few and plain: a notice too many does little harm, but one for every sad word would not be read any more
WORDS = (
    r"suicid(?:e|al)",
    r"kill(?:ing)? my ?self",
    r"end(?:ing)? my (?:own )?life",
    r"end(?:ing)? it all",
    r"tak(?:e|ing) my (?:own )?life",
    r"(?:hang|drown|shoot|starve) my ?self",
    r"harm(?:ing)? my ?self",
    r"(?:hurting|cutting) my ?self",
    r"self[- ]?harm(?:ing)?",
    r"(?:want|going|need|urge) to (?:hurt|cut) my ?self",
    r"(?:want|wanted|wanna|wish) to (?:die|be dead)",
    r"wanna die",
    r"wish i (?:was|were) (?:dead|never born)",
    r"better off (?:dead|without me)",
    r"(?:do not|don't|dont) (?:want to|wanna) (?:live|be alive|wake up)",
    r"(?:no|without a) reason to (?:live|go on living)",
    r"(?:take|took|taking) an overdose|overdosed? on",
)
#: as keyboards and other programs write an apostrophe and a hyphen
MARKS = APOSTROPHES | str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015", "-"))
_ANY = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def notice(texts: Iterable[str]) -> str | None:
    """The notice where one of the texts speaks of acute distress, else None."""
    for text in texts:
        plain = " ".join(text.translate(MARKS).split())
        if _ANY.search(plain):
            return NOTICE
    return None
