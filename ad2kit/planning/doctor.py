"""The doctor command: what this machine offers to ad2kit, and advice on what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from ad2kit.run.errors import MissingExtra
from ad2kit.run.machine import available_cpus, cpu_flags, dot_products, environment
from ad2kit.run.records import Part

# Facts of the environment that are not versions of packages.
_NO_VERSIONS = {
    "python",
    "platform",
    "cpu",
    "cores",
    "device",
    "threads",
    "processes",
    "int8_dot_products",
}


class Finding(Part):
    """One result of the examination; ``advice`` is empty if there is nothing to do."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Examine versions, cores, disk, torch and ONNX Runtime, without changing anything."""
    facts = environment(threads=available_cpus())
    missing = [name for name in ("torch", "transformers", "onnx", "bentoml") if name not in facts]
    free_bytes = shutil.disk_usage(Path.cwd()).free
    return [
        Finding(name="python", value=f"{facts['python']} at {sys.executable}"),
        _cpu(facts["cpu"]),
        _eight_bit(cpu_flags()),
        Finding(
            name="disk",
            value=f"{free_bytes / 1e9:.1f} GB free in {Path.cwd()}",
            advice="a run of a base-size teacher takes about 3 GB" if free_bytes < 3e9 else "",
        ),
        Finding(
            name="versions",
            value=", ".join(f"{name} {facts[name]}" for name in facts if name not in _NO_VERSIONS),
            advice=f"missing: {', '.join(missing)}; pip install 'ad2kit[cpu]'" if missing else "",
        ),
        _torch(),
        _exporter(),
        *_onnxruntime(),
    ]


def _cpu(name: str) -> Finding:
    """Compare the machine's cores with those that this process may use."""
    machine_cores = os.cpu_count() or 1
    allowed_cores = available_cpus()
    advice = ""
    if allowed_cores < machine_cores:
        # Under a container's limit, a thread for each core of the machine only makes them wait.
        advice = (
            "other programs here may start as many threads as the machine has cores: set "
            f"OMP_NUM_THREADS={allowed_cores} for them"
        )
    return Finding(
        name="cpu",
        value=f"{name}, {allowed_cores} of {machine_cores} cores for this process; ad2kit starts "
        f"{allowed_cores} threads unless compute.threads says otherwise",
        advice=advice,
    )


def _eight_bit(flags: frozenset[str] | None) -> Finding:
    """Tell whether the CPU has instructions that multiply 8-bit numbers faster than floats."""
    if flags is None:
        return Finding(name="int8", value="the features of this CPU are unknown")
    instructions = dot_products(flags)
    if instructions:
        return Finding(name="int8", value=f"the CPU has {', '.join(instructions)}")
    return Finding(
        name="int8",
        value="no 8-bit dot products in the CPU",
        advice="variants of 8 bits may be no faster than fused here: look at `ad2kit bench`",
    )


def _torch() -> Finding:
    """Tell which torch is installed, and whether it sees a CUDA device."""
    try:
        import torch
    except ModuleNotFoundError:
        return Finding(
            name="torch",
            value="not installed",
            advice="fine for serving; to train: pip install 'ad2kit[cpu]'",
        )
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()
        return Finding(
            name="torch",
            value=f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, "
            f"{torch.cuda.get_device_name()}",
        )
    if torch.version.cuda:
        return Finding(
            name="torch",
            value=f"{torch.__version__}, built for CUDA, but sees no device",
            advice="look at nvidia-smi: no card, no driver, or an older driver than CUDA "
            f"{torch.version.cuda} needs",
        )
    return Finding(name="torch", value=f"{torch.__version__}, no CUDA device, training on the CPU")


def _exporter() -> Finding:
    """Tell which exporter makes the fp32 graph, and why it is this one."""
    try:
        from ad2kit.exporting.export import exporter
    except MissingExtra as error:
        return Finding(
            name="exporter",
            value=f"none: {error.message}",
            advice=f"fine for serving; to export: {error.hint}",
        )
    exporter_name, reason = exporter()
    return Finding(name="exporter", value=f"{exporter_name}, because {reason}")


def _onnxruntime() -> list[Finding]:
    """Tell which packages own the module onnxruntime, and try each of its providers."""
    packages = sorted(
        {name.lower() for name in metadata.packages_distributions().get("onnxruntime", [])}
    )
    if not packages:
        return [
            Finding(
                name="onnxruntime",
                value="not installed",
                advice="pip install 'ad2kit[cpu]' or 'ad2kit[gpu]'",
            )
        ]
    advice = ""
    if len(packages) > 1:
        advice = f"they overwrite each other: pip uninstall {' '.join(packages)}, then install one"
    owners = f"the module belongs to {' and '.join(packages)}"
    import onnxruntime

    return [
        Finding(name="onnxruntime", value=owners, advice=advice),
        *map(_provider, onnxruntime.get_available_providers()),
    ]


def _provider(name: str) -> Finding:
    """Tell whether an execution provider of ONNX Runtime can open a session."""
    reason = _why_no_session(name)
    if reason is None:
        return Finding(name=name, value="is built in, but was not tried: no onnx here")
    if not reason:
        return Finding(name=name, value="makes a session")
    return Finding(
        name=name,
        value=f"is built in, but makes none: {reason}",
        advice="its libraries (CUDA, cuDNN, TensorRT) are missing or of another version "
        "than this onnxruntime was built for; sessions that ask for it are refused",
    )


def _why_no_session(provider: str) -> str | None:
    """Open a session of a provider on a graph of one node.

    Returns:
        "" if it works, else the reason why not; None if onnx is not installed.
    """
    import onnxruntime

    try:
        from onnx import TensorProto, helper
    except ModuleNotFoundError:
        return None
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider]
        )
    except Exception as error:
        # Any exception, because onnxruntime's exceptions have no base class of their own.
        return str(error).partition("\n")[0] or type(error).__name__
    used_provider = session.get_providers()[0]
    return "" if used_provider == provider else f"the session runs on {used_provider}"
