"""Seconds, memory and distance from the floor of a generator's training step: the published way, and ours.

  python benchmarks/train_step.py --shape glove-mini
  python benchmarks/train_step.py --shape t5 --batch-size 2 --repeats 3

All ways read the same dialogues, exemplars and labels, and take turns in one process; weights are random,
sizes are the real ones, nothing is downloaded. `published`: benchmarks/published.py. `prepend` and `pool`:
this project's step (updates.Update) with its scripts' defaults; the exemplars stand before the dialogue, or
are one vector: out of a table where their encoder is frozen (t5), each distinct string once where it is
trained along. Of the causal language model `plain` is transformers' own loss (SDPA, logits of every
position), beside ours with either attention: a training takes eager on a CPU and SDPA on a GPU.

seconds: median of the repeats. GiB: the peak of a process of its own that makes two updates (on CUDA, of the
device). floor: the step's matrix products alone, each as often as in the step; share: how much of the step's
time that is. Written to results/benchmarks/train_step_SHAPE.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import COUNT, NATURAL, Paths, UserError, check, run

#: the ways of each shape, the one that the others are compared with first
WAYS = {
    "glove-mini": ("published", "prepend", "pool"),
    "glove": ("published", "prepend", "pool"),
    "t5": ("published", "prepend", "pool"),
    "causal": ("plain", "ours-eager", "ours-sdpa"),
    "tiny": ("published", "prepend", "pool"),
    "tiny-causal": ("plain", "ours-eager", "ours-sdpa"),
}
BATCH = {"glove-mini": 32, "glove": 32, "t5": 2, "causal": 12, "tiny": 4, "tiny-causal": 4}


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("--shape", choices=list(WAYS), default="glove-mini", help="sizes of the models")
    add("--ways", nargs="+", help="some of the shape's ways; one alone says its memory and nothing else")
    add(
        "--batch-size",
        type=COUNT,
        default=0,
        help="examples in an update; 0: by shape, of t5 2, where the published way has 8",
    )
    add("--repeats", type=NATURAL, default=5, help="updates by each way, after one that warms up")
    add("--threads", type=COUNT, default=0, help="processor threads; 0: torch's default")
    add(
        "--padding",
        choices=["longest", "full"],
        default="longest",
        help="of the published way: to the longest of the batch, or to 200 and 50 tokens",
    )
    boolean = argparse.BooleanOptionalAction
    add(
        "--critics",
        choices=["recipe", "small", "none"],
        default="recipe",
        help="in the loss: four as large as the recipes'; small: ours, of GloVe, have 0.9M weights "
        "(train_empathy_classifier.py --size small --pieces 4: they judge better than the recipes')",
    )
    add("--compile", action="store_true", help="ours with compiled layers, as the scripts' --compile")
    add("--memory", action=boolean, default=True, help="measure memory, in processes of its own")
    args = parser.parse_args(argv)
    known = WAYS[args.shape]
    unknown = [w for w in args.ways or () if w not in known]
    problems = [f"--ways {w}: --shape {args.shape} has {', '.join(known)}" for w in unknown]
    if args.critics == "small" and not args.shape.startswith("glove"):
        problems.append(
            f"--critics small: those of --shape {args.shape} have one size; glove, glove-mini have it"
        )
    check(parser, args, problems)
    args.ways = list(dict.fromkeys(args.ways or known))
    args.batch_size = args.batch_size or BATCH[args.shape]
    return args


def peak_gib(device) -> float:
    """The most memory that this process has held, or the device where that is a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # not getrusage: its peak can be that of the process which started this one
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def memory_alone(args, way: str) -> float:
    """`peak_gib` of one way in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "--shape", args.shape, "--ways", way]
    for flag in ("batch_size", "threads", "padding", "critics", "device", "precision", "seed", "workdir"):
        words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    words += ["--compile"] if args.compile else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "ended").splitlines()[-1]
        raise UserError(f"{way}, in a process of its own: {why}")
    return float(done.stdout.split()[-2])


def measure(args, session, memory: dict[str, float]) -> dict:
    """{way: its figures}, printed as a table."""
    import torch

    from benchmarks.steps import Floor, build_ways

    steps = build_ways(args, session)
    critics = {"recipe": "four critics", "small": "four critics, ours small", "none": "no critics"}
    said = critics["none" if "causal" in args.shape else args.critics]
    where = f"{torch.get_num_threads()} threads, {session.device}, {session.precision}"
    print(f"{args.shape}, batch {args.batch_size}, {said}, {where}{', compiled' * args.compile}")
    taken: dict[str, list[float]] = {way: [] for way in args.ways}
    for repeat in range(args.repeats + 1):
        for way, step in steps.items():
            reporting.settle()
            began = time.perf_counter()
            step()
            reporting.settle()
            if repeat:  # the first one warms up
                taken[way].append(time.perf_counter() - began)
    figures: dict[str, dict] = {}
    print("way         seconds  GiB    GFLOP  floor s  share")
    for way, step in steps.items():
        floor = Floor(session)
        with floor:
            step()
        seconds = statistics.median(taken[way])
        figures[way] = {"seconds": seconds, "gib": memory.get(way), "gflop": floor.gflop}
        floor_seconds = floor.seconds()
        figures[way] |= {"floor_seconds": floor_seconds, "repeats": taken[way]}
        share = figures[way]["share_of_floor"] = floor_seconds / seconds
        gib = f"{memory[way]:.2f}" if way in memory else "-"
        print(
            f"{way:<10}  {seconds:>7.4f}  {gib:>5}  {floor.gflop:>5.0f}  {floor_seconds:>7.4f}  {share:.2f}"
        )
    return figures


def compare(figures: dict, ways: list[str]) -> None:
    """How much less each way takes than the first."""
    base = figures[ways[0]]
    for way in ways[1:]:
        own = figures[way]
        own["times_faster"] = base["seconds"] / own["seconds"]
        text = f"{way}: {own['times_faster']:.2f}x faster than {ways[0]}"
        if own["gib"]:
            own["times_less_memory"] = base["gib"] / own["gib"]
            text += f", {own['times_less_memory']:.2f}x less memory"
        print(text)


def main(argv=None):
    args = parse_args(argv)
    memory, alone = {}, len(args.ways) == 1
    if not alone:
        file = reporting.target(Paths(args.workdir), f"train_step_{args.shape}", args.overwrite)
        memory = {way: memory_alone(args, way) for way in args.ways} if args.memory else {}
    import torch

    from session import Session

    if args.threads:
        torch.set_num_threads(args.threads)
    session = Session(args.device, args.precision, args.seed)
    if alone:
        return print_memory(args, session)
    figures = measure(args, session, memory)
    compare(figures, args.ways)
    reporting.write(file, vars(args), session.device.type, {"ways": figures})


def print_memory(args, session) -> None:
    """Two updates of the only way that was asked for: the optimizer's state is there from the second on."""
    from benchmarks.steps import build_ways

    (step,) = build_ways(args, session).values()
    step()
    step()
    print(f"{args.ways[0]}: peak {peak_gib(session.device):.3f} GiB")


if __name__ == "__main__":
    run(main)
