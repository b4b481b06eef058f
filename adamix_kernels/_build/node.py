"""Compiles csrc/autograd/ with g++: a Python module for one torch and one Python, beside the library that it calls."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from .objects import NODE_FOLDER, Compiled, fingerprint, link, objects_folder, planned, with_includes
from .schedule import compile_all
from .toolchain import BuildError, Torch, run

# All of torch's C++, which takes C++20 from 2.13 on.
_FLAGS = (
    *("-c", "-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-I{csrc}", "-isystem", "{torch}/include"),
    *("-isystem", "{torch}/include/torch/csrc/api/include", "-isystem", "{python}"),
    *("-ffile-prefix-map={csrc}=csrc", "-ffile-prefix-map={torch}=torch"),
)
_STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")
_LIBRARIES = ("-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10")


def node_name(torch: str) -> str:
    """The module's file for a version of torch and the running Python; with others it is not found, nor loaded."""
    return f"_node-{torch}{sysconfig.get_config_var('EXT_SUFFIX')}"


def node_sources(csrc: Path) -> str:
    """The fingerprint of what the module is made of, which it tells as `sources`: another's is not the one to load."""
    folder = csrc / NODE_FOLDER
    return fingerprint([*folder.glob("*.cpp"), *folder.glob("*.h"), *csrc.glob("entries.h")])


def node_obstacle(torch: Torch, csrc: Path) -> str | None:
    """Why the module is not built here, or None; nothing is compiled."""
    if not (csrc / NODE_FOLDER).is_dir():
        return f"no folder {NODE_FOLDER} in {csrc}"
    if shutil.which("g++") is None:
        return "no g++ in $PATH"
    python = Path(sysconfig.get_paths()["include"])
    for folder, header in ((python, "Python.h"), (torch.folder / "include", "torch/csrc/autograd/python_variable.h")):
        if not (folder / header).is_file():
            return f"{folder} holds no {header}"
    return None


def build_node(folder: Path, torch: Torch, csrc: Path, jobs: int, *, strict: bool = False) -> Path:
    """Compiles the module, and puts it into `folder`, whole or not at all; its path. strict: warnings are errors.

    Raises BuildError.
    """
    problem = node_obstacle(torch, csrc)
    if problem is not None:
        raise BuildError(problem)
    places = {"csrc": csrc, "torch": torch.folder, "python": sysconfig.get_paths()["include"]}
    versions = run("g++", "-dumpfullversion").strip(), torch.version
    files = sorted((csrc / NODE_FOLDER).glob("*.cpp"))
    with objects_folder(csrc, NODE_FOLDER) as kept:
        flags = [*_filled(_FLAGS, places), *(_STRICT if strict else ())]
        told = f'-DADAMIX_NODE_SOURCES="{node_sources(csrc)}"'

        def plan(file: Path) -> Compiled:
            mine = [*flags, told] if file.name == "module.cpp" else flags
            return planned(["g++"], mine, file, with_includes(file, csrc), kept, versions)

        objects = [plan(file) for file in files]
        output = folder / node_name(torch.version)
        link(["g++", "-shared"], compile_all(objects, jobs), _filled(_LIBRARIES, places), output)
    return output


def _filled(words: Sequence[str], places: dict[str, object]) -> list[str]:
    return [word.format(**places) for word in words]
