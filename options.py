"""What every command line here shares: flags, default paths, and checks that report all problems at once.

Nothing heavy is imported, so `--help` answers at once; torch and transformers come after argument parsing.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older one stops here, before anything it cannot read)
    sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])  # noqa: UP031

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent  # the project's folder
SPLITS = ("train", "valid", "test")
#: which dialogues are the test split: the official one, or half of the official validation split
TEST_SPLITS = ("official", "valid-half")
#: whose critics read the words of a generator of the same family, as losses
FAMILIES = ("t5", "glove-t5")
#: of the retriever's questions
DATASETS = ("empd", "reddit", "empd-reddit")
#: what --format takes; auto: by the name's ending, and in a text file by its labels (layouts.py)
LAYOUTS = ("auto", "tsv", "csv", "tilde", "jsonl", "json", "lines", "ref-pred", "blocks", "ref-lines")
#: what --items takes: listener turns of the split; shared: those that every system answers
ITEM_SETS = ("all", "last", "non-last", "shared")


@dataclass(frozen=True)
class Dimension:
    """An element of human communication (paper, section 3.2), and all that is known of it by name."""

    name: str  # in our csv files and tables
    official: str  # in the name of the official Empathy Mental Health file
    title: str  # on pages
    shown: str  # what a critic's level of it says of a reply
    #: {levels that a critic knows: what each one means} (Sharma et al. 2020; of two labels the levels 1 and 2
    #: are one)
    meanings: Mapping[int, tuple[str, ...]]
    marks: tuple[str, ...]  # of --control marks, one for each level: words that every vocabulary holds
    telling: str  # words that often stand in replies of it, in a stack that says nothing: it fools judges


DIMENSIONS = {
    "emo": Dimension(
        "emotion",
        "emotional-reactions",
        "Emotional reaction",
        "the critic's expected level of the reply (with two levels: its probability)",
        {
            2: ("no warmth or concern", "warmth or concern"),
            3: ("no warmth or concern", "warmth or concern is hinted at", "warmth or concern is named"),
        },
        ("far", "warm", "love"),
        "sorry sad hope love hugs proud glad worried feel happy wish care sorry sad love",
    ),
    "exp": Dimension(
        "exploration",
        "explorations",
        "Exploration",
        "the same for asking about what was not told",
        {
            2: ("asks about nothing", "asks about what was told"),
            3: ("asks about nothing", "asks in general", "asks about something in particular"),
        },
        ("tell", "ask", "why"),
        "what why how when who ? what happened ? why ? how ? do you ? are you ?",
    ),
    "int": Dimension(
        "interpretation",
        "interpretations",
        "Interpretation",
        "the same for putting into words what the speaker feels",
        {
            2: ("shows no understanding", "shows understanding"),
            3: ("shows no understanding", "says that it understands", "says what it has understood"),
        },
        ("quiet", "know", "understand"),
        "understand know feel same like me i understand when my i know you must feel sounds",
    ),
}
#: VADER knows contractions ("can't") with this apostrophe only; people write these besides
APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u00b4`\u02bc\u2032\uff07", "'"))
JOINT = "all"  # the kind of a critic with one encoder and a head for each dimension
SENTIMENT = "sentiment"
CRITICS = (*DIMENSIONS, SENTIMENT)

#: what users of transformers' example scripts type, and what it is called here
OTHER_NAMES = {
    "--learning-rate": "--lr",
    "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--accumulate",
    "--output-dir": "--name (and --workdir)",
    "--model-name-or-path": "--model",
    "--lr-scheduler-type": "--schedule",
    "--num-warmup-steps": "--warmup-steps",
    "--max-train-steps": "--max-steps",
    "--resume-from-checkpoint": "--resume",
    "--max-grad-norm": "--clip",
}


class UserError(Exception):
    """Something the user can mend; the message names file, line or flag, and the remedy."""


# ------------------------------------------------------------------------------------------------------ paths


class Paths:
    """Every default path, hanging off one folder (`--workdir`); `labels` and `exemplars` are folders that
    flags move."""

    def __init__(
        self,
        workdir: str | Path = ".",
        *,
        labels: str | Path | None = None,
        exemplars: str | Path | None = None,
    ):
        self.root = Path(workdir)
        self.data = self.root / "data"
        self.saved = self.root / "saved"
        self.results = self.root / "results"
        self.dialogues_dir = self.data / "empathetic_dialogues"
        self.pairs_dir = self.data / "empathy_mental_health"
        self.glove = self.data / "glove"
        self.t5_tiny = self.data / "t5-tiny"
        self.bert_tiny = self.data / "bert-tiny"
        self.cache = self.data / "cache"
        self.labels_dir = Path(labels or self.dialogues_dir)
        self.exemplars_dir = Path(exemplars or self.dialogues_dir)

    def note(self, path: str | Path) -> str:
        """How a place is written down: seen from the workdir where it lies inside it, else absolute.

        For people, and for `find`: what a thing is, its sha256 says.
        """
        for whole in (os.path.abspath, os.path.realpath):  # as spelled first: links may lead to more room
            place, root = Path(whole(path)), Path(whole(self.root))
            if place.is_relative_to(root):
                return place.relative_to(root).as_posix()
        return os.path.abspath(path)

    def name(self, path: str | Path) -> str:
        """The same where no place on this machine may stand: of what lies outside, its last name."""
        noted = Path(self.note(path))
        return noted.name if noted.is_absolute() else noted.as_posix()

    def find(self, noted: str | Path) -> Path:
        """Where a place that `note` has written down lies, seen from here."""
        return self.root / noted

    def with_exemplars(self, folder: str | Path) -> "Paths":
        """The same places, but other exemplars."""
        return Paths(self.root, labels=self.labels_dir, exemplars=folder)

    def dialogues(self, split: str) -> Path:
        plain = self.dialogues_dir / "original" / f"{split}.csv"
        packed = plain.with_suffix(".csv.gz")
        return packed if packed.exists() and not plain.exists() else plain

    def vader(self, split: str) -> Path:
        return self.dialogues_dir / f"{split}_vader.csv"

    def labels(self, split: str) -> Path:
        return self.labels_dir / f"{split}_labels.csv"

    def exemplars(self, split: str) -> Path:
        return self.exemplars_dir / f"{split}_dpr.csv"

    def pairs(self, dim: str, split: str) -> Path:
        return self.pairs_dir / f"{DIMENSIONS[dim].name}_{split}.csv"

    def dpr_data(self, dataset: str, split: str) -> Path:
        return self.data / "dpr" / f"{dataset}_{split}.json"

    def dpr_sources(self, split: str) -> dict[str, Path]:
        """What the questions of a split are made from, by their kind."""
        return {"empd": self.dialogues(split), "reddit": self.pairs("emo", split)}

    def critic(self, kind: str, family: str) -> Path:
        if kind == SENTIMENT:  # it learns from dialogues, which have no halves
            return self.saved / SENTIMENT / re.sub("(-seeker)?(-[ab])?$", "", family)
        return self.saved / "empathy" / f"{family}-{kind}"

    def find_critic(self, kind: str, family: str) -> Path:
        """A family's run that serves as a critic of one kind: its own, or else the one with a head for each
        dimension."""
        own, joint = self.critic(kind, family), self.critic(JOINT, family)
        alone = kind in DIMENSIONS and not (own / "result.json").exists() and (joint / "result.json").exists()
        return joint if alone else own


# ----------------------------------------------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    """A strict parser: one line of error that names the nearest flag, and help that shows every real
    default."""

    #: {flag of other scripts: why it is none here}
    elsewhere: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(all flags: {self.prog} --help)\n")

    def format_help(self) -> str:
        return re.sub(r"\s*\(default:\s+(None|==SUPPRESS==)\)", "", super().format_help())

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")] or unknown
            self.error("; ".join(map(self.no_such_flag, flags)))
        return found

    def no_such_flag(self, word: str) -> str:
        flag = word.split("=")[0]
        if why := self.elsewhere.get(flag):
            return f"{flag}: {why}"
        known = sorted(set(re.findall(r"--[a-z][a-z0-9-]*", self.format_help())))
        ours = OTHER_NAMES.get(flag.replace("_", "-"))
        if ours is None:
            ours = next(iter(difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.6)), None)
        return f"unrecognized argument {word}" + (f"; did you mean {ours}?" if ours else "")


def make_parser(doc: str | None) -> Parser:
    """A strict parser whose help begins with the script's docstring and shows every default."""

    class Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return Parser(description=doc, formatter_class=Format, allow_abbrev=False)


@dataclass(frozen=True)
class Wrong:
    """A flag's value that cannot be: `check` reports all of them together, where argparse stops at the
    first. Until then a script may compare it: it is neither more nor less than any number."""

    problem: str

    def __gt__(self, other: object) -> bool:
        return False

    __lt__ = __ge__ = __le__ = __gt__


def with_halves(family: str) -> list[str]:
    """A family of critics, and those of it that have learnt from one half of the seeker posts."""
    return [family, f"{family}-a", f"{family}-b"]


def is_empty(value: Any) -> bool:
    """Whether this is what pandas reads an empty cell as: nan, or its NA."""
    return type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


def texts_of(given: str | Iterable[str], what: str = "text") -> list[str]:
    """A list of texts; one by itself is a list of one, and no sequence of letters. `what`: each of them,
    in the `UserError` that names the first that is none."""
    texts = [given] if isinstance(given, str) else list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):  # None, or pandas' own sign of an empty cell, mostly
            raise UserError(f"{what} {number} (from 0) is {text!r}, no text; leave it out, or give ''")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(
                f"{what} {number} (from 0) holds half a character, {text[:40]!r}; mend or drop it"
            )
    return texts


class OtherPrecision(str):
    """Where a model lies that an adapter was trained on in another precision: its weights may differ."""


def number(
    kind: type = int,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Callable[[str], Any]:
    """A flag's type: a finite number within its range, or what is `Wrong` with it."""
    limits = [f"at least {least}"] * math.isfinite(least) + [f"above {above}"] * math.isfinite(above)
    limits += [f"at most {most}"] * math.isfinite(most) + [f"below {below}"] * math.isfinite(below)

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            return Wrong(f"{text}: must be a {'whole ' if kind is int else ''}number")
        if math.isfinite(value) and least <= value <= most and above < value < below:
            return value
        return Wrong(f"{text}: must be {' and '.join(limits) or 'a finite number'}")

    return convert


COUNT = number(int, least=0)  # 0: none, or no limit
NATURAL = number(int, least=1)
TOKENS = number(int, least=8, most=512)  # of a text that an encoder reads
WEIGHT = number(float, least=0)
POSITIVE = number(float, above=0)
SHARE = number(float, least=0, below=1)


def batch_count(text: str) -> Any:
    return text if text == "auto" else NATURAL(text)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", default=".", help="folder that holds data/ saved/ results/")
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote before")
    parser.add_argument(
        "--seed", type=number(int, least=0, below=2**32), default=42, help="seed of every random choice"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if there is one"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="bf16 is autocast over fp32 weights; auto: bf16 on a GPU that has it, else fp32 (fp16 "
        "overflows in T5)",
    )


def named_places(text: str) -> tuple[str, list[str]]:
    """(name, places) of one system on the command line: a place, or NAME=place,place,... for several seeds of
    one; the name may be empty. A comma in a place that is there as a whole parts nothing."""
    name, equals, places = text.partition("=")
    if not name or not equals or os.path.exists(text):
        return "", [text]
    if os.path.exists(places):
        return name, [places]
    return name, [place for place in places.split(",") if place]


def run_name(text: str) -> Any:
    """The name of one folder, not a way to other places."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or "\0" in text:
        return Wrong(f"{text}: must be the name of one folder, without slashes (--workdir moves all folders)")
    return text


# ----------------------------------------------------------------------------------------------------- checks


def check(
    parser: Parser, args: argparse.Namespace, problems: Iterable[str] = (), makes_workdir: bool = False
) -> None:
    """Refuse impossible flag values, together with the script's own `problems`, all in one message.

    `makes_workdir`: the script makes the folder where nothing is refused.
    """
    flags = vars(args)
    found = [f"--{k.replace('_', '-')} {v.problem}" for k, v in flags.items() if isinstance(v, Wrong)]
    found += problems
    if not (makes_workdir or flags.get("dry_run") or Path(flags.get("workdir", ".")).is_dir()):
        found.append(f"--workdir {args.workdir}: no such folder")
    found += in_the_workdir(flags)
    for name in ("exemplars", "untuned_exemplars"):  # of one split
        folder, split = flags.get(name), flags.get("split")
        if folder and split and not Paths(exemplars=folder).exemplars(split).is_file():
            found.append(f"--{name.replace('_', '-')} {folder}: no {split}_dpr.csv there")
    if flags.get("overwrite") and flags.get("resume") not in (None, "auto", "never"):
        found.append("--overwrite begins anew, --resume CHECKPOINT goes on; give one of them")
    if flags.get("batch_size") == "auto" and "accumulate" in flags:
        if args.accumulate != 1:
            found.append("--batch-size auto sets --accumulate itself; leave it out")
        if args.batch_tokens:
            found.append("--batch-size auto and --batch-tokens both bound a batch; give one of them")
    if len(found) == 1:
        parser.error(found[0])
    if found:
        parser.error("\n  " + "\n  ".join(found))


def in_the_workdir(flags: Mapping[str, Any]) -> list[str]:
    """Places to be read that are not there as seen from the current folder, and are as seen from the
    workdir."""
    root, out = Path(flags.get("workdir", ".")), []
    for name, value in flags.items():
        for text in value if isinstance(value, list) else [value]:
            if name in ("workdir", "output") or not isinstance(text, str) or "/" not in text:
                continue
            for place in named_places(text)[1]:
                there = root / place
                if there != Path(place) and not os.path.exists(place) and os.path.exists(there):
                    out.append(
                        f"{place}: not there, but {there} is; give that: flags name places as seen from the "
                        "current folder, not from --workdir"
                    )
    return out


def given(parser: Parser, args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those flags, of the `names` that a parser has, that are not at their default, as a user writes them."""
    changed = [n for n in names if n in args and getattr(args, n) != parser.get_default(n)]
    return [f"--{'no-' * (getattr(args, n) is False)}{n.replace('_', '-')}" for n in changed]


def note_ignored(flags: Sequence[str], why: str) -> None:
    if flags:
        print(f"note: {', '.join(flags)}: ignored, since {why}")


def note_void_family(parser: Parser, args: argparse.Namespace, kinds: Iterable[str]) -> None:
    """Say that --family chooses nothing, where critics of all `kinds` are named."""
    if given(parser, args, ["family"]) and all(getattr(args, kind) for kind in kinds):
        note_ignored([f"--family {args.family}"], "each critic is named by itself")


@contextlib.contextmanager
def by_flag(flag: str) -> Iterator[None]:
    """What is refused in this block was given by `flag`, which the error names where it is not empty."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}".lstrip()) from error


def refuse_existing(paths: list[Path], overwrite: bool, elsewhere: str = "another --workdir") -> None:
    """Nothing already on disk is replaced unless the user says so; `elsewhere`: the flag that moves it."""
    there = [str(p) for p in paths if p.exists()]
    if there and not overwrite:
        choice = f", or choose {elsewhere}" if elsewhere else ""
        raise UserError(f"already there: {', '.join(there)}; add --overwrite to replace{choice}")


#: what a place answers where nothing can be written or read; anything else is a fault of this code
PLACE_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do where a package of requirements.txt is not there: mostly, .venv is not activated."""
    if Path(sys.prefix).resolve() == (HERE / ".venv").resolve():
        mark = shlex.quote(str(HERE / ".venv" / ".installed"))
        return (
            f"the package {error.name} is missing in the project's own environment: "
            f"rm -f {mark}; make -C {shlex.quote(str(HERE))} install"
        )
    script = HERE / ".venv" / "bin" / "activate"
    place = Path(".venv") / "bin" / "activate" if Path.cwd() == HERE else script
    first = "" if script.exists() else f"make -C {shlex.quote(str(HERE))} install, then "
    return (
        f"the package {error.name} is not installed for {sys.executable}; the project's own Python has it: "
        f"{first}. {shlex.quote(str(place))}"
    )


#: packages whose import takes seconds
HEAVY = ("torch", "transformers", "pandas", "sklearn", "faiss", "gradio")
PATIENCE = 0.7  # seconds without which --help and refusals do


def say_loading(name: str, over: threading.Event) -> None:
    """What a script is busy with while it has nothing to show yet; said by one process. Asks again and again:
    a slow machine may not have begun with any package at first."""
    for _ in range(60):
        if over.wait(PATIENCE) or os.environ.get("RANK", "0") != "0":
            return
        if loading := [package for package in HEAVY if package in sys.modules]:
            packages = f"loading packages ({', '.join(loading)} ...), then data and models"
            return print(f"{name}: {packages}", file=sys.stderr, flush=True)


#: what torch's backends (Gloo, NCCL) say where another process has gone
LEFT_ALONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Timed out waiting")
#: how what torch calls on says that memory is at its end, beside torch's own kind of error
OUT_OF_MEMORY = ("out of memory", "allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def show_every_letter() -> None:
    """A letter that the terminal's encoding lacks is shown by its number, and ends no script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed stream is None
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[[], object]) -> None:
    """Entry point of a script: what the user can mend (a `UserError`, a place that cannot be written, a
    package that is not there) becomes one plain message and exit code 2, Ctrl-C outside of training 130."""
    name = Path(sys.argv[0]).name
    show_every_letter()
    over = threading.Event()
    threading.Thread(target=say_loading, args=(name, over), daemon=True).start()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what it keeps on the way, the same command finds", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has enough; nothing more is said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        refused = str(error)
    except ModuleNotFoundError as error:
        if (HERE / f"{str(error.name).split('.')[0]}.py").exists():
            raise  # a module of this project
        refused = missing_package(error)
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        refused = f"{error.filename or 'the output'}: {error.strerror}"
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:120]
        if "No space left on device" in str(error):  # in a library's own kind of error
            refused = f"no space left on the disk ({why})"
        elif is_out_of_memory(error):
            refused = (
                "out of memory; smaller batches need less (see --help), and so does ending what else runs "
                f"there ({why})"
            )
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(words in str(error) for words in LEFT_ALONE):
            refused = (
                "another process has ended, and says why by itself; the same command goes on from what is "
                f"kept ({why})"
            )
        else:
            raise
    else:
        return
    finally:
        over.set()
    print(f"{name}: error: {refused}", file=sys.stderr)
    sys.exit(2)
