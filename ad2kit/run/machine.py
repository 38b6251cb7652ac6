"""Device, threads, seed and versions: the conditions of a result that no recipe holds.

torch is imported inside the functions that need it.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ad2kit.run.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import Accelerator

    from ad2kit.run.sections import ComputeRecipe


logger = logging.getLogger(__name__)

VERSIONED = (
    "ad2kit",
    "accelerate",
    "bentoml",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum",
    "optimum-onnx",
    "tokenizers",
    "torch",
    "transformers",
)
# The keys of an environment snapshot that decide the bits of a training. The kernel does not
# decide them, nor does the number of cores if the number of threads is the same.
DECIDE_BITS = {
    "accelerate",
    "ad2kit",
    "compile",
    "cpu",
    "cpu_capability",
    "device",
    "numpy",
    "processes",
    "threads",
    "tokenizers",
    "torch",
    "transformers",
}
# x86 from Cascade Lake and Zen 4 on, Arm from v8.2 on.
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def available_cpus() -> int:
    """Return the number of cores in the affinity of this process, capped by the cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        quota_us, period_us = quota.read_text().split()
        if quota_us != "max":
            cores = min(cores or 1, max(1, int(quota_us) // int(period_us)))
    return cores or 1


def environment(threads: int, device: str = "cpu", processes: int = 1) -> dict[str, str]:
    """Return a snapshot of hardware and versions, as plain strings."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "int8_dot_products": " ".join(dot_products(cpu_flags())) or "none",
        "cores": str(available_cpus()),
        "device": device,
        "threads": str(threads),
        "processes": str(processes),
        **versions(VERSIONED),
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return name -> version for the distributions that are installed."""
    installed = {}
    for name in distributions:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def cpu_flags() -> frozenset[str] | None:
    """Return the CPU features that Linux reports; None on other systems."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = info.read_text().splitlines()
    # "flags" on x86, "Features" on Arm.
    flag_lines = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(flag_lines[0].split(":", 1)[1].split()) if flag_lines else None


def dot_products(flags: frozenset[str] | None) -> list[str]:
    """Return the int8 dot-product features among ``flags``, sorted; ``["unknown"]`` for None.

    With one of them ONNX Runtime's int8 kernels are much faster than float kernels.
    """
    return ["unknown"] if flags is None else sorted(flags & _DOT_PRODUCTS)


def may_overflow_8_bits() -> bool:
    """Whether this CPU may overflow when it multiplies uint8 by int8; True if that is not known.

    Without dot products, x86 adds two products of 8-bit numbers in 16 bits.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    flags = cpu_flags()
    return flags is None or not dot_products(flags)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def accelerator(compute: ComputeRecipe) -> Accelerator:
    """Return an Accelerator for the device and the precision; also set torch's threads.

    Raises:
        UserError: the device of the recipe is absent.
        MissingExtra: torch or accelerate is not installed.
    """
    try:
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "torch", extra="cpu") from error

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"the recipe asks for device 'cuda', but torch {torch.__version__} sees no CUDA device",
            hint="set compute.device=cpu, or see `ad2kit doctor`",
        )
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(compute.threads or max(1, available_cpus() // local_processes))
    # Accelerate keeps one state per process, but two runs in one process may differ in precision.
    # The partial state, which holds the connection between processes, is kept.
    AcceleratorState._reset_state(reset_partial_state=processes() == 1)  # noqa: SLF001
    return Accelerator(
        cpu=compute.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no" if compute.precision == "fp32" else compute.precision,
    )


def processes() -> int:
    """Return the number of processes of this training, as set by accelerate launch or torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files and messages."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def first_process_first(compute: ComputeRecipe) -> Iterator[None]:
    """Run the block in the first of several processes, to its end or error, then in the others.

    All processes have to call this function.
    """
    if processes() == 1:
        yield
        return
    barrier = accelerator(compute)
    if not barrier.is_main_process:
        barrier.wait_for_everyone()
    try:
        yield
    finally:
        if barrier.is_main_process:
            barrier.wait_for_everyone()


def peak_memory_mb() -> dict[str, float]:
    """Return the peak memory of this process in MB: ``rss``, and ``vram`` if there is a GPU."""
    import resource

    import torch

    # Kilobytes on Linux, bytes on macOS.
    units_per_mb = 1e6 if sys.platform == "darwin" else 1e3
    peaks = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb}
    if torch.cuda.is_available():
        peaks["vram"] = torch.cuda.max_memory_allocated() / 1e6
    return peaks


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers inside the block: warnings, for ad2kit gives its own, and progress."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_message(logger_name: str | None, words: str) -> Iterator[None]:
    """Drop the messages of a logger (None: the root logger) that hold ``words``, in the block."""

    def keep(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    library_logger = logging.getLogger(logger_name)
    library_logger.addFilter(keep)
    try:
        yield
    finally:
        library_logger.removeFilter(keep)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block and restore its state afterwards."""
    import torch

    # Models are created on the CPU. With no devices named, torch does not warn about many GPUs.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Make the first Ctrl-C set an event, so that it interrupts no update; the second one stops.

    Only the main thread can own a signal handler. In other threads Python's behaviour stays.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(_signal: int, _frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def onnxruntime_distribution() -> str:
    """Return which of the two distributions of onnxruntime is installed."""
    return "onnxruntime-gpu" if _installed("onnxruntime-gpu") else "onnxruntime"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
