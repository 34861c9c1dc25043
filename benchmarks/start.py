"""Seconds from a command to its first line and to its first step, of every script on tiny models.

  python benchmarks/start.py --workdir demo                 the folder that make demo has filled
  python benchmarks/start.py --workdir demo --only train_t5.py respond.py

Each script runs as a process of its own, on one thread unless OMP_NUM_THREADS says otherwise, in a temporary
folder with the workdir's data and links to its runs: nothing of the workdir changes. First line: on the
terminal, standard error included. First step: a training's first logged update; of any other script, its end.
A script that fails, mostly for something that the workdir lacks, is shown with what it said.
"""

import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import reporting  # noqa: E402
from options import POSITIVE, Paths, UserError, add_common, make_parser, run  # noqa: E402

STEP = "--max-steps 1 --log-every 1 --batch-size 4 --epochs 1 --name start-benchmark"
PLAIN = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --no-predict"
DEVICE = "--device cpu"
#: in the folder {work}
SCRIPTS = {
    "prepare_data.py": "--source sample --overwrite",
    "train_empathy_classifier.py": f"--dim emo --model glove-t5 --size tiny {STEP} {DEVICE}",
    "train_sentiment_regressor.py": f"--model glove-t5 --size tiny {STEP} {DEVICE}",
    "label_dialogues.py": f"--family glove-t5 --splits test --output {{work}}/out {DEVICE}",
    "-m DPR.prepare_dpr_data": "--overwrite",
    "-m DPR.train_dpr": f"--encoder {{work}}/data/bert-tiny {STEP} {DEVICE}",
    "-m DPR.evaluate_retriever": f"--encoder {{work}}/data/bert-tiny --overwrite {DEVICE}",
    "dpr_exemplar_retriever.py": "--encoder {work}/data/bert-tiny --splits test --output {work}/out "
    + DEVICE,
    "train_t5.py": f"--model t5-tiny {PLAIN} {STEP} {DEVICE}",
    "train_glove_t5.py": f"--size tiny {PLAIN} {STEP} {DEVICE}",
    "train_causal_lm.py": f"--max-steps 1 --valid-conversations 1 --no-predict {STEP} {DEVICE}",
    "evaluate_responses.py": "{work}/saved/glove-t5/plain --family glove-t5 --resamples 100 --overwrite",
    "control.py": "{work}/saved/glove-t5/plain --ranker tfidf --judge glove-t5 --contexts 2 --candidates 2",
    "probe_critics.py": f"{{work}}/saved/glove-t5/plain --kinds emo --output {{work}}/probe.json {DEVICE}",
    "score.py": f"--family glove-t5 {DEVICE} 'That sounds hard.'",
    "retrieve.py": f"--pool {{work}}/pool.txt --encoder {{work}}/data/bert-tiny {DEVICE} 'My dog died.'",
    "respond.py": f"--run {{work}}/saved/glove-t5/plain {DEVICE} 'My dog died.'",
    "app.py": f"--model {{work}}/saved/glove-t5/plain --port 7897 {DEVICE}",
    "reproduce.py": "--recipe sample --dry-run",
}
SERVES = {"app.py"}  # it is stopped after its first line


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*SCRIPTS], metavar="SCRIPT", help="these alone (default: all)")
    add("--causal", metavar="DIR", help="a small causal language model's folder (default: smollm2)")
    add("--limit", type=POSITIVE, default=120.0, help="seconds after which a script is stopped")
    return reporting.parsed(parser, argv)


def prepare(workdir: Path, work: Path) -> None:
    """A folder in which scripts may write: the data, without its caches, and links to every run."""
    if not (workdir / "data").is_dir():
        raise UserError(f"--workdir {workdir}: has no data; make demo fills the folder demo")
    shutil.copytree(workdir / "data", work / "data", ignore=shutil.ignore_patterns("cache"), symlinks=True)
    (work / "data" / "cache").mkdir(exist_ok=True)
    for folder in (workdir / "data" / "cache").glob("smollm2-*"):
        (work / "data" / "cache" / folder.name).symlink_to(folder.resolve())
    for stage in sorted(place for place in (workdir / "saved").glob("*") if place.is_dir()):
        (work / "saved" / stage.name).mkdir(parents=True)
        for kept in stage.iterdir():
            (work / "saved" / stage.name / kept.name).symlink_to(kept.resolve())
    (work / "pool.txt").write_text("I am sorry to hear that.\nThat is great news!\n", encoding="utf-8")


def start(script: str, flags: str, work: Path, limit: float) -> dict:
    """Run one script; seconds to its first line (None: it said nothing) and to its first step."""
    name = script.split()[-1]
    command = [sys.executable, *shlex.split(script), "--workdir", str(work), *shlex.split(flags)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    logs = set(work.glob("saved/**/start-benchmark/metrics.jsonl"))
    trains = name.startswith("train_") or name == "DPR.train_dpr"
    began, first, step, said = time.perf_counter(), None, None, b""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    assert process.stdout
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while time.perf_counter() - began < limit:
            part = process.stdout.read(65536) if ready.select(timeout=0.02) else None
            now = time.perf_counter() - began
            if part:
                said += part
                first = now if first is None and said.strip() else first
            if trains and step is None:
                new = set(work.glob("saved/**/start-benchmark/metrics.jsonl")) - logs
                step = now if any('"step": 1' in file.read_text() for file in new) else None
            if part == b"" or (name in SERVES and first is not None):
                break
    seconds = time.perf_counter() - began
    served = name in SERVES and first is not None and process.poll() is None
    cut = process.poll() is None and not served and seconds >= limit
    if cut or served:
        process.terminate()
    process.wait()
    lines = said.decode(errors="replace").strip().splitlines() or [""]
    errors = [line for line in lines if "error:" in line.lower()]
    failed = 0 if served and not errors else process.returncode
    if not trains and name not in SERVES and not failed:
        step = seconds
    return {
        "script": name,
        "first_line": first,
        "first_step": None if failed else step,
        "end": seconds,
        "failed": failed,
        "says": f"stopped after --limit {limit:g} s"
        if cut
        else ((errors or lines[-1:])[0] if failed else lines[0])[:80],
    }


def main(argv=None):
    args = parse_args(argv)
    paths = Paths(args.workdir)
    file = reporting.target(paths, "start", args.overwrite)
    found = []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        prepare(paths.root, work)
        for script, flags in SCRIPTS.items():
            if args.only and script not in args.only:
                continue
            reporting.say(script)
            more = f" --model {args.causal}" if script == "train_causal_lm.py" and args.causal else ""
            row = start(script, flags.format(work=work) + more, work, args.limit)
            found.append(row | {"says": row["says"].replace(str(work), "WORKDIR")})
    rows = []
    for row in found:
        seconds = [
            round(row[key], 1) if row[key] is not None else "-" for key in ("first_line", "first_step", "end")
        ]
        rows.append([row["script"], *seconds, ("FAILED: " if row["failed"] else "") + row["says"]])
    print(reporting.table(["script", "first line, s", "first step, s", "end, s", "its line"], rows, True))
    reporting.write(file, vars(args), "cpu", {"scripts": found})
    return found


if __name__ == "__main__":
    run(main)
