"""Run the stages of a plan: finished ones skipped, several at once where asked, within a box of time.

A stage that is told to stop (Ctrl-C, SIGTERM, the end of the terminal or of the box) saves what it has; the
same call goes on from there.
"""

import contextlib
import glob
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import advice
import runs
import storage
from options import HERE, Paths, UserError
from recipes import Stage, script_of

REFUSED = 2  # the exit code of a script that says what is wrong with its flags or files
AGAIN = "the same call goes on from here"
OTHER = (
    "what lies there is of other inputs or flags: the same call with --overwrite replaces it, and what "
    "builds on it; another --workdir keeps both"
)
GRACE = 60  # seconds in which a stage that was told to stop saves; then it is killed, which it survives too
NEVER = float("inf")
#: where two calls would write one stages.json
BUSY = "another reproduce.py is at work there; wait for it, or choose another --workdir"
#: what stages write last, seen from the workdir: while these files stand, what a stage made is there
MARKS = (
    "data/prepared.json",
    "data/dpr/*.json",
    "data/*/*_labels.csv",
    "data/*/*_dpr.csv",
    "saved/**/*_labels.csv",
    "saved/**/*_dpr.csv",
    "saved/**/result.json",
    "saved/**/predictions*.tsv",
    "results/*/*.json",
    "results/*/*.jsonl",
)


# ------------------------------------------------------------------------------------- what finished before


class Record:
    """WORKDIR/results/NAME/stages.json: {command: seconds, whether it finished, what it was built on and what
    it made}."""

    def __init__(self, file: Path):
        self.file = file
        self.root = file.absolute().parents[2]
        self.prepared = Paths(self.root).data / "prepared.json"
        # of the first days there are seconds alone
        noted = storage.read_if_there(file).items()
        self.entries: dict[str, dict] = {key: entry for key, entry in noted if isinstance(entry, dict)}

    def finished(self, stage: Stage) -> bool:
        finished = bool(self.entries.get(stage.key, {}).get("finished"))
        return finished and self.same(stage) and not self.gone(stage)

    def same(self, stage: Stage) -> bool:
        """Whether what the command was last run on is what it would be run on now."""
        entry = self.entries.get(stage.key, {})
        same = entry.get("identity", stage.identity) == stage.identity
        if script_of(stage.command) != "prepare_data.py" and self.prepared.exists():
            data = storage.sha256(self.prepared)
            same &= entry.get("data", data) == data
        same &= entry.get("reads", list(stage.reads)) == list(stage.reads)
        return bool(same)

    def replaces(self, stage: Stage) -> bool:
        """Whether what lies where the stage writes is of other inputs or flags, as far as is noted here."""
        return not self.same(stage) or bool(self.in_its_place(stage))

    def in_its_place(self, stage: Stage) -> list[str]:
        """The commands that have finished and write where this one does: the same line under another call's
        flags, or other data prepared."""
        if stage.key in self.entries:
            return []

        def writes(line: str) -> str:
            line = line.removeprefix("python ")
            return "data" if line.startswith("prepare_data.py") else line

        own = writes(stage.line)
        return [k for k, e in self.entries.items() if writes(e.get("line", "")) == own and e.get("finished")]

    def gone(self, stage: Stage) -> str:
        """The first file that the stage made and that stands no more; empty where all do, and of older
        records, which do not say what was made."""
        made = self.entries.get(stage.key, {}).get("made", [])
        if script_of(stage.command) == "prepare_data.py":
            made = [*made, self.prepared.relative_to(self.root).as_posix()]
        return next((mark for mark in made if not (self.root / mark).exists()), "")

    def standing(self) -> dict[str, int]:
        """{each of `MARKS`, seen from the workdir: when it was written}."""
        found = {}
        # glob.glob passes over folders that a running stage takes away; Path.glob raises
        places = (p for pattern in MARKS for p in glob.glob(pattern, root_dir=self.root, recursive=True))
        for file in map(self.root.joinpath, places):
            with contextlib.suppress(FileNotFoundError):  # a stage that is running took it away
                if file.name != "stages.json" and not file.name.endswith(".origin.json"):
                    found[file.relative_to(self.root).as_posix()] = file.stat().st_mtime_ns
        return found

    def made(self, stage: Stage, before: dict[str, int] | None) -> list[str]:
        """The marks of what a stage made: those whose notes name its command, or, where they name none, those
        that are other than `before` it (None: other stages ran beside it, and could have made them)."""
        own = ["python", *(word for word in stage.command if word != "--overwrite")]
        found = []
        for mark, written in self.standing().items():
            file = self.root / mark
            if file.suffix == ".tsv" and "--inference" not in stage.command:
                continue  # a training that has finished does not write its replies again
            note = "environment.json" if file.name == "result.json" else f"{file.name}.origin.json"
            noted = [w for w in advice.noted_command(file.with_name(note))[0] if w != "--overwrite"]
            changed = before is not None and before.get(mark) != written
            if noted == own or (not noted and changed):
                found.append(mark)
        return found

    def seconds(self, stage: Stage) -> float:
        """Of all calls together."""
        return float(self.entries.get(stage.key, {}).get("seconds", 0.0))

    def add(
        self, stage: Stage, seconds: float, finished: bool, commit: str = "unknown", made: Sequence[str] = ()
    ) -> None:
        """`commit`: the project's, as the stage began; `made`: marks of what it made."""
        before = 0.0 if self.entries.get(stage.key, {}).get("finished") else self.seconds(stage)
        self.entries[stage.key] = {
            "seconds": round(before + seconds, 1),
            "line": stage.line,
            "identity": stage.identity,
            "finished": finished,
            "commit": commit,
        }
        if stage.reads:
            self.entries[stage.key]["reads"] = list(stage.reads)
        if finished and made:
            self.entries[stage.key]["made"] = list(made)
        if self.prepared.exists():
            self.entries[stage.key]["data"] = storage.sha256(self.prepared)
        storage.write_json(self.file, self.entries)

    def another(self, stage: Stage) -> str:
        """Why what stands here already is not this stage's; empty where nothing does."""
        if self.entries.get(stage.key, {}).get("finished"):
            if mark := self.gone(stage):
                return f"finished before, but {self.root / mark} is gone: it runs again"
            return "finished before, but what it builds on is another today: it runs again"
        if others := self.in_its_place(stage):
            return (
                f"an earlier call finished another command in its place: python {others[-1]}. What that made "
                "is replaced only with --overwrite; another --workdir keeps both"
            )
        return ""


# ----------------------------------------------------------------------------------------------- one process


class Process:
    """A running stage; its output goes to its log and, line by line, to the screen."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        ended: Callable[[], None],
        prefix: str = "  ",
        threads: int = 0,
        gpu: str = "",
    ):
        """`gpu`: the only one that it sees, as CUDA_VISIBLE_DEVICES names it; without one, all."""
        log.parent.mkdir(parents=True, exist_ok=True)
        # on a terminal standard error stays there, for the progress bars; elsewhere it goes into the log too
        alone = threads == 0 and sys.stderr is not None and sys.stderr.isatty()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.command, self.log, self.prefix, self.began = command, log, prefix, time.monotonic()
        self.gpu = gpu
        self.unsaid = ""  # why not all of its output is in its log
        self.commit = runs.commit()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=None if alone else subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=HERE,
            env=environment,
            start_new_session=True,  # signals come from here alone, once
        )
        threading.Thread(target=self.copy, args=(ended,), daemon=True).start()

    def copy(self, ended: Callable[[], None]) -> None:
        """Reads the output to its end, also after a signal: there the stage says how to go on; and where
        neither log nor screen takes it any more, since a stage waits for its reader."""
        assert self.process.stdout is not None  # a pipe, see above
        try:
            with open(self.log, "w", encoding="utf-8") as out:
                for line in self.process.stdout:
                    print(self.prefix + line, end="", flush=True)
                    out.write(line)
        except (OSError, ValueError) as error:  # ValueError: a letter that the screen's encoding lacks
            self.unsaid = f" ({error}: the rest of its output is lost)"
            for _ in self.process.stdout:
                pass
        finally:
            self.process.wait()
            ended()

    def failure(self) -> str:
        """What a person needs to see of it."""
        said = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        end = "".join(said.splitlines(keepends=True)[-20:])
        shown = shlex.join(["python", *self.command])
        code, place = self.process.returncode, f"{self.log}{self.unsaid}"
        return f"failed (exit code {code}): {shown}\n{end}its output is in {place}"


# ------------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Box:
    """How much at once, and for how long; all runs in one box end together."""

    parallel: int = 1
    seconds: float = 0.0  # 0: without an end
    keep_going: bool = False  # after a failure, with what does not build on it
    overwrite: bool = False  # what a stage made of other inputs, or under other flags, is replaced
    gather: Callable[[], object] | None = None  # what has finished, while the others run
    began: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        return self.began + self.seconds if self.seconds else NEVER


@dataclass
class Outcome:
    failed: dict[int, str] = field(default_factory=dict)  # {place in the plan: what went wrong}
    left: list[int] = field(default_factory=list)  # places of what has not finished
    stopped: int = 0  # by this signal; SIGTERM at the end of the box


@contextlib.contextmanager
def handling(stop: Callable) -> Iterator[None]:
    """Signals to stop go to `stop`."""
    before = {number: signal.signal(number, stop) for number in runs.signals_to_stop()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def none_left(running: dict[int, Process]) -> Iterator[None]:
    """What still runs when the block ends with an error is told to stop, and waited for while it saves: in a
    session of its own nothing else reaches it."""
    try:
        yield
    finally:
        for process in running.values():
            process.process.terminate()
        for process in running.values():
            try:
                process.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.process.kill()


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch  # late: takes seconds

    return [str(number) for number in range(torch.cuda.device_count())]


def run(stages: Sequence[Stage], record: Record, logs: Path, box: Box) -> Outcome:
    """Run what has not finished, each stage after all that it builds on.

    A failure ends the run once what is running has ended, with `box.keep_going` only what builds on it.
    Several at once share the GPUs evenly, each stage on one.
    """
    outcome, running = Outcome(), dict[int, Process]()
    before = dict[int, dict[str, int] | None]()  # the marks that stood as each stage began, see Record.made
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: set[int] = set()
    gathered = 0
    waiting = list(range(len(stages)))
    deadline = box.deadline
    threads = max(1, (os.cpu_count() or 1) // box.parallel) if box.parallel > 1 else 0
    gpus = visible_gpus() if box.parallel > 1 else []

    def stop(number: int, frame: object = None) -> None:
        outcome.stopped = outcome.stopped or number
        for process in running.values():
            process.process.send_signal(number)

    def start(place: int) -> None:
        stage = stages[place]
        print(f"\n{title(stages, place)}", flush=True)
        if record.finished(stage):
            print(f"  finished before, in {record.seconds(stage):.0f} s", flush=True)
            finished.add(place)
            return
        if why := record.another(stage):
            print(f"  {why}", flush=True)
        script = Path(script_of(stage.command)).name.removesuffix(".py")
        log = logs / f"{place + 1:02d}-{script}.log"
        prefix = f"  [{place + 1}] " if threads else "  "
        busy = [process.gpu for process in running.values()]
        gpu = min(gpus, key=busy.count) if len(gpus) > 1 else ""
        for other in running:
            before[other] = None
        before[place] = None if running else record.standing()
        command = (
            [*stage.command, "--overwrite"] if box.overwrite and record.replaces(stage) else stage.command
        )
        running[place] = Process(command, log, lambda: ended.put(place), prefix, threads, gpu)
        if outcome.stopped:  # the signal came while it began
            running[place].process.send_signal(outcome.stopped)

    def end(place: int) -> None:
        process = running.pop(place)
        code = process.process.returncode
        refused = code == REFUSED and record.replaces(stages[place])
        if not refused:  # else what is noted is still of what lies there
            made = record.made(stages[place], before[place]) if code == 0 else []
            record.add(stages[place], time.monotonic() - process.began, code == 0, process.commit, made)
        if code == 0:
            finished.add(place)
        elif not outcome.stopped:
            outcome.failed[place] = (
                f"{process.failure()}; {OTHER if refused and not box.overwrite else AGAIN}"
            )

    def may_start(place: int) -> bool:
        over = outcome.stopped or (outcome.failed and not box.keep_going)
        return not over and len(running) < box.parallel and finished.issuperset(stages[place].after)

    def times_up() -> float:
        """What is done at a deadline; the next one."""
        if outcome.stopped:  # told to stop, and the grace is over
            for process in running.values():
                process.process.kill()
            return NEVER
        print("\nthe time is over: what is running saves and stops", flush=True)
        stop(signal.SIGTERM)
        return time.monotonic() + GRACE

    with handling(stop), none_left(running):
        if time.monotonic() >= deadline:  # an earlier run has filled the box
            deadline = times_up()
        while True:
            for place in list(waiting):
                if may_start(place):
                    waiting.remove(place)
                    start(place)
            if not running:
                break
            if box.gather and len(finished) > gathered:
                gathered = len(finished)
                try:
                    box.gather()
                except OSError as error:  # a full disk, say, must not leave the stages alone
                    print(f"\nnot gathered: {error}", flush=True)
            try:
                end(ended.get(timeout=min(max(0, deadline - time.monotonic()), threading.TIMEOUT_MAX)))
            except queue.Empty:
                deadline = times_up()
    outcome.left = [n for n in range(len(stages)) if n not in finished]
    return outcome


def title(stages: Sequence[Stage], place: int) -> str:
    return f"[{place + 1}/{len(stages)}] {shlex.join(['python', *stages[place].command])}"


def settle_outcome(outcome: Outcome, stages: Sequence[Stage]) -> None:
    """Raises what a script ends with where not all has finished."""
    if outcome.stopped and outcome.left:
        print("".join(f"{failure}\n" for failure in outcome.failed.values()), end="", file=sys.stderr)
        print(
            f"stopped with {len(stages) - len(outcome.left)} of {len(stages)} stages done; {AGAIN}",
            file=sys.stderr,
        )
        raise SystemExit(128 + outcome.stopped)
    if outcome.failed:
        raise UserError("\n".join(outcome.failed.values()))
