"""What this machine offers ad2kit, and what to do about what is missing."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

from ad2kit.records import Part
from ad2kit.runtime import available_cpus, environment


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
        Finding(name="cpu", value=f"{facts['cpu']}, {facts['cores']} cores for this process"),
        Finding(
            name="disk",
            value=f"{free / 1e9:.1f} GB free in {Path.cwd()}",
            advice="a run of a base-size teacher takes about 3 GB" if free < 3e9 else "",
        ),
        Finding(
            name="versions",
            value=", ".join(
                f"{name} {facts[name]}" for name in facts
                if name not in ("python", "platform", "cpu", "cores", "device", "threads")
            ),
            advice=f"missing: {', '.join(missing)}; pip install 'ad2kit[cpu]'" if missing else "",
        ),
        _torch(),
        *_onnxruntime(),
    ]  # fmt: skip


def _torch() -> Finding:
    try:
        import torch
    except ModuleNotFoundError:
        return Finding(
            name="torch", value="not installed",
            advice="fine for serving; to train: pip install 'ad2kit[cpu]'",
        )  # fmt: skip
    if torch.cuda.is_available():
        return Finding(name="torch", value=f"{torch.__version__}, {torch.cuda.get_device_name()}")
    return Finding(name="torch", value=f"{torch.__version__}, no CUDA device, training on the CPU")


def _onnxruntime() -> list[Finding]:
    owners = sorted(
        {name.lower() for name in metadata.packages_distributions().get("onnxruntime", [])}
    )
    if not owners:
        return [
            Finding(
                name="onnxruntime", value="not installed",
                advice="pip install 'ad2kit[cpu]' or 'ad2kit[gpu]'",
            )
        ]  # fmt: skip
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
        works = _makes_a_session(provider)
        findings.append(
            Finding(
                name=provider,
                value={True: "makes a session", False: "is built in, but makes no session",
                       None: "is built in; not tried without onnx"}[works],
                advice="its libraries (CUDA, cuDNN, ...) are missing or of another version"
                if works is False and provider.startswith(("CUDA", "Tensorrt"))
                else "",
            )
        )  # fmt: skip
    return findings


def _makes_a_session(provider: str) -> bool | None:
    """Try a provider on a graph of one node; None where onnx, to make the graph, is missing."""
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
    except Exception:
        return False
    return bool(session.get_providers()[0] == provider)
