"""One way to write a reply for comparison, whoever wrote it and however they cut it into words.

Published outputs are lower-cased, cut by nltk or Moses, their contractions opened; the gold replies are none
of that. Both sides of every score go through `normalise`. Raise VERSION with any change of a result.
"""

import functools
import re
import unicodedata

VERSION = "2"  # 1: words cut in two by more than one blank stayed apart
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
#: (pattern, what stands for it): what tokenizers have cut is joined as in running text
JOINED = [
    (re.compile(r"``|''"), '"'),  # nltk's opening and closing marks
    (re.compile(r"`"), "'"),
    (re.compile(r"(?<=\w)\s*n\s*'\s*t\b"), "n't"),  # do n't, don 't, don ' t
    (re.compile(r"(?<=\w)\s*'\s*(s|m|d|re|ve|ll)\b"), r"'\1"),
]
IN_TWO = re.compile(r"\b(?:gon\s+na|wan\s+na|got\s+ta|gim\s+me|lem\s+me)\b")  # nltk's
MOSES = re.compile(r"@([-,.])@")  # a mark inside a word
CONTRACTION = re.compile(r"(\w+?)(n't|'(?:s|m|d|re|ve|ll))\b")
ENDINGS = {"n't": "not", "'m": "am", "'d": "would", "'re": "are", "'ve": "have", "'ll": "will"}
NOT = "do does did is was were are have has had could would should might must need".split()
#: after these 's is a verb, never a possessive
SUBJECTS = "it that this there here he she who what where when how why".split()
#: words that are opened as wholes; those without an apostrophe are no other words
OPENED = {
    **{f"{subject}'s": f"{subject} is" for subject in SUBJECTS},
    **{f"{verb}nt": f"{verb} not" for verb in NOT},
    **{f"{subject}ve": f"{subject} have" for subject in ("i", "you", "we", "they")},
    **{f"{subject}re": f"{subject} are" for subject in ("you", "they")},
    **{"can't": "can not", "cannot": "can not", "won't": "will not", "shan't": "shall not"},
    **{"let's": "let us", "im": "i am", "thats": "that is"},
}
WORD = re.compile(r"(?<=\w)'s\b|\w+|\S")


def _folded(text: str) -> str:
    """NFKC and case folding until neither changes anything, without characters that nobody sees."""
    text = text.translate(STRAIGHT)
    if text.isascii():
        return text.casefold()
    while (new := unicodedata.normalize("NFKC", text).casefold().translate(STRAIGHT)) != text:
        text = new
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _opened(found: re.Match) -> str:
    if found[2] == "'s":
        return OPENED.get(found[0], found[0])
    return OPENED.get(found[0]) or f"{found[1]} {ENDINGS[found[2]]}"


def _once(text: str) -> str:
    text = END_TOKENS.sub("", _folded(text)).replace("_comma_", ",").replace("_", " _ ")
    text = ENTITY.sub(lambda found: ENTITIES[found[0]], text)
    text = MOSES.sub(r"\1", text)
    if "'" in text or "`" in text:
        for pattern, new in JOINED:
            text = pattern.sub(new, text)
        text = CONTRACTION.sub(_opened, text)
    text = IN_TWO.sub(lambda found: "".join(found[0].split()), text)
    return " ".join(OPENED.get(word, word) for word in WORD.findall(text))


@functools.lru_cache(maxsize=1 << 17)
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
