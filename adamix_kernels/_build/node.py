"""Compiles csrc/autograd/ with g++: a Python module for one torch and one Python, beside the library that it calls."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from .objects import NODE_FOLDER, fingerprint, link, objects_folder, planned, replacing, with_includes
from .schedule import compile_all
from .toolchain import BuildError, Torch, run

# All of torch's C++, which takes C++20 from 2.13 on.
_FLAGS = (
    *("-c", "-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-I{csrc}", "-isystem", "{torch}/include"),
    *("-isystem", "{torch}/include/torch/csrc/api/include", "-isystem", "{python}"),
    *("-ffile-prefix-map={csrc}=csrc", "-ffile-prefix-map={torch}=torch"),
)
# torch's headers take longer than what is here, so files are compiled together: in so many commands.
_UNITS = 4
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
    with objects_folder(csrc, NODE_FOLDER) as kept:
        flags = [*_filled(_FLAGS, places), *(_STRICT if strict else ())]
        told = f'-DADAMIX_NODE_SOURCES="{node_sources(csrc)}"'
        objects = []
        for unit, files in _units(csrc, kept):
            mine = [*flags, told] if any(file.name == "module.cpp" for file in files) else flags
            read = {path for file in files for path in with_includes(file, csrc)}
            objects.append(planned(["g++"], mine, unit, sorted(read), kept, versions))
        output = folder / node_name(torch.version)
        link(["g++", "-shared"], compile_all(objects, jobs), _filled(_LIBRARIES, places), output)
    return output


def _units(csrc: Path, kept: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A source in `kept` that includes some of the folder's, and these, until all are in one."""
    files = sorted((csrc / NODE_FOLDER).glob("*.cpp"))
    for number in range(min(_UNITS, len(files))):
        mine, unit = files[number::_UNITS], kept / f"unit{number}.cpp"
        with replacing(unit) as part:
            part.write_text("".join(f'#include "{NODE_FOLDER}/{file.name}"\n' for file in mine))
        yield unit, mine


def _filled(words: Sequence[str], places: dict[str, object]) -> list[str]:
    return [word.format(**places) for word in words]
