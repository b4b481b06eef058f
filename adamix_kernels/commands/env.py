"""adamix env: what a bug report needs to say about this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _build, _extension
from ..ops import _node
from ..verifying import backends, mode
from ..verifying.verdicts import cache_folder

PACKAGES = (
    *("adamix_kernels", "torch", "triton", "numpy", "transformers", "tokenizers", "huggingface_hub", "accelerate"),
    *("safetensors", "peft", "datasets", "bitsandbytes"),
)


def describe() -> dict[str, Any]:
    """Versions (None where not installed), the machine, the C++/CUDA library, what "auto" goes by, and the state of
    each backend with its verdicts.

    memory_gib: of the machine. threads: that torch computes with. cuda: the versions that torch is built with and that
    the driver runs, None where there is none.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "processors": _build.processors(),
        "memory_gib": _memory(),
        "threads": torch.get_num_threads(),
        "devices": [_gpu(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cuda": {"torch": torch.version.cuda, "driver": _build.driver_cuda()},
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda_library": library(),
        "auto": {"mode": mode(), "cache": _short(cache_folder())},
        "backends": {name: dataclasses.asdict(state) for name, state in backends().items()},
    }


def library() -> dict[str, Any]:
    """The C++/CUDA library: its path, why it is not loaded, what the build wrote down, whether csrc/ is newer, and
    whether autograd's nodes are in C++ (node), or why a module that is there is not used (node_problem)."""
    path, built = _extension.library_path(), _extension.record() if _extension.library_path() else {}
    changed = False
    if "sources" in built:
        with contextlib.suppress(_build.BuildError):
            changed = _build.sources_fingerprint(_build.source_folder()) != built["sources"]
    node, refused = _node.find()
    return {
        "path": str(path) if path else None,
        "problem": _extension.load_problem(),
        "architectures": built.get("architectures"),
        "nvcc": built.get("nvcc"),
        "torch": built.get("torch"),
        "csrc_changed": changed,
        "node": node is not None,
        "node_problem": refused,
    }


def in_words(facts: dict[str, Any]) -> str:
    """`describe()` as a block to paste into an issue."""
    cuda, missing = facts["cuda"], [name for name, version in facts["versions"].items() if version is None]
    rows = {
        "python": f"{facts['python']} on {facts['platform']}",
        "processor": f"{facts['cpu'] or 'unknown'}, {facts['processors']} usable, torch on {facts['threads']} threads",
        "memory": f"{facts['memory_gib']} GiB" if facts["memory_gib"] else "unknown",
        "devices": "; ".join(facts["devices"]),
        "CUDA": f"torch's {cuda['torch'] or 'none'}, driver's {cuda['driver'] or 'none'}",
        **{name: version for name, version in facts["versions"].items() if version},
        "not installed": ", ".join(missing) or "-",
        "auto": f"ADAMIX_AUTO={facts['auto']['mode']}, verdicts in {facts['auto']['cache']}",
        "C++/CUDA library": _library_in_words(facts["cuda_library"]),
    }
    lines = [f"{name + ':':18}{words}" for name, words in rows.items()]
    for name, state in facts["backends"].items():
        ops = ", ".join(state["ops"]) or "no ops"
        lines.append(f"backend {name:10}{'usable' if state['usable'] else 'not usable'}: {state['reason']} ({ops})")
        lines += _verdicts_in_words(state["verdicts"])
    return "\n".join(["```text", *lines, "```"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="adamix env", description="Versions, device and backends, for a bug report.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    facts = describe()
    print(json.dumps(facts, indent=2) if args.json else in_words(facts))
    return 0


def _verdicts_in_words(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each GPU and state, and what is wrong in full."""
    counted: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for verdict in verdicts:
        counted.setdefault((verdict["gpu"], verdict["state"]), []).append(verdict)
    lines = []
    for (gpu, state), those in counted.items():
        since = min(filter(None, (v["when"] for v in those)), default="")
        lines.append(f"  {gpu}: {len(those)} kernels {state}" + (f" since {since}" if since else ": adamix verify"))
        if state in ("wrong", "crashed"):
            words = ("op", "dtype", "shape")
            lines += [f"    {' '.join(v[w] for w in words)}: {v['why']} ({v['when']})" for v in those]
    return lines


def _short(path: Path) -> str:
    """Without the user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _library_in_words(facts: dict[str, Any]) -> str:
    nodes = "; autograd's nodes in C++"
    if not facts["node"]:
        nodes = f"; autograd's nodes in Python ({facts['node_problem'] or 'no module for this torch and Python'})"
    if facts["problem"]:
        return str(facts["problem"]) + (nodes if facts["node"] or facts["node_problem"] else "")
    if facts["architectures"] is None:
        built_for = "the CPU" if _extension.on_host() else torch.ops.adamix_cuda.build_info()
        return f"{facts['path']}, for {built_for}{nodes}"
    words = (
        f"for {', '.join(facts['architectures'])}, by nvcc {facts['nvcc']} with the headers of torch {facts['torch']}"
    )
    return words + nodes + ("; csrc/ has changed since" if facts["csrc_changed"] else "")


def _cpu() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # no such name on this system
        return None


def _gpu(index: int) -> str:
    try:
        facts = torch.cuda.get_device_properties(index)
    except RuntimeError as error:  # a driver that does not answer is what the report is about
        return f"GPU {index}: {str(error).splitlines()[0]}"
    return f"{facts.name} (compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "adamix_kernels":
            from .._version import __version__

            return __version__
        return None
