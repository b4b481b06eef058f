"""adamix env: what a bug report needs to say about this machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence

import torch

from .._backends import backends

PACKAGES = ("adamix_kernels", "torch", "triton", "transformers", "accelerate", "safetensors", "peft", "datasets")


def describe() -> dict:
    """Versions (None where not installed), the devices, and the state of each backend."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "backends": {name: dataclasses.asdict(state) for name, state in backends().items()},
    }


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
