"""What the benchmarks share: their door, ways that take turns, a printed table, and a json under
results/benchmarks/. Nothing heavy is imported with it."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from options import Parser, Paths, add_common, add_device, check, make_parser, refuse_existing


def flags(doc: str | None) -> Parser:
    """A parser with the flags of all benchmarks."""
    parser = make_parser(doc)
    add_common(parser)
    add_device(parser)
    return parser


def parsed(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, checked as every script checks it."""
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def begin(args: argparse.Namespace, name: str) -> tuple[Any, Paths, Path]:
    """(the session, the places, the file of the benchmark `name`), by its flags; see `target`."""
    from session import Session
    from settings import device_flags

    paths = Paths(args.workdir)
    file = target(paths, name, args.overwrite)
    return Session(**device_flags(args)), paths, file


def seconds(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The fewest seconds of each way by the clock, and what it gave; the ways take turns `repeats` times.

    The fewest: other programs can only add to it, and so the first of several turns warms up. One turn alone
    is cold, and what all ways share is paid by the first.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for turn in range(repeats):
        for name, way in ways.items():
            say(f"{name}, turn {turn + 1} of {repeats}")
            settle()
            began = time.perf_counter()
            given[name] = way()
            settle()
            taken[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in taken.items()}, given


def settle() -> None:
    """Wait until a GPU, where one is in use, has done all that it was told."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median seconds of one small call: by the clock, or by the device's own where that is a GPU.

    There the call is recorded as many times as fill two milliseconds and played back as one, so that what is
    measured is the device and not the time that it takes to launch a kernel.
    """
    import torch

    if device != "cuda":
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    settle()
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their kernels, and their memory is there
            work()
        settle()
        began = time.perf_counter()
        work()
        settle()
        calls = max(1, min(100, round(2e-3 / (time.perf_counter() - began))))
        graph.capture_begin()  # not torch.cuda.graph, which collects garbage each time
        for _ in range(calls):
            work()
        graph.capture_end()
    settle()
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        settle()
        taken.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(taken)


def processor_seconds(work: Callable[[], Any]) -> float:
    """Of one call, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def say(text: str) -> None:
    """Progress, beside the results."""
    print(f"  {text}", file=sys.stderr, flush=True)


def hardware(device: str) -> dict[str, Any]:
    """What was measured on."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(": ")[2] if models else name
    found = {
        "processor": name,
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left_last: bool = False) -> str:
    """Rows of text and numbers under their columns; numbers are rounded to what can be read. `left_last`: the
    last column is text."""
    cells = [list(columns)] + [[cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        rest = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        rest[-1] = row[-1] if left_last else rest[-1]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def target(paths: Paths, name: str, overwrite: bool, elsewhere: str = "") -> Path:
    """Where a benchmark's json goes. Raises `UserError` where one is there already; `elsewhere`: what would
    spare it."""
    file = paths.results / "benchmarks" / f"{name}.json"
    refuse_existing([file], overwrite, elsewhere)
    return file


def write(file: Path, flags: dict, device: str, result: dict[str, Any]) -> None:
    """The figures, with the flags and the machine that they are of."""
    import storage

    storage.write_json(file, {"flags": flags, "hardware": hardware(device), **result})
    print(f"written: {file}")


def knows_bf16(device: str) -> bool:
    """Whether bf16 has instructions of its own there."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))
