"""Kill one training run many times, also inside saves, and compare it with an uninterrupted one, bit for bit.

  python benchmarks/kill_resume.py --workdir demo --kills 20

Trains a tiny GloVe generator twice on the prepared data of the workdir: once in peace, once under SIGKILL at
random moments, every other time just when a checkpoint is being written. Plain, or with `--full`: exemplars,
critics, Gumbel noise and accumulation, for which the workdir must hold GloVe critics, labels and exemplars.
Prints the sha256 of the final weights of both, and writes results/kill_resume.json, or kill_resume_full.json.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import reporting  # noqa: E402
from options import NATURAL, Paths, UserError, add_common, make_parser, refuse_existing, run  # noqa: E402


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument("--kills", type=NATURAL, default=20, help="how often the run is killed")
    parser.add_argument(
        "--full", action="store_true", help="the whole objective instead of a plain generator"
    )
    parser.add_argument("--steps", type=NATURAL, default=400, help="updates of the run")
    return reporting.parsed(parser, argv)


def command(args, name: str) -> list[str]:
    objective = "--strategy 1 --exemplar-len 40 --batch-size 16 --accumulate 2"
    if not args.full:
        objective = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0"
    flags = f"--size tiny --no-predict --device cpu --lr 1e-3 --epochs 1000 {objective}"
    return [
        sys.executable,
        str(ROOT / "train_glove_t5.py"),
        *flags.split(),
        "--name",
        name,
        "--workdir",
        args.workdir,
        "--max-steps",
        str(args.steps),
        "--save-every",
        "5",
        "--eval-every",
        str(args.steps // 2 or 1),
        "--log-every",
        "1",
        "--seed",
        str(args.seed),
    ]


def in_peace(args, name: str) -> None:
    """The run to its end. Raises `UserError` where it fails; what it said stands on the terminal."""
    if code := subprocess.run(command(args, name), stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the run {name} failed by itself (exit code {code}); why stands above")


def last_step(folder: Path) -> int:
    """The newest logged update."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill_once(args, folder: Path, rng: random.Random, in_save: bool) -> tuple[str, int] | None:
    """Start, wait until it trains, kill. (what was hit, step), or None where it finished first."""
    before = last_step(folder)
    process = subprocess.Popen(
        command(args, folder.name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and last_step(folder) <= before:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1.5))
    while in_save and process.poll() is None and not any((folder / "checkpoints").glob(".tmp-step-*")):
        time.sleep(0.0005)
    if process.poll() is not None:
        if process.returncode:
            raise UserError(f"the run failed by itself: {process.communicate()[1][-400:]}")
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    hit = "save" if any((folder / "checkpoints").glob(".tmp-step-*")) else "step"
    return hit, last_step(folder)


def main(argv=None):
    args = parse_args(argv)
    import storage

    paths = Paths(args.workdir)
    file = paths.results / f"kill_resume{'_full' * args.full}.json"
    refuse_existing([file], args.overwrite)
    whole, cut = (paths.saved / "glove-t5" / f"kill-resume-{n}" for n in ("whole", "cut"))
    for folder in (whole, cut):
        if folder.exists() and not args.overwrite:
            raise UserError(f"{folder}: already there; add --overwrite to replace it")
        shutil.rmtree(folder, ignore_errors=True)
    in_peace(args, whole.name)
    rng = random.Random(args.seed)
    hits = []
    while len(hits) < args.kills:
        hit = kill_once(args, cut, rng, in_save=len(hits) % 2 == 1)
        if hit is None:
            print(f"finished before kill {len(hits) + 1}; more --steps leave room for more kills")
            break
        hits.append(hit)
        print(f"kill {len(hits):>2} during a {hit[0]}, at update {hit[1]}", flush=True)
    if not hits:
        raise UserError("the run was never killed; give it more --steps")
    in_peace(args, cut.name)
    sums = {f.name: storage.sha256(f / "model.safetensors") for f in (whole, cut)}
    logs = [(f / "metrics.jsonl").read_text(encoding="utf-8") for f in (whole, cut)]
    result = {
        "kills": hits,
        "in_saves": sum(h[0] == "save" for h in hits),
        "weights": sums,
        "equal": len(set(sums.values())) == 1,
        "logs_equal": logs[0] == logs[1],
    }
    storage.write_json(file, result)
    for name, digest in sums.items():
        print(f"{digest}  {name}")
    weights = "equal" if result["equal"] else "DIFFER"
    logs = "equal" if result["logs_equal"] else "DIFFER"
    print(
        f"{len(hits)} kills, {result['in_saves']} of them inside a save: final weights {weights}, logs {logs}"
    )
    if not (result["equal"] and result["logs_equal"]):
        raise UserError("the killed run did not end as the uninterrupted one")


if __name__ == "__main__":
    run(main)
