"""What a result depends on beside its recipe: device, threads, seed, versions.

Nothing here imports torch until a function that needs it is called.
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
# Of a snapshot of the surroundings, what decides the bits of a training. The kernel does not, nor
# does the number of cores as long as the number of threads is the same.
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
    """Return how many cores this process may use: its affinity, cut by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores or 1, max(1, int(allowed) // int(period)))
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
    """Return the versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_flags() -> frozenset[str] | None:
    """Return the features that Linux reports of the CPU, None elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = info.read_text().splitlines()
    # "flags" on x86, "Features" on Arm.
    found = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(found[0].split(":", 1)[1].split()) if found else None


def dot_products(flags: frozenset[str] | None) -> list[str]:
    """Return the features that ONNX Runtime's int8 kernels need to be much faster than float."""
    return ["unknown"] if flags is None else sorted(flags & _DOT_PRODUCTS)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def accelerator(compute: ComputeRecipe) -> Accelerator:
    """Return an Accelerator that owns device and precision, with the threads set.

    Raises:
        UserError: the device that was asked for is absent.
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
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(compute.threads or max(1, available_cpus() // here))
    # Accelerate keeps one state per process; two runs in it may differ in precision. The part that
    # holds the connection between processes stays.
    AcceleratorState._reset_state(reset_partial_state=processes() == 1)  # noqa: SLF001
    return Accelerator(
        cpu=compute.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no" if compute.precision == "fp32" else compute.precision,
    )


def processes() -> int:
    """Return how many processes share this training, as `accelerate launch` and torchrun say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def first_process_first(compute: ComputeRecipe) -> Iterator[None]:
    """Let the first of several processes through the block, then the others, to its end or error.

    All of them have to come here.
    """
    if processes() == 1:
        yield
        return
    ours = accelerator(compute)
    if not ours.is_main_process:
        ours.wait_for_everyone()
    try:
        yield
    finally:
        if ours.is_main_process:
            ours.wait_for_everyone()


def peak_memory_mb() -> dict[str, float]:
    """Return the most memory that this process has held: resident, and on its GPU if it has one."""
    import resource

    import torch

    # Kilobytes on Linux, bytes on macOS.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    found = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        found["vram"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def hub_or_its_cache() -> None:
    """Let the hub's libraries read their caches alone if the hub does not answer in seconds.

    They would find that out themselves after half a minute of retries.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except OSError as error:
        logger.info("the hub does not answer (%s); looking into the cache", type(error).__name__)
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers says about a model inside the block: we say it ourselves."""
    from transformers.utils import logging as theirs

    verbosity = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)


@contextmanager
def without_message(logger_name: str | None, words: str) -> Iterator[None]:
    """Silence one message of a library's logger (None: the root) inside the block."""

    def keep(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    theirs = logging.getLogger(logger_name)
    theirs.addFilter(keep)
    try:
        yield
    finally:
        theirs.removeFilter(keep)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators for the block and put their states back afterwards."""
    import torch

    # Models are made on the CPU; without devices there is no warning about several of them.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event, so that an update is never cut in two; the second stops.

    Only the main thread can own a signal handler; elsewhere Python's own behaviour stays.
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
