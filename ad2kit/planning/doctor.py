"""What this machine offers ad2kit, and what to do about what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from ad2kit.run.machine import available_cpus, cpu_flags, dot_products, environment
from ad2kit.run.records import Part

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
    """One thing that was looked at; ``advice`` is empty where nothing has to be done."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at versions, cores, disk, torch and ONNX Runtime; nothing is changed."""
    facts = environment(threads=available_cpus())
    missing = [
        name for name in ("torch", "transformers", "optimum-onnx", "bentoml") if name not in facts
    ]
    free = shutil.disk_usage(Path.cwd()).free
    return [
        Finding(name="python", value=f"{facts['python']} at {sys.executable}"),
        _cpu(facts["cpu"]),
        _eight_bit(cpu_flags()),
        Finding(
            name="disk",
            value=f"{free / 1e9:.1f} GB free in {Path.cwd()}",
            advice="a run of a base-size teacher takes about 3 GB" if free < 3e9 else "",
        ),
        Finding(
            name="versions",
            value=", ".join(f"{name} {facts[name]}" for name in facts if name not in _NO_VERSIONS),
            advice=f"missing: {', '.join(missing)}; pip install 'ad2kit[cpu]'" if missing else "",
        ),
        _torch(),
        *_onnxruntime(),
    ]


def _cpu(name: str) -> Finding:
    """Compare the machine's cores with those that this process may use."""
    machine, allowed = os.cpu_count() or 1, available_cpus()
    return Finding(
        name="cpu",
        value=f"{name}, {allowed} of {machine} cores for this process; ad2kit starts {allowed} "
        "threads unless compute.threads says otherwise",
        # A pool that is sized by the machine is what a container's limit turns into waiting.
        advice="other programs here may start as many threads as the machine has cores: set "
        f"OMP_NUM_THREADS={allowed} for them"
        if allowed < machine
        else "",
    )


def _eight_bit(flags: frozenset[str] | None) -> Finding:
    """Say whether the CPU multiplies 8-bit numbers faster than floats."""
    if flags is None:
        return Finding(name="int8", value="the features of this CPU are unknown")
    found = dot_products(flags)
    return Finding(
        name="int8",
        value=f"the CPU has {', '.join(found)}" if found else "no 8-bit dot products in the CPU",
        advice="" if found else "int8 may be no faster than fused here: look at `ad2kit bench`",
    )


def _torch() -> Finding:
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


def _onnxruntime() -> list[Finding]:
    owners = sorted(
        {name.lower() for name in metadata.packages_distributions().get("onnxruntime", [])}
    )
    if not owners:
        return [
            Finding(
                name="onnxruntime",
                value="not installed",
                advice="pip install 'ad2kit[cpu]' or 'ad2kit[gpu]'",
            )
        ]
    clash = len(owners) > 1
    findings = [
        Finding(
            name="onnxruntime",
            value=f"the module belongs to {' and '.join(owners)}",
            advice=f"they overwrite each other: pip uninstall {' '.join(owners)}, then install one"
            if clash
            else "",
        )
    ]
    import onnxruntime

    for provider in onnxruntime.get_available_providers():
        reason = _why_no_session(provider)
        findings.append(
            Finding(
                name=provider,
                value="makes a session"
                if reason == ""
                else "is built in, but "
                + ("was not tried: no onnx here" if reason is None else f"makes none: {reason}"),
                advice="its libraries (CUDA, cuDNN, TensorRT) are missing or of another version "
                "than this onnxruntime was built for; sessions that ask for it are refused"
                if reason
                else "",
            )
        )
    return findings


def _why_no_session(provider: str) -> str | None:
    """Try a provider on a graph of one node: "" if it works, else why not; None without onnx."""
    import onnxruntime

    try:
        from onnx import TensorProto, helper
    except ModuleNotFoundError:
        return None
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider]
        )
    except Exception as error:
        # onnxruntime's exceptions share no base class of their own; the reason is told.
        return str(error).partition("\n")[0] or type(error).__name__
    found = session.get_providers()[0]
    return "" if found == provider else f"the session runs on {found}"
