"""adamix env: what a bug report needs to say about this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from .. import _build, _extension
from .._backends import backends

PACKAGES = ("adamix_kernels", "torch", "triton", "transformers", "accelerate", "safetensors", "peft", "datasets")


def describe() -> dict[str, Any]:
    """Versions (None where not installed), the devices, the C++/CUDA library, and the state of each backend."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cuda_library": library(),
        "backends": {name: dataclasses.asdict(state) for name, state in backends().items()},
    }


def library() -> dict[str, Any]:
    """The C++/CUDA library: its path, why it is not loaded, what the build wrote down, and whether csrc/ is newer."""
    path, built = _extension.library_path(), _extension.record() if _extension.library_path() else {}
    changed = False
    if "sources" in built:
        with contextlib.suppress(_build.BuildError):
            changed = _build.sources_fingerprint(_build.source_folder()) != built["sources"]
    return {
        "path": str(path) if path else None,
        "problem": _extension.load_problem(),
        "architectures": built.get("architectures"),
        "nvcc": built.get("nvcc"),
        "torch": built.get("torch"),
        "csrc_changed": changed,
    }


def _library_in_words(facts: dict[str, Any]) -> str:
    if facts["problem"]:
        return str(facts["problem"])
    if facts["architectures"] is None:
        return f"{facts['path']}, for " + ("the CPU" if _extension.on_host() else torch.ops.adamix_cuda.build_info())
    words = (
        f"for {', '.join(facts['architectures'])}, by nvcc {facts['nvcc']} with the headers of torch {facts['torch']}"
    )
    return words + ("; csrc/ has changed since" if facts["csrc_changed"] else "")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="adamix env", description="Versions, device and backends.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    facts = describe()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"python {facts['python']} on {facts['platform']}, {facts['threads']} threads")
    print("device: " + ", ".join(facts["devices"]))
    for name, version in facts["versions"].items():
        print(f"{name:16}{version or 'not installed'}")
    print("C++/CUDA library: " + _library_in_words(facts["cuda_library"]))
    for name, state in facts["backends"].items():
        ops = ", ".join(state["ops"]) or "no ops"
        print(f"backend {name:10}{'usable' if state['usable'] else 'not usable'}: {state['reason']} ({ops})")
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "adamix_kernels":
            from .._version import __version__

            return __version__
        return None
