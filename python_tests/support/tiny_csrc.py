"""A csrc/ of one kernel, in a copy of the project, for tests of the build."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    "registration.cpp": """
#include <string>

#include <torch/csrc/stable/library.h>

#include "common/words.h"
#include "doubling/doubling.h"

static std::string build_info() { return TINY_WORDS; }
static std::string driver_problem() { return ""; }
static std::string device_problem(int64_t) { return ""; }
static int64_t tile_columns(int64_t, int64_t) { return 1; }
static int64_t most_merged(int64_t) { return 1; }
static int64_t doubled(int64_t value) { return doubled_on_device(static_cast<int>(value)); }
STABLE_TORCH_LIBRARY(adamix_cuda, m) {
  m.def("build_info() -> str");
  m.def("driver_problem() -> str");
  m.def("device_problem(int device) -> str");
  m.def("tile_columns(int device, int element_bytes) -> int");
  m.def("most_merged(int device) -> int");
  m.def("doubled(int value) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(adamix_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("driver_problem", TORCH_BOX(&driver_problem));
  m.impl("device_problem", TORCH_BOX(&device_problem));
  m.impl("tile_columns", TORCH_BOX(&tile_columns));
  m.impl("most_merged", TORCH_BOX(&most_merged));
  m.impl("doubled", TORCH_BOX(&doubled));
}
""",
    "common/words.h": """
#pragma once
#ifdef ADAMIX_HOST
#define TINY_WORDS "host"
#else
#define TINY_WORDS ADAMIX_ARCHITECTURES
#endif
""",
    "doubling/doubling.h": """
#pragma once
int doubled_on_device(int value);
""",
    "doubling/doubling.cu": """
#include "doubling/doubling.h"
#ifdef ADAMIX_HOST
int doubled_on_device(int value) { return 2 * value; }
#else
__global__ void doubling_kernel(int* value) { *value *= 2; }
int doubled_on_device(int value) {
  int* there = nullptr;
  if (cudaMalloc(&there, sizeof(int)) != cudaSuccess) return -1;
  cudaMemcpy(there, &value, sizeof(int), cudaMemcpyHostToDevice);
  doubling_kernel<<<1, 1>>>(there);
  cudaMemcpy(&value, there, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(there);
  return value;
}
#endif
""",
}


def project(folder: Path) -> Path:
    """A copy of the project whose csrc/ is the one above."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    left = shutil.ignore_patterns("__pycache__", "_C*", "_node-*")
    shutil.copytree(ROOT / "adamix_kernels", folder / "adamix_kernels", ignore=left)
    for name, text in FILES.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    return folder


def run(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Python code in `folder`, which it imports from first, without the variables that choose or find a library."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ADAMIX", "CUDA_")) and k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    environment = kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def nvcc(folder: Path, version: str, architectures: str = "75 80 90") -> str:
    """A CUDA_HOME whose nvcc says so of itself, and compiles nothing."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = "\\n".join(f"compute_{name}" for name in architectures.split())
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release x, V{version}';;\n"
        f"--list-gpu-arch) printf '{known}\\n';;\n*) exit 1;;\nesac\n"
    )
    path.chmod(0o755)
    return str(folder)


def nvidia_smi(folder: Path, gpus: str = "9.0", cuda: str = "13.0") -> str:
    """A $PATH whose nvidia-smi lists a GPU of each of these compute capabilities, and a driver of this CUDA."""
    path = folder / "smi" / "nvidia-smi"
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"GPU {i}: Some GPU (UUID: GPU-{i})\\n" for i, _ in enumerate(gpus.split()))
    capabilities = "".join(f"{each}\\n" for each in gpus.split())
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n-L) printf '{listed}';;\n"
        f"--query-gpu=compute_cap) printf '{capabilities}';;\n"
        f"*) echo '| NVIDIA-SMI 1.2  Driver Version: 1.2  CUDA Version: {cuda} |';;\nesac\n"
    )
    path.chmod(0o755)
    return f"{path.parent}{os.pathsep}{os.environ['PATH']}"


def torch(folder: Path, version: str = "2.13.0", cuda: str | None = "13.0") -> Path:
    """A folder to import from, whose torch says so of itself and has the installed one's headers and libraries."""
    installed = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    place = folder / "site" / "torch"
    place.mkdir(parents=True)
    for name in ("include", "lib"):
        (place / name).symlink_to(installed / name)
    (place / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    (place / "__init__.py").write_text("raise ImportError('not to be imported by a build')\n")
    return place.parent
