"""Words of acute distress, and the notice that stands before anything is written to them: both only here."""

import re
from collections.abc import Iterable

NOTICE = (
    "This is a research program. It cannot understand you, and it is no help in a crisis. If you are in "
    "danger or think of harming yourself, please turn to a person now: somebody you trust, a doctor, a "
    "crisis line, or your local emergency number."
)

#: few and plain: a notice too many does little harm, but one for every sad word would not be read any more
WORDS = (
    r"suicid(?:e|al)",
    r"kill(?:ing)? myself",
    r"end(?:ing)? my (?:own )?life",
    r"end(?:ing)? it all",
    r"tak(?:e|ing) my (?:own )?life",
    r"(?:hang|drown|shoot|starve) myself",
    r"harm(?:ing)? myself",
    r"self[- ]harm(?:ing)?",
    r"(?:want|going|need|urge) to (?:hurt|cut) myself",
    r"(?:want|wanted|wanna|wish) to (?:die|be dead)",
    r"wanna die",
    r"wish i (?:was|were) (?:dead|never born)",
    r"better off (?:dead|without me)",
    r"(?:do not|don't|dont) (?:want to|wanna) (?:live|be alive|wake up)",
    r"(?:no|without a) reason to (?:live|go on living)",
    r"(?:take|took|taking) an overdose|overdosed? on",
)
_ANY = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def notice(texts: Iterable[str]) -> str | None:
    """The notice where one of the texts speaks of acute distress, else None."""
    for text in texts:
        plain = " ".join(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
        if _ANY.search(plain):
            return NOTICE
    return None
