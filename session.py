"""Where the numbers are computed: device, precision, processes, memory, random streams, and the signals that
end a run."""

import contextlib
import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import (
    InitProcessGroupKwargs,
    find_executable_batch_size,
    gather_object,
    recursively_apply,
    send_to_device,
    set_seed,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from options import UserError, is_out_of_memory
from runs import signals_to_stop


class Session:
    """Where the numbers are computed: device, precision, and the processes that share the work
    (`torchrun`)."""

    def __init__(
        self, device: str = "auto", precision: str = "auto", seed: int = 42, deterministic: bool = False
    ):
        """`device` auto, cpu or cuda; `precision` auto, bf16 or fp32. Raises `UserError` for a CUDA that is
        not there, and where this process already computes on another device."""
        disable_progress_bar()  # of loading and saving weights; ours stay
        set_verbosity_error()  # its load reports: what matters in them is checked where weights are loaded
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "--device cuda: this machine has no CUDA device that torch can use; use --device auto or cpu"
            )
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA starts
            torch.use_deterministic_algorithms(True)
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        again = is_initialized()  # Accelerate's state is the process's
        other = f"--device {device}: this process already computes on another device, and has one alone"
        try:
            self.accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no",  # autocast below decides, not `accelerate launch`
                # the others wait while the first writes a checkpoint, gigabytes to a slow disk
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            )
        except ValueError as error:
            if not again:
                raise
            raise UserError(f"{other} ({error})") from error
        self.device = self.accelerator.device
        if again and on_cpu != (self.device.type == "cpu"):
            raise UserError(other)
        # some containers ask for TF32 by an environment variable
        torch.set_float32_matmul_precision("highest")
        if self.device.type == "cuda":
            torch.cuda.init()  # `random_state` has the device's stream from the first call on
            # cuDNN's attention plans anew for each shape, tens of ms, and hardly two batches here have one
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0
        if precision == "auto":
            native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native else "fp32"
        self.precision = precision
        set_seed(seed)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def pinned(self, batch):
        """The batch where a GPU can fetch it while the processor goes on; as it is without one."""
        if self.device.type != "cuda":
            return batch
        return recursively_apply(torch.Tensor.pin_memory, batch)

    def move(self, batch):
        return send_to_device(batch, self.device, non_blocking=True)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the processes."""
        if self.world == 1:
            return values
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, items: list) -> list:
        """The items of all processes, one process after the other."""
        return gather_object(items) if self.world > 1 else items

    def wait(self) -> None:
        """Until all processes are here.

        Not `wait_for_everyone`: torch's barrier takes process 1 to the second GPU, with `--device cpu` too.
        """
        self.gather([])

    def gather_rows(self, vectors: Tensor, numbers: Tensor, counted: bool) -> tuple[Tensor, Tensor, int]:
        """Rows (N, E) with gradient, and a number for each, of all processes that count; and how many stand
        before one's own."""
        from torch.distributed.nn.functional import all_gather

        if not counted:
            vectors, numbers = vectors[:0], numbers[:0]
        sizes = self.accelerator.gather(torch.tensor([len(vectors)], device=self.device)).tolist()
        short = max(sizes) - len(vectors)
        padded = all_gather(nn.functional.pad(vectors, (0, 0, 0, short)))
        all_numbers = self.accelerator.gather(nn.functional.pad(numbers, (0, short))).view(self.world, -1)
        kept = [(rows[:n], ids[:n]) for rows, ids, n in zip(padded, all_numbers, sizes, strict=True)]
        return torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept]), sum(sizes[: self.rank])

    def over(self, batches: list) -> Iterator:
        """This process's share of what an evaluation reads, with a progress bar."""
        share, hidden = batches[self.rank :: self.world], None if self.main else True
        return iter(tqdm(share, desc="valid", disable=hidden, leave=False))

    def release_gaps(self) -> None:
        """Give back what the allocator of a CPU (glibc's) holds between blocks: batches of ever other shapes
        leave gaps that grow for hours."""
        if self.device.type == "cpu":
            with contextlib.suppress(OSError, AttributeError):  # another system's C library
                ctypes.CDLL(None).malloc_trim(0)

    def say(self, text: str) -> None:
        if self.main:
            with contextlib.suppress(OSError):  # reader or terminal is gone; the work goes on
                tqdm.write(text)


class Signals:
    """Signals to stop set a flag that the loop reads at a step's end; a second one exits at once.

    Ctrl-C under torchrun, and some cluster schedulers, deliver one wish twice: what comes within a second is
    not a second.
    """

    def __enter__(self):
        self.number, self._since = 0, 0.0
        self._old = {}
        with contextlib.suppress(ValueError):  # not the main thread: leave the handlers alone
            for number in signals_to_stop():
                self._old[number] = signal.signal(number, self._set)
        return self

    def _set(self, number, frame):
        if self.number and time.monotonic() - self._since > 1:
            os._exit(128 + number)
        if self.number:
            return
        self.number, self._since = number, time.monotonic()
        with contextlib.suppress(OSError):
            print(
                "\nsignal received: finishing this step, then saving (again to exit at once)",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def random_state() -> dict:
    """All random streams as plain values and tensors, fit for `torch.load(weights_only=True)`."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # on the processor alone nothing is opened on a GPU
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's device
    return state


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def own_random_stream(seed: int):
    """Draw from a stream of one's own, and leave the training's dropout stream where it was."""
    before = random_state()
    set_seed(int(seed) % 2**31)
    try:
        yield
    finally:
        set_random_state(before)


def largest_that_fits(most: int, try_out: Callable[[int], int]) -> int:
    """`try_out(n)` for the divisors n of `most`, largest first, until one does not run out of memory."""

    def smaller():
        yield from (n for n in range(most - 1, 0, -1) if most % n == 0)
        raise UserError(
            "--batch-size auto: not even one example fits; shorter sequences or a smaller model are needed"
        )

    sizes = smaller()

    def tried(size: int) -> int:
        try:
            return try_out(size)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):  # not all of these accelerate takes for one
                raise torch.OutOfMemoryError("CUDA out of memory.") from error
            raise

    return find_executable_batch_size(tried, most, reduce_batch_size_fn=lambda: next(sizes))()


@contextlib.contextmanager
def fits(what: str):
    """Where memory ends while `what` is loaded, or moved to its device, the flag that helps is named."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit into memory; give a smaller --model or --size") from error


@contextlib.contextmanager
def memory_advice(where: str, args, anew: bool = False):
    """Running out of memory names the flags to change, with their current and suggested values; `anew`: these
    are no flags that a run can go on with."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = smaller_batches(args, anew) or "shorter sequences or a smaller model"
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if advice.startswith("-") and alone and not anew and not args.batch_tokens:
            advice += ", or a new run with --batch-size auto"
        raise UserError(
            f"{where}: out of memory with --batch-size {args.batch_size} --accumulate {args.accumulate}; try "
            f"{advice} ({str(error).partition(chr(10))[0][:120]})"
        ) from error


def smaller_batches(args, anew: bool) -> str:
    """The flags of as many examples an update in smaller micro-batches; empty where there are none."""
    size, tokens, count = args.batch_size, args.batch_tokens, args.accumulate
    factor = next((n for n in range(2, size + 1) if size % n == 0 and tokens % n == 0), None)
    if factor is None:
        return ""
    bound = f" --batch-tokens {tokens // factor}" if tokens else ""
    where = " in a new run (this one's loss depends on the micro-batch)" * anew
    flags = f"--batch-size {size // factor} --accumulate {count * factor}{bound}"
    return f"{flags}{where}, as many examples an update"


def memory_held() -> tuple[float, float]:
    """(the most that this process has held, what the machine has), in GiB; (0, 0) where it does not tell."""
    try:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return held / 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ImportError, ValueError, OSError):
        return 0.0, 0.0


def memory_note(session: Session, args, anew: bool) -> str:
    """What to say where little memory is left: on a CPU the system ends what asks for more without a word."""
    held, there = memory_held()
    held *= session.world
    if session.device.type != "cpu" or held <= 0.8 * there:
        return ""
    smaller = smaller_batches(args, anew)
    return (
        f"note: so far this has taken up to {held:.1f} of the machine's {there:.1f} GiB of memory; if a "
        "longer batch needs more, the system ends it without a word"
        + f". {smaller}, take less"
        * bool(smaller)
    )
