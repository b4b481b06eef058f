"""Compiles csrc/: with nvcc into the library that the package loads, with g++ into one that runs it on the CPU.

`python -m adamix_kernels._build --help`. This package needs the standard library alone, and nothing beside itself:
setup.py loads it before anything is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .node import build_node, node_obstacle
from .node import node_name as node_name
from .node import node_sources as node_sources
from .objects import (
    NODE_FOLDER,
    PACKAGE,
    Compiled,
    fingerprint,
    link,
    objects_folder,
    planned,
    replacing,
    sources,
    with_includes,
)
from .objects import source_folder as source_folder
from .schedule import compile_all, parallel, tell
from .schedule import find_ninja as find_ninja
from .schedule import processors as processors
from .toolchain import BuildError as BuildError
from .toolchain import Torch, check_pair, find_nvcc, find_torch, gencode, has_gpu, run, wanted_architectures
from .toolchain import driver_cuda as driver_cuda

LIBRARY = PACKAGE / "_C.abi3.so"
# Beside the library: what it was built for, or why there is none.
RECORD = "_C.json"
MODES = ("auto", "0", "1")

# The stable ABI of torch 2.11, whatever torch the headers are of.
_COMMON = ("-std=c++17", "-I{csrc}", "-isystem", "{torch}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000")
# A library is shipped: where it was compiled is nobody's business, and the same sources give the same file.
_NO_PATHS = ("-ffile-prefix-map={csrc}=csrc", "-ffile-prefix-map={torch}=torch")
_NVCC_HOST = ",".join(("-fPIC", "-fvisibility=hidden", *_NO_PATHS))
NVCC = ("-c", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", _NVCC_HOST, *_COMMON)
_NVCC_STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v")
# Without the device link, which no kernel here needs and which would write its command line into the library.
NVCC_LINK = ("-shared", "--no-device-link", "--cudart", "static", "-Xlinker", "--no-as-needed")
_GXX_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
_GXX_CODE = ("-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DADAMIX_HOST")
_GXX = ("-c", "-x", "c++", *_GXX_CODE, *_GXX_WARNINGS, *_NO_PATHS, *_COMMON)
LIBRARIES = ("-L{torch}/lib", "-ltorch", "-ltorch_cpu")
# The scheduler of the threads tells the sanitisers what it does; it is not for them to watch.
_UNWATCHED = "host/fibers.cpp"
# Of what is no kernel, for every variant.
_HOST_CODE = ("-O2",)
HOST_FLAGS = {
    "plain": ("-O1",),
    "asan": ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-g1", "-fsanitize=thread"),
}


def mode() -> str:
    """$ADAMIX_CUDA: "auto" (also unset), "0" or "1"; BuildError for anything else."""
    value = os.environ.get("ADAMIX_CUDA") or "auto"
    if value not in MODES:
        raise BuildError(f"ADAMIX_CUDA: got {value!r}, expected one of {', '.join(MODES)}")
    return value


def obstacle(asked: bool = False) -> str | None:
    """Why the CUDA library is not built on this machine, or None; nothing is compiled.

    asked: whether it is wanted even where nothing could run it: without a GPU, or for a torch without CUDA.
    """
    if not sys.platform.startswith("linux"):
        return f"the C++/CUDA library is built on Linux, and this is {sys.platform}"
    if not asked and not has_gpu():
        return "no NVIDIA GPU in this machine (ADAMIX_CUDA=1 builds the library all the same)"
    try:
        torch, nvcc = find_torch(), find_nvcc()
        if not asked and torch.cuda is None:
            return f"torch {torch.version} is made without CUDA (ADAMIX_CUDA=1 builds the library all the same)"
        check_pair(torch, nvcc)
        wanted_architectures(nvcc)
        source_folder()
        parallel()
    except BuildError as error:
        return str(error)
    return None


def build_cuda(
    output: Path = LIBRARY, *, strict: bool = False, architectures: Sequence[str] = (), jobs: int | None = None
) -> list[Compiled]:
    """Compiles csrc/ for every architecture, links `output`, and writes the record beside it; node.py's module, where
    it can be built, too.

    strict: warnings are errors, and ptxas tells registers and spills in the logs. architectures: by default what
    `wanted_architectures` says. jobs: by default what `parallel` says. Raises BuildError; `output` is then what it was.
    """
    torch, nvcc, csrc = find_torch(), find_nvcc(), source_folder()
    check_pair(torch, nvcc)
    names = list(architectures) or wanted_architectures(nvcc)
    files = sources(csrc)
    jobs = parallel(jobs)
    # Several architectures at a time would mix their messages.
    compiler = [str(nvcc.path), "--threads", "1" if strict else str(max(1, jobs // len(files)))]
    flags = [*fill(NVCC, csrc, torch), *gencode(names), *(_NVCC_STRICT if strict else ())]
    told = [f'-DADAMIX_ARCHITECTURES="{";".join(names)}"']

    def plan(source: Path) -> Compiled:
        mine = flags if source.suffix == ".cu" else flags + told
        read = with_includes(source, csrc)
        return planned(compiler, mine, source, read, folder, (nvcc.version, torch.version))

    tell(f"csrc/ is compiled for compute capability {', '.join(names)} with nvcc {nvcc.version}, torch {torch.version}")
    with objects_folder(csrc, "cuda-strict" if strict else "cuda") as folder:
        made = sources_fingerprint(csrc)
        objects = compile_all([plan(source) for source in files], jobs)
        link([str(nvcc.path), *NVCC_LINK], objects, fill(LIBRARIES, csrc, torch), output)
    node = _node_beside(output, torch, csrc, jobs)
    facts = {"built": True, "architectures": names, "nvcc": nvcc.version, "torch": torch.version, "sources": made}
    facts["node"] = node
    write_record(output.parent, facts)
    return objects


def build_host(variant: str, output: Path | None = None, *, jobs: int | None = None) -> Path:
    """Compiles csrc/ with g++ so that its kernels run on the CPU, for tests; variant: plain, asan or tsan.

    output: by default build/csrc/adamix_host_<variant>.so of the checkout. Returns it; raises as build_cuda does.
    """
    torch, csrc = find_torch(), source_folder()
    output = output or csrc.parent / "build" / "csrc" / f"adamix_host_{variant}.so"
    if shutil.which("g++") is None:
        raise BuildError("no g++ in $PATH")
    versions = run("g++", "-dumpfullversion").strip(), torch.version
    flags = fill(_GXX, csrc, torch)

    def plan(source: Path) -> Compiled:
        kernels = source.suffix == ".cu" or source.parent.name == "host"
        watched = kernels and source != csrc / _UNWATCHED
        mine = HOST_FLAGS[variant] if watched else _HOST_CODE
        read = with_includes(source, csrc, host=True)
        return planned(["g++"], [*flags, *mine], source, read, folders[variant if watched else "plain"], versions)

    # A sanitiser watches the kernels; all else is compiled as it is without.
    with contextlib.ExitStack() as stack:
        folders = {}
        for name in sorted({variant, "plain"}):
            folders[name] = stack.enter_context(objects_folder(csrc, f"host-{name}"))
        objects = compile_all([plan(source) for source in sources(csrc, host=True)], parallel(jobs))
        libraries = ["-Wl,--no-as-needed", *fill(LIBRARIES, csrc, torch), "-pthread"]
        link(["g++", "-shared", *HOST_FLAGS[variant]], objects, libraries, output)
    if (csrc / NODE_FOLDER).is_dir():
        build_node(output.parent, torch, csrc, parallel(jobs), strict=True)
    return output


def node_alone_obstacle() -> str | None:
    """Why an installation without the library is not given node.py's module, which Triton uses, or None."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux alone, this is {sys.platform}"
    if not has_gpu():
        return "no NVIDIA GPU in this machine"
    try:
        torch = find_torch()
        if torch.cuda is None:
            return f"torch {torch.version} is made without CUDA"
        return node_obstacle(torch, source_folder())
    except BuildError as error:
        return str(error)


def build_node_alone(folder: Path) -> str | None:
    """Compiles node.py's module into `folder`, of a package without the library; why it could not, or None."""
    try:
        build_node(folder, find_torch(), source_folder(), parallel())
    except (BuildError, OSError) as error:
        return str(error)
    return None


def _node_beside(output: Path, torch: Torch, csrc: Path, jobs: int) -> str:
    """The name of node.py's module, or why the library has to do without it."""
    try:
        return build_node(output.parent, torch, csrc, jobs).name
    except BuildError as error:
        reason = str(error)
        tell(f"autograd's nodes stay in Python: {reason}")
        return next((line for line in reason.splitlines() if "error" in line), reason.splitlines()[0])


def sources_fingerprint(csrc: Path) -> str:
    """Of everything in csrc/ that the CUDA library and the module beside it are made of."""
    files = [path for source in sources(csrc) for path in with_includes(source, csrc)]
    return fingerprint(files, node_sources(csrc))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Puts the record into `folder`, whole or not at all."""
    with replacing(folder / RECORD) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def fill(words: Sequence[str], csrc: Path, torch: Torch) -> list[str]:
    """The options with the folders in their places."""
    return [word.format(csrc=csrc, torch=torch.folder) for word in words]
