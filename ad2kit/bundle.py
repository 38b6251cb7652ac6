"""What a Bento is made of beside the artefact: service, requirements, and the project's wheel."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ad2kit import __version__
from ad2kit.recipe import recipes_folder


def service_file() -> Path:
    """Return the BentoML service, in an installed wheel or in a checkout."""
    here = Path(__file__).parent
    installed = here / "_serving" / "service.py"
    return installed if installed.is_file() else here.parent / "serving" / "service.py"


def onnxruntime_distribution() -> str:
    """Return which of the two distributions of onnxruntime is installed."""
    return "onnxruntime-gpu" if _installed("onnxruntime-gpu") else "onnxruntime"


def pinned_requirements() -> list[str]:
    """Return what a serving process needs beside ad2kit, each pinned to the installed version.

    The closure is ours and not BentoML's lock, which would need the network at build time.
    """
    wanted = [onnxruntime_distribution(), *(metadata.requires("ad2kit") or ())]
    pins: dict[str, str] = {}
    while wanted:
        requirement = Requirement(wanted.pop())
        # Our own `serve` extra counts, other packages' extras only where they are asked for.
        active = [
            extra
            for extra in ("", "serve", *requirement.extras)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        name = requirement.name.lower().replace("_", "-")
        if not active or name in pins or name == "ad2kit":
            continue
        distribution = metadata.distribution(name)
        pins[name] = distribution.version
        for text in distribution.requires or ():
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                child.marker = None
                wanted.append(str(child))
    return [f"{name}=={version.split('+')[0]}" for name, version in sorted(pins.items())]


def own_wheel(folder: Path) -> Path:
    """Write the wheel of the installed ad2kit, editable or not, and return its path.

    Deterministic: the same code makes the same bytes, so that a Bento's tag can be too.
    """
    package_folder, info = Path(__file__).parent, f"ad2kit-{__version__}.dist-info"
    files = {
        f"ad2kit/{path.relative_to(package_folder)}": path.read_bytes()
        for path in package_folder.rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed", ".html")
    }
    for name, source in (("_recipes", recipes_folder()), ("_serving", service_file().parent)):
        files |= {
            f"ad2kit/{name}/{path.relative_to(source)}": path.read_bytes()
            for path in source.rglob("*")
            if path.suffix in (".py", ".yaml", ".html", ".json")
        }
    distribution = metadata.distribution("ad2kit")
    for name in ("METADATA", "entry_points.txt"):
        files[f"{info}/{name}"] = (distribution.read_text(name) or "").encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: ad2kit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    rows = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}\n")
    files[f"{info}/RECORD"] = ("".join(rows) + f"{info}/RECORD,,\n").encode()
    path = folder / f"ad2kit-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
