"""One way to write a reply for comparison, whoever wrote it and however they cut it into words.

Published outputs are lower-cased, cut by nltk or Moses, their contractions opened; the gold replies are none
of that. Both sides of every score go through `normalise`. Raise VERSION with any change of a result.
"""

import re
import unicodedata

VERSION = "1"
DESCRIPTION = (
    f"normaliser version {VERSION}: unicode NFKC, case folded, quotes and dashes straightened, entities and "
    "end tokens of tokenizers removed, contractions opened (don't = do n't = do not; it's = it is), every "
    "mark a word of its own"
)

#: what stands for ' and " and - in other alphabets of marks
STRAIGHT = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u00b4\u2032\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)
#: what Moses' tokenizer writes for marks
ENTITIES = {
    "&apos;": "'",
    "&#39;": "'",
    "&quot;": '"',
    "&lt;": "<",
    "&gt;": ">",
    "&#91;": "[",
    "&#93;": "]",
    "&#124;": "|",
    "&amp;": "&",
}
ENTITY = re.compile("|".join(ENTITIES))
END_TOKENS = re.compile(r"(?:\s*(?:</s>|<eos>|\[eos\]|\[sep\]|<pad>|<\|endoftext\|>|<\|im_end\|>))+\s*$")
#: (pattern, what stands for it), in this order: first joined as in running text, then opened
JOINED = [
    (re.compile(r"``|''"), '"'),  # nltk's opening and closing marks
    (re.compile(r"`"), "'"),
    (re.compile(r"@([-,.])@"), r"\1"),  # Moses: a mark inside a word
    (re.compile(r"(?<=\w)\s*n\s*'\s*t\b"), "n't"),  # do n't, don 't, don ' t
    (re.compile(r"(?<=\w)\s*'\s*(s|m|d|re|ve|ll)\b"), r"'\1"),
    (re.compile(r"\b(gon|wan) na\b"), r"\1na"),  # nltk cuts these in two
    (re.compile(r"\bgot ta\b"), "gotta"),
    (re.compile(r"\b(gim|lem) me\b"), r"\1me"),
]
NOT = "do does did is was were are have has had could would should might must need".split()
#: after these 's is a verb, never a possessive
SUBJECTS = "it that this there here he she who what where when how why".split()
OPENED = [
    (re.compile(r"\bcan't\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(rf"\b({'|'.join(SUBJECTS)})'s\b"), r"\1 is"),
    (re.compile(r"(?<=\w)'m\b"), " am"),
    (re.compile(r"(?<=\w)'d\b"), " would"),
    (re.compile(r"(?<=\w)'re\b"), " are"),
    (re.compile(r"(?<=\w)'ve\b"), " have"),
    (re.compile(r"(?<=\w)'ll\b"), " will"),
    # written without an apostrophe; last, since an opened word may leave one of these
    (re.compile(rf"\b({'|'.join(NOT)})nt\b"), r"\1 not"),
    (re.compile(r"\bcannot\b"), "can not"),
    (re.compile(r"\bim\b"), "i am"),
    (re.compile(r"\b(i|you|we|they)ve\b"), r"\1 have"),
    (re.compile(r"\b(you|they)re\b"), r"\1 are"),
    (re.compile(r"\bthats\b"), "that is"),
]
WORD = re.compile(r"(?<=\w)'s\b|\w+|\S")


def _folded(text: str) -> str:
    """NFKC and case folding until neither changes anything, without characters that nobody sees."""
    text = text.translate(STRAIGHT)
    if text.isascii():
        return text.casefold()
    while (new := unicodedata.normalize("NFKC", text).casefold().translate(STRAIGHT)) != text:
        text = new
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _once(text: str) -> str:
    text = END_TOKENS.sub("", _folded(text)).replace("_comma_", ",").replace("_", " _ ")
    text = ENTITY.sub(lambda found: ENTITIES[found[0]], text)
    for pattern, new in (*JOINED, *OPENED):
        text = pattern.sub(new, text)
    return " ".join(WORD.findall(text))


def normalise(text: str) -> str:
    """Words and marks of `text` with one blank between; normalised again it is the same."""
    found = _once(text)
    # what is left of chains such as y'all'd've may be a contraction in its turn
    while "'" in found and (new := _once(found)) != found:
        found = new
    return found


def words(text: str) -> list[str]:
    """Words and marks of `text`, normalised; [] of an empty reply."""
    return normalise(text).split()
