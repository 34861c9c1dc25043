"""Run a whole recipe or table: every command, printed as you would type it, finished ones skipped.

  python reproduce.py --recipe sample --workdir demo      every stage on the bundled sample (make demo)
  python reproduce.py --recipe glove --source ~/corpora   the GloVe-T5 family on the real corpora, one GPU
  python reproduce.py --recipe t5 --source download       the T5 family on the real corpora, one GPU
  python reproduce.py --recipe own --source chats.jsonl --workdir own     your own dialogues, without critics
  python reproduce.py --recipe glove --dry-run            only print the commands
  python reproduce.py --recipe glove --source prepared --minutes 25 --parallel 4    a GPU's half hour
  python reproduce.py --take lent.tar.gz                  what that needs where there is no network
  python reproduce.py --table classifiers --seeds 3       what has not finished here, three seeds of each
  python reproduce.py --table main --systems mime.tsv     with published replies beside them
  python reproduce.py --table classifiers --rows emo-tfidf exp-tfidf      two of its rows
  python reproduce.py --check emo-glove-t5                one row again, in a fresh folder, and compared
  python reproduce.py --render                            README's and docs/results.md's tables, from the data

A command that fails stops the recipe and is shown with the end of its log; the same call goes on from there,
where inputs or flags have changed since, with --overwrite.
A table goes on without the rows that build on it, and its exit code is 1 where a row stays without figures.
At the end of --minutes what is running saves and stops (exit code 143), and the same call goes on, too; what
is worth carrying away lies in results/RECIPE/gathered (of --table: results/tables/gathered), 60 MB at most,
from the first stage that ends on. The rows of the tables, their commands and what is recorded of them:
results/results.yaml.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bundled
import options
from options import (
    HERE,
    NATURAL,
    POSITIVE,
    Paths,
    UserError,
    Wrong,
    batch_count,
    check,
    given,
    make_parser,
    named_places,
    number,
)
from recipes import PREPARED, RECIPES, Changes, lacks_data, lines_of, plan, script_of, split_override

#: what --source can be beside a folder
NAMED = ("download", "sample", PREPARED)
#: of results/results.yaml
TABLES = ("classifiers", "retrieval", "main", "ablations", "losses", "processor", "energy", "causal")
#: flags that say where a command writes
PLACES = {"--name", "--output", "--workdir"}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", choices=list(RECIPES), help="run a list of commands")
    what.add_argument(
        "--table", choices=TABLES, help="run what of a table has not finished in the workdir, and show it"
    )
    what.add_argument(
        "--check", metavar="ROW", help="run one row again and compare (default workdir: results/checks/ROW)"
    )
    what.add_argument(
        "--render", action="store_true", help="write the tables of README.md and docs/results.md anew"
    )
    what.add_argument(
        "--take",
        metavar="FILE",
        help="pack the workdir's prepared data, and MiniLM in half precision, into a .tar.gz, to be unpacked "
        "in the project's folder on a machine without a network",
    )
    parser.add_argument("--workdir", default=".", help="folder that holds data/ saved/ results/")
    parser.add_argument(
        "--source",
        default="download",
        help="of the real corpora: download, a folder with the official files, or prepared (the workdir's "
        "data as they lie there; no network); of --recipe own: the file or folder of your dialogues",
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
        help="flags of one script's commands, over those above, with paths as the script is to get them; may "
        "be given several times",
    )
    parser.add_argument(
        "--record",
        metavar="HARDWARE",
        help="of --table: write what was measured into results/results.yaml; the key of the hardware there",
    )
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="of --table: these rows alone (default: all)"
    )
    parser.add_argument("--seeds", type=NATURAL, default=1, help="of --table and --check: 42, 43 ...")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of --table: other people's replies, for the command that scores the runs",
    )
    parser.add_argument(
        "--parallel",
        type=NATURAL,
        default=1,
        help="stages at once, where none needs another; each has one GPU, of several the least used",
    )
    parser.add_argument("--minutes", type=POSITIVE, help="then what is running saves and stops")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="where a stage's inputs or flags are others than when it last ran, replace what it made then (a "
        "training begins anew; leave the flag out to go on with one that was stopped by an error)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(argv)
    if args.check:
        lines_for(args)  # a row that cannot be checked leaves no folder
        if args.workdir == ".":
            own = Path("results", "checks", args.check)
            args.workdir = str(own if Path.cwd() == HERE else HERE / own)
    problems = problems_of(parser, args)
    if args.source not in NAMED:  # seen from here, and data/ is not that of the workdir
        args.source = str(Path(args.source).resolve())
    if Path.cwd() != HERE:  # the commands run in the project's folder
        args.workdir = str(Path(args.workdir).resolve())
    refused = problems or any(isinstance(value, Wrong) for value in vars(args).values())
    if not (args.dry_run or args.take or args.render or refused):
        Path(args.workdir).mkdir(parents=True, exist_ok=True)
    check(parser, args, problems, makes_workdir=True)
    return args


def problems_of(parser, args) -> list[str]:
    """What argparse does not see: flags of another errand, files that are not there, a wrong --override."""
    places = [place for text in args.systems for place in named_places(text)[1] or [text]]
    problems = [f"--systems {place}: no such file" for place in places if not Path(place).exists()]
    if args.source not in NAMED and not Path(args.source).exists():
        kind = (
            f"{PREPARED} nor a file or folder" if args.recipe == "own" else f"{', '.join(NAMED)} nor a folder"
        )
        problems.append(f"--source {args.source}: neither {kind}")
    elif args.recipe == "sample" and args.source not in NAMED:
        problems.append(f"--source {args.source}: the recipe sample is of the bundled sample; leave it out")
    elif args.recipe == "own" and args.source in ("download", "sample"):
        problems.append("--recipe own: give your dialogues with --source (docs/own-dialogues.md says how)")
    elif args.recipe != "own" and args.source not in NAMED and Path(args.source).is_file():
        problems.append(
            f"--source {args.source}: a file; the real corpora are a folder, and dialogues of your own have "
            "--recipe own"
        )
    if args.take or args.render:
        errand = "--take" if args.take else "--render"
        others = [a for a in vars(args) if a not in ("take", "render", *["workdir"] * bool(args.take))]
        if ignored := given(parser, args, others):
            problems.append(f"{', '.join(ignored)}: {errand} runs no command; leave it out")
    if args.take and Path(args.take).exists():
        problems.append(f"--take {args.take}: already there; give another name, or remove it")
    for flag in ("systems", "record", "rows"):
        if getattr(args, flag) and not args.table:
            problems.append(f"--{flag}: goes with --table")
    if args.record and (args.epochs or args.batch_size or args.override):
        problems.append(
            "--record: what is recorded are the rows' own commands; leave --epochs, --batch-size "
            "and --override out"
        )
    if args.seeds > 1 and (not (args.table or args.check) or args.seed is not None):
        problems.append("--seeds: goes with --table or --check, and without --seed")
    if args.batch_size == "auto" and args.parallel > 1:
        problems.append(
            "--batch-size auto fills a GPU, and --parallel lets stages share one: give a number, or leave "
            "--parallel out"
        )
    if args.override:
        problems += override_problems(args)
    return problems


def override_problems(args) -> list[str]:
    """What is wrong with each --override: a script that is not run, or no flag of it."""
    known = {script_of(shlex.split(line.removeprefix("python "))) for line in lines_for(args)}
    problems = []
    for text in args.override:
        try:
            script, words = split_override(text)
        except ValueError as error:
            problems.append(f"--override {text!r}: {error}")
            continue
        if script not in known:
            name = "recipe" if args.recipe else "table"
            problems.append(f'--override "{text}": the {name} runs {", ".join(sorted(known))}')
        elif not words or not words[0].startswith("--"):
            problems.append(f'--override "{text}": needs a flag after {script}')
        else:
            flags = {w.split("=")[0] for w in words if w.startswith("--")}
            problems += [
                f'--override "{text}": {script} has no {flag}' for flag in sorted(flags - flags_of(script))
            ]
            problems += [
                f'--override "{text}": later commands look where this one writes now; leave {flag} out'
                for flag in sorted(flags & PLACES)
            ]
    return problems


def lines_for(args) -> list[str]:
    """All commands that this call may run."""
    if args.recipe:
        return lines_of(RECIPES[args.recipe](args.source))
    if args.render or args.take:
        return []
    import reproductions
    import results
    from rows import recipe_of

    data = results.read(HERE / results.FILE)
    rows = [reproductions.row_to_check(data, args.check)] if args.check else data.of(args.table)
    tables = {data.tables[row.table].evaluate for row in rows} - {""}
    return [*lines_of(recipe_of(data, rows, args.source)), *tables]


def flags_of(script: str) -> set[str]:
    """What its --help names."""
    place = ["-m", script] if script.startswith("DPR.") else [str(HERE / script)]
    command = [sys.executable, *place, "--help"]
    shown = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown))


def sample_page(folder: Path) -> str:
    """A bundled model's replies, where there are some, then the case studies of the tiny models."""
    studies = folder / "case_studies.md"
    if not studies.exists():
        raise UserError(
            f"{studies}: gone; remove metrics.json and stages.json there, too, and the same call makes it "
            "again"
        )
    cases = studies.read_text(encoding="utf-8")
    replies, run = folder / "replies.jsonl", bundled.generator(None)
    if run is None or not replies.exists():
        return cases
    dialogues = (HERE / "data" / "sample" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    lines = ["# Replies of the bundled model", ""]
    place = run.relative_to(bundled.HERE).as_posix()
    lines += [f"Written by {bundled.why(run, None)}; what it was trained on: {place}/README.md."]
    lines += ["The tiny models below were trained in minutes and only show the way.", ""]
    for asked, answered in zip(dialogues, replies.read_text(encoding="utf-8").splitlines(), strict=True):
        for n, turn in enumerate(json.loads(asked)["turns"]):
            lines.append(f"- **{('speaker', 'listener')[n % 2]}:** {turn}")
        lines += [f"- **the model:** {json.loads(answered).get('reply', '-')}", ""]
    return "\n".join(lines) + "\n" + cases


def run_recipe(name: str, workdir: str, source: str, changes: Changes, box, dry_run: bool) -> None:
    """Run a recipe, or only print its commands."""
    import stages
    import storage

    todo = plan(RECIPES[name](source), workdir, source, changes)
    folder = Paths(Path(workdir).resolve() if workdir != "." else ".").results / name
    began = time.monotonic()
    if dry_run:
        print("\n" + "\n\n".join(stages.title(todo, n) for n in range(len(todo))))
        return
    if name == "own" and source not in NAMED:
        reads = tuple(storage.digests(Path(source)))  # edited dialogues are others
        todo = [replace(s, reads=reads) if script_of(s.command) == "prepare_data.py" else s for s in todo]
    if lacks_data(source, workdir):
        raise UserError(f"--source prepared: no data/prepared.json in {workdir}; prepare_data.py makes it")
    if box.seconds:
        from gathering import gather

        box = replace(box, gather=lambda: gather(Paths(workdir), folder / "gathered"))
    with storage.locked(folder, stages.BUSY):
        outcome = stages.run(todo, stages.Record(folder / "stages.json"), folder / "logs", box)
    if box.gather:
        left = box.gather()
        print("\n" + "\n".join([f"gathered: {folder / 'gathered'}", *(f"  left out: {x}" for x in left)]))
    stages.settle_outcome(outcome, todo)
    if name == "sample":
        page = folder / "page.md"
        storage.write_text(page, sample_page(folder))
        print("\n" + "\n## ".join(page.read_text(encoding="utf-8").split("\n## ")[:4]))
    seconds = time.monotonic() - began
    print(f"\nall {len(todo)} stages done in {seconds:.0f} s; table and replies: {folder}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    import stages

    changes = Changes(args.seed, args.epochs, args.batch_size, tuple(args.override))
    box = stages.Box(args.parallel, 60 * (args.minutes or 0), overwrite=args.overwrite)
    if args.recipe:
        return run_recipe(args.recipe, args.workdir, args.source, changes, box, args.dry_run)
    if args.take:
        from gathering import MEGABYTE, take

        size = take(Paths(args.workdir), Path(args.take))
        return print(
            f"{args.take}: {size / MEGABYTE:.1f} MB; unpack it there: tar -xzf {Path(args.take).name}"
        )
    import reproductions
    import results
    from rows import Request

    if args.render:
        return results.render(HERE)
    data = results.read(HERE / results.FILE)
    request = Request(
        args.workdir,
        args.source,
        changes,
        box,
        args.seeds,
        tuple(args.systems),
        args.dry_run,
        args.record or "",
        tuple(args.rows),
    )
    if args.table:
        done = reproductions.make_table(data, args.table, request)
    else:
        done = reproductions.check_row(data, args.check, request)
    if not done:
        raise SystemExit(1)


if __name__ == "__main__":
    options.run(main)
