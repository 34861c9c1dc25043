"""respond.py's work: everything found that a reply needs, dialogues from a file, a conversation in the
terminal."""

import contextlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import advice
import bundled
import caches
import distress
import storage
from corpora import EMOTIONS
from critics import doubts, find_critics
from exemplars import matched_by
from hub import folder_given
from options import CRITICS, FAMILIES, Paths, UserError, Wrong
from records import format_of, is_utf8, json_value, lines_of, open_text, refuse_other_formats, require_utf8
from responder import WRITERS, Answer, Responder, check_turns, open_writer
from scoring import as_json, described
from searching import check_emotion, find_retriever, pool_of, read_replies, training_pool
from session import Session
from settings import Decoding, Weights, target
from storage import hash_seed
from turns import cast, pick, said_by

SHOWN = 3  # exemplars on the terminal
HELP = f"""/retry          another reply to the same turn
/undo           take back your last turn and its reply
/reset          begin a new dialogue
/target emo=1   what replies should come close to ({", ".join(CRITICS)}); /target alone ends that
/save FILE      the dialogue as a line of JSON; to read where the name ends in .md
/quit           or the end of the input"""


@dataclass(frozen=True)
class RespondOptions:
    """What respond.py was asked for (it explains each flag)."""

    run: str | None
    base: str | None
    pool: str | None
    column: str | None
    path: str | None
    encoder: str | None
    pooling: str | None
    emotion: str | None
    target: dict[str, float]
    candidates_per_reply: int
    likelihood_w: float
    empathy_w: float
    sentiment_w: float
    top_k: int
    top_p: float
    temperature: float
    max_new_tokens: int
    seed: int | None
    overwrite: bool


def say(text: str) -> None:
    """What is not a reply: beside the replies, so that these can be piped on."""
    tqdm.write(text, file=sys.stderr)  # above a progress bar


# ------------------------------------------------------------------------------------------------------ found


def newest_generator(paths: Paths) -> Path:
    """The generator that was finished last in the workdir; where there is none, one that came with the
    repository."""
    made = [f.parent for f in paths.saved.glob("*/*/result.json") if not bundled.is_bundled(f.parent)]
    finished = [folder for folder in made if advice.kind_of(folder)[0] in WRITERS]
    if not finished and (came := bundled.generator(paths.cache)):
        return came
    if not finished:
        raise UserError(
            f"{paths.saved}: no finished generator; make one with: "
            f"{advice.command('train_glove_t5.py', workdir=paths.root)}; try it out on the sample with: "
            "make demo (then --workdir demo); or name a run's folder"
        )
    return max(finished, key=lambda f: (f / "result.json").stat().st_mtime)


def open_responder(
    options: RespondOptions,
    given: Mapping[str, Path],
    paths: Paths,
    session: Session,
    family: str | None = None,
) -> Responder:
    """The generator with what critics, retriever and pool can be found; says what, and what is missing.

    `family`: whose critics; by default the generator's, or else those that are there."""
    with contextlib.redirect_stdout(sys.stderr):  # the notes of loading are no replies
        return _open_responder(options, given, paths, session, family)


def _open_responder(
    options: RespondOptions, given: Mapping[str, Path], paths: Paths, session: Session, family: str | None
) -> Responder:
    folder = folder_given("--run", options.run) if options.run else newest_generator(paths)
    writer = open_writer(folder, session, paths, options.base)
    families = [family] if family else list(dict.fromkeys([writer.family, *FAMILIES]))
    own = family is not None
    critics = find_critics(paths, families, given, session, needed=own, bundled_too=not own)
    why = bundled.why(folder, paths.cache)
    say(f"generator: {folder}{why and f' ({why})'} | critics: {', '.join(critics) or 'none'}")
    say("note: English only; a research program, not a counsellor")
    if not critics:
        say(
            "note: no critics, so replies are chosen by likelihood alone; a --target needs them (--emo RUN "
            "...)"
        )
    for doubt in doubts(critics):
        say(f"warning: critics {doubt}")
    retriever = pool = None
    if not writer.reads_exemplars:
        flags = ("pool", "emotion", "path", "encoder", "column")
        if given_too := [f"--{flag}" for flag in flags if getattr(options, flag)]:
            raise UserError(
                f"{', '.join(given_too)}: {folder} was trained without exemplars and reads none; leave it out"
            )
    elif not options.pool and not paths.dialogues("train").exists():
        if given_too := [f"--{flag}" for flag in ("emotion", "path", "encoder") if getattr(options, flag)]:
            raise UserError(
                f"{', '.join(given_too)}: there are no replies to search: {paths.dialogues('train')} is not "
                f"there; give some with --pool FILE, or make it with: {advice.prepare(paths.root)}"
            )
        say(
            "note: no exemplars, which this generator reads: give replies with --pool FILE; it writes "
            "without them"
        )
    else:
        retriever, pool = find_exemplars(options, folder, paths, session)
    if pool is None:
        check_emotion(options.emotion, EMOTIONS)
    weights = Weights(options.likelihood_w, options.empathy_w, options.sentiment_w)
    decoding = Decoding(options.top_k, options.temperature, options.max_new_tokens, top_p=options.top_p)
    responder = Responder(writer, critics, retriever, pool, session, weights, decoding)
    responder.folder = folder
    responder.check_target(options.target)
    if options.target and not writer.marks:
        say("note: this generator was trained without marks; a --target only chooses among its candidates")
    return responder


def find_exemplars(options: RespondOptions, run: Path, paths: Paths, session: Session) -> tuple[Any, Any]:
    """(retriever, pool); neither, and a note, where nobody asked for one and there is no trained
    retriever."""
    try:
        retriever = find_retriever(paths, options.path, session, options.encoder, options.pooling)
    except UserError as error:
        if options.path or options.encoder or options.pool:
            raise
        say(f"note: no exemplars, which this generator reads ({error}); it writes without them")
        return None, None
    if options.pool:
        replies = read_replies(options.pool, options.column)
        pool = pool_of(retriever, options.pool, replies, options.overwrite, options.emotion)
    else:
        pool = training_pool(retriever, paths, matched_by(run, paths), options.emotion)
    say(f"exemplars from: {options.pool or paths.dialogues('train')}, {len(pool.texts):,} replies")
    return retriever, pool


# ------------------------------------------------------------------------------------------------------ shown


def shown(answer: Answer) -> str:
    """A reply with what it came from, for the terminal."""
    best = answer.candidates[0]
    lines = [best.text]
    lines.append(
        f"  mean log-probability {best.log_probability:.2f} a token, "
        f"best of {len(answer.candidates)}, seed {answer.seed}"
    )
    lines += [f"  exemplar {hit.score:8.3f}  {hit.text}" for hit in answer.exemplars[:SHOWN]]
    lines += [described(kind, score) for kind, score in best.scores.items()]
    return "\n".join(lines)


def as_row(answer: Answer) -> dict[str, Any]:
    """An answer as plain values."""
    best = answer.candidates[0]
    row: dict[str, Any] = {"reply": best.text, "log_probability": round(best.log_probability, 4)}
    row["exemplars"] = [{"text": hit.text, "score": round(hit.score, 4)} for hit in answer.exemplars]
    row["critics"] = {kind: as_json(score) for kind, score in best.scores.items()}
    row["candidates"] = [
        {"reply": c.text, "log_probability": round(c.log_probability, 4)} for c in answer.candidates
    ]
    row |= {"unread_turns": answer.unread, "unknown_words": list(answer.unknown), "seed": answer.seed}
    row["target"] = dict(answer.target)
    return row | ({"notice": answer.notice} if answer.notice else {})


def plain(text: str) -> str:
    """A text that markdown shows as it was written."""
    return re.sub(r"([\\`*_<>\[\]#|~])", r"\\\1", text)


def once(responder: Responder, turns: list[str], options: RespondOptions) -> Answer:
    """One reply, printed."""
    if found := distress.notice(turns[::2]):
        say(found)
    answer = reply(responder, turns, options)
    print(shown(answer))
    for note in answer.notes:
        say(f"note: {note}")
    return answer


def seed_of(options: RespondOptions, turns: list[str], tries: int = 0) -> int | None:
    """Of the reply to a dialogue: where a seed is fixed, each turn and try has its own."""
    return None if options.seed is None else hash_seed(options.seed, len(turns), tries) % 2**31


def reply(responder: Responder, turns: list[str], options: RespondOptions, **changes: Any) -> Answer:
    asked: dict[str, Any] = {"target": options.target, "seed": options.seed, "emotion": options.emotion}
    return responder.reply(turns, options.candidates_per_reply, **asked | changes)


# ------------------------------------------------------------------------------------------------- from files


def named_dialogue(text: str, where: str, is_json: bool) -> tuple[Any, Any]:
    """(id or None, turns as they stand there) of a line: plain text is one turn; JSON a list of turns, a
    text, or an object with an id and turns. Raises `UserError` where it is damaged."""
    if not is_utf8(text):
        raise UserError(f"{where}: not UTF-8; save the file as UTF-8")
    if text[0] not in "[{" and not (is_json and text[0] == '"'):
        return None, [text]
    try:
        found: Any = json_value(text, where)
    except UserError as error:
        raise UserError(
            f"{error}; a plain text that begins like JSON stands in quotation marks in a .jsonl"
        ) from error
    if isinstance(found, dict):
        return pick(found, "id"), pick(found, "turns")
    return None, [found] if isinstance(found, str) else found


def read_turns(found: Any, where: str) -> list[str]:
    """The turns of a dialogue. A turn is a text, or an object with a speaker and a text (turns.py). Raises
    `UserError` where there is no such list, or its last turn is the listener's."""
    if not isinstance(found, list):
        raise UserError(
            f"{where}: expected a list of turns, each a plain text and the last the one to be answered, "
            'or {"id": ..., "turns": [the same]}'
        )
    said = said_by(found, where)
    turns = cast(said, where).texts if any(isinstance(t, dict) for t in found) else [text for _, text in said]
    check_turns(turns)
    return turns


def refuse_indented(text: str, place: str) -> None:
    """Raises `UserError` for one JSON value over several lines, whose lines would be answered one by one."""
    if "\n" in text:
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            raise UserError(f"{place}: one JSON over several lines; write each dialogue on one line")


def answer_line(
    responder: Responder, options: RespondOptions, number: int, text: str, place: str
) -> dict[str, Any]:
    """The row of one line: its id (or line number) and number with the reply, or with what is wrong with
    it."""
    where, name = f"{place}, line {number}", None
    try:
        name, found_there = named_dialogue(text, where, is_json=format_of(place) == "jsonl")
        turns = read_turns(found_there, where)
        if found := distress.notice(turns[::2]):
            say(f"{where}: {found}")
        row = as_row(reply(responder, turns, options))
    except UserError as error:
        message = str(error)
        say(message if message.startswith(where) else f"{where}: {message}")
        row = {"error": message}
    # an id of its own can be the number of another line
    return {"id": number if name is None else name, "line": number, **row}


def kept_answers(
    responder: Responder,
    asked: list[tuple[int, str]],
    answered: Callable[[int, str], str],
    output: Path,
    options: RespondOptions,
) -> list[str]:
    """A row for each of the numbered lines, written to `output`; an interrupted call goes on where it
    stopped."""
    if not asked:
        raise UserError(f"{output}: not written, since there is no dialogue to reply to")
    storage.require_writable(output.parent)
    places = {"generator": responder.folder} | {k: c.folder for k, c in responder.critics.items()}
    made_of = [*map(storage.identity, filter(None, places.values())), responder.session.precision]
    if responder.has_exemplars:
        assert responder.retriever is not None and responder.pool is not None
        made_of += [str(responder.retriever.encoders.identity), *responder.pool.texts]
    key = storage.fingerprint(str(asked), str(replace(options, overwrite=False)), made_of)[:16]
    origin = {kind: str(place) for kind, place in places.items()} | {"asked": asdict(options), "made_of": key}
    keep = output.parent / f".replies-{key}"

    def work(group: list[int]) -> dict[str, np.ndarray]:
        return {"numbers": np.array(group), "rows": np.array([answered(*asked[n]) for n in group])}

    found = caches.in_chunks(list(range(len(asked))), work, keep, "replies", size=1)["rows"].tolist()
    if all("error" in json.loads(line) for line in found):
        shutil.rmtree(keep, ignore_errors=True)
        raise UserError(f"{output}: not written, since no line had a reply (why, stands above)")
    storage.write_text(output, "".join(f"{line}\n" for line in found), origin)
    shutil.rmtree(keep, ignore_errors=True)
    return found


def respond_to_file(
    opened: Callable[[], Responder], source: str, output: str | None, options: RespondOptions
) -> None:
    """JSON, a line a dialogue, to `output` or standard output. `opened`: gives who replies, once the files
    have been seen to be fit. Raises `UserError` at the end where lines were bad."""
    if output and Path(output).exists() and not options.overwrite:
        raise UserError(f"{output}: already there; add --overwrite to replace it, or choose another --output")
    place = "standard input" if source == "-" else source
    lines = "a dialogue a line, as text (.txt) or as JSON (.jsonl)"
    refuse_other_formats(source, instead=lines)
    if format_of(source) in ("csv", "tsv"):
        raise UserError(f"{source}: no table is read here, but {lines}")
    bad, asked = [], []

    with open_text(source) as handle:
        if format_of(source) == "jsonl":
            refuse_indented(handle.read().strip(), place)
            handle.seek(0)
        responder = opened()
        # letters that the screen's encoding lacks are escaped as JSON does it, else no reader takes the line
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        narrow = not output and not encoding.lower().startswith("utf")

        def answered(number: int, text: str) -> str:
            return json.dumps(answer_line(responder, options, number, text, place), ensure_ascii=narrow)

        if output:
            asked = list(lines_of(handle))
            found = kept_answers(responder, asked, answered, Path(output), options)
            bad = [n for (n, _), line in zip(asked, found, strict=True) if "error" in json.loads(line)]
            say(f"{output}: {len(asked):,} dialogues")
        else:
            for number, text in lines_of(handle):
                line = answered(number, text)
                asked.append((number, text))
                print(line, flush=True)
                bad += [number] * ("error" in json.loads(line))
    if not asked:
        raise UserError(f"{place}: there is no dialogue to reply to")
    if bad:
        named = ", ".join(map(str, bad[:20])) + (f" and {len(bad) - 20} more" if len(bad) > 20 else "")
        others = "; all the others have one" if len(bad) < len(asked) else ""
        raise UserError(f"{len(bad)} of {len(asked)} lines had no reply: {named}{others}")


# --------------------------------------------------------------------------------------------- a conversation


class Conversation:
    """A dialogue with the generator. `read` gives a line or raises EOFError; `write` shows one."""

    def __init__(
        self,
        responder: Responder,
        options: RespondOptions,
        read: Callable[[str], str] = input,
        write: Callable[[str], None] = print,
    ):
        self.responder, self.options, self.read, self.write = responder, options, read, write
        self.target = dict(options.target)
        self.turns: list[str] = []  # speaker and listener in turn
        self.answers: list[Answer] = []
        self.tries = 0  # replies to the last turn

    def run(self) -> None:
        if self.read is input:  # arrow keys; and a terminal by itself cuts a line at 4,096 bytes
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")
        self.write("Write to it; /help lists the commands, an empty line changes nothing.")
        while True:
            try:
                line = self.read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            except UnicodeDecodeError:
                self.write("not UTF-8, and not read; set the terminal to UTF-8")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except UserError as error:
                self.write(str(error))
            except KeyboardInterrupt:
                self.write("\nstopped; the dialogue is where it was before this line")

    def take(self, line: str) -> None:
        """One line of the user's."""
        if not line:
            return
        require_utf8([line])
        if not line.startswith("/"):
            self.tries = 0
            if found := distress.notice([line]):
                self.write(found)
            self.answer([*self.turns, line])
            return
        name, _, rest = line.partition(" ")
        commands = {
            "/retry": self.retry,
            "/undo": self.undo,
            "/reset": self.reset,
            "/target": lambda: self.aim(rest.strip()),
            "/save": lambda: self.save(rest.strip()),
            "/help": lambda: self.write(HELP),
        }
        if name not in commands:
            raise UserError(f"{name}: no such command; there are {', '.join(commands)} and /quit")
        commands[name]()

    def answer(self, turns: list[str]) -> None:
        """Reply to a dialogue, and go on from there."""
        seed = seed_of(self.options, turns, self.tries)
        found = reply(self.responder, turns, self.options, target=self.target, seed=seed)
        self.turns = [*turns, found.reply]
        self.answers = [*self.answers[: len(turns) // 2], found]
        self.write(shown(found))
        for note in found.notes:
            self.write(f"note: {note}")

    def retry(self) -> None:
        if not self.turns:
            raise UserError("nothing to reply to yet; write something first")
        self.tries += 1
        self.answer(self.turns[:-1])

    def undo(self) -> None:
        if not self.turns:
            raise UserError("nothing to take back")
        self.turns, self.answers, self.tries = self.turns[:-2], self.answers[:-1], 0
        self.write(f"back to: {self.turns[-1]}" if self.turns else "back at the beginning")

    def reset(self) -> None:
        self.turns, self.answers, self.tries = [], [], 0
        self.write("a new dialogue")

    def aim(self, text: str) -> None:
        found = target(text)
        if isinstance(found, Wrong):
            raise UserError(f"/target {found.problem}")
        try:
            self.responder.check_target(found)
        except UserError as error:
            raise UserError(str(error).replace("--target", "/target", 1)) from error
        self.target = found
        self.write(f"target: {', '.join(f'{k}={v:g}' for k, v in found.items()) or 'none'}")

    def as_line(self) -> str:
        """The dialogue as a line of JSON."""
        answers = [as_row(answer) for answer in self.answers]
        row = {"generator": str(self.responder.folder), "turns": self.turns, "answers": answers}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        """The dialogue to read, with each reply's critics and exemplars beneath it."""
        parts = []
        for n, found in enumerate(self.answers):
            parts += [f"**You:** {plain(self.turns[2 * n])}", f"**Reply:** {plain(found.reply)}"]
            known = [f"- {plain(described(k, score).strip())}" for k, score in found.scores.items()]
            known += [f"- exemplar {hit.score:.3f}: {plain(hit.text)}" for hit in found.exemplars[:SHOWN]]
            parts += ["\n".join(known)] if known else []
        return "\n\n".join(parts) + "\n"

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save FILE: name a file")
        if not self.turns:
            raise UserError("/save: nothing was said yet; write something first")
        try:
            file = Path(name).expanduser()
            there = file.exists()
        except (OSError, RuntimeError) as error:  # too long a name; ~ of somebody unknown
            raise UserError(f"/save {name[:80]}: no name for a file ({error}); choose another") from error
        if there:
            raise UserError(f"{file}: already there; choose another name")
        storage.write_text(file, self.as_markdown() if name.endswith(".md") else self.as_line())
        self.write(f"{file}: {len(self.turns)} turns")
