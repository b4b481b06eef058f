"""Builds a wheel from a copy of the checkout, and looks into it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from adamix_kernels._build import BuildError, toolchain

_NEEDED = ("adamix_kernels", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "_C.json", "*.egg-info")
_BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
_METADATA = re.compile(
    r"adamix_kernels-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|entry_points\.txt|licenses/LICENSE)"
)
_MADE = {"adamix_kernels/_C.abi3.so", "adamix_kernels/_C.json"}


def build(checkout: Path, folder: Path, variables: dict[str, str]) -> Path:
    """The wheel that setuptools builds in `folder`, without isolation. Raises BuildError with what was printed."""
    project = folder / "project"
    project.mkdir()
    for name in _NEEDED:
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=_IGNORED)
        else:
            shutil.copy(source, project)
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", _BUILD], cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BuildError(next((line for line in lines if "ADAMIX" in line), lines[-1]))
    return project / "dist" / done.stdout.strip().splitlines()[-1]


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def machine_paths(wheel: Path, folder: Path) -> list[str]:
    """file: path, for every file in the wheel in which a folder of this machine stands.

    folder: where the wheel was built. Looked for as well: Python's folders, torch's, nvcc's and the home.
    """
    places = {str(folder), sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), f"{Path.home()}/"}
    with contextlib.suppress(BuildError):
        places.add(str(toolchain.find_nvcc().path.resolve().parent.parent))
    places -= {"/usr", "/usr/local"}  # are on every machine, and in the places where nvcc is looked for
    found = []
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            content = file.read(name)
            found += [f"{name}: {place}" for place in sorted(places) if place.encode() in content]
    return found


def unexpected(wheel: Path, checkout: Path) -> list[str]:
    """Files that a wheel has too much ("+ name") or lacks ("- name")."""
    package = checkout / "adamix_kernels"
    data = {
        path
        for pattern in ("*.py", "py.typed", "tasks/data/*.tsv", "recipes/configs/*.json", "verifying/preferences.json")
        for path in package.rglob(pattern)
    }
    wanted = {path.relative_to(checkout).as_posix() for path in data}
    sources = [path for path in (checkout / "csrc").rglob("*") if path.is_file()]
    wanted |= {"adamix_kernels/" + path.relative_to(checkout).as_posix() for path in sources}
    present = {name for name in names(wheel) if not _METADATA.fullmatch(name)} - _MADE
    return [*(f"+ {name}" for name in sorted(present - wanted)), *(f"- {name}" for name in sorted(wanted - present))]
