"""The metadata is in pyproject.toml; here the C++/CUDA library is built, where a GPU could run it.

ADAMIX_CUDA=auto (the default) builds it where a GPU, nvcc and a torch with CUDA are, and else makes a package without
it and says why; =0 builds none; =1 builds it without a GPU too, and fails where it cannot. MAX_JOBS: files compiled at
a time. ADAMIX_ARCHITECTURES="80;90+PTX": what it is compiled for. torch is found, and not imported. Without nvcc, g++
makes at least the module of autograd's nodes, where a GPU is; an installation never fails because of it.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).resolve().parent / "adamix_kernels"


def _load_build():
    """adamix_kernels._build without adamix_kernels, which needs torch."""
    folder = PACKAGE / "_build"
    spec = importlib.util.spec_from_file_location(
        "_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["_build"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_build = _load_build()
try:
    MODE = _build.mode()
except _build.BuildError as error:
    sys.exit(str(error))
REASON = "ADAMIX_CUDA=0" if MODE == "0" else _build.obstacle(asked=MODE == "1")
if REASON and MODE == "1":
    sys.exit(f"ADAMIX_CUDA=1, but the C++/CUDA library cannot be built: {REASON}")
NO_NODES = "ADAMIX_CUDA=0" if MODE == "0" else _build.node_alone_obstacle() if REASON else None


def _without_library(folder: Path, reason: str) -> None:
    print(f"adamix_kernels: built without the C++/CUDA library: {reason}", file=sys.stderr)
    # A library that stands there from an earlier build in place keeps its record.
    if not list(folder.glob("_C*.so")):
        lines = reason.splitlines()
        _build.write_record(folder, {"built": False, "reason": next((x for x in lines if "error" in x), lines[0])})
    problem = NO_NODES or _build.build_node_alone(folder)
    if problem:
        if not list(folder.glob("_C*.so")):
            for old in folder.glob("_node-*"):  # of sources that are there no more
                old.unlink()
        again = "python -m adamix_kernels._build --node builds them with g++ alone"
        print(f"adamix_kernels: autograd's nodes stay in Python: {problem} ({again})", file=sys.stderr)


class BuildPackage(build_py):
    """Adds csrc/ to the package, so that an installed package can build itself anew, and why there is no library."""

    def run(self):
        super().run()
        folder = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
        if not self.editable_mode:
            shutil.rmtree(folder / "csrc", ignore_errors=True)
            shutil.copytree(_build.source_folder(), folder / "csrc")
        if REASON:
            _without_library(folder, REASON)


class BuildLibrary(build_ext):
    """Runs nvcc; under ADAMIX_CUDA=auto a failure leaves a package without the library."""

    def run(self):
        if not self.extensions:
            return
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        if not self.inplace:
            output.unlink(missing_ok=True)
        try:
            _build.build_cuda(output)
        except _build.BuildError as error:
            if MODE == "1":
                sys.exit(f"ADAMIX_CUDA=1, but the C++/CUDA library does not build: {error}")
            _without_library(output.parent, f"csrc/ does not compile: {error}")


class Package(Distribution):
    """A wheel with nodes alone is of this platform and this Python."""

    def has_ext_modules(self):
        return super().has_ext_modules() or not NO_NODES


library = [] if REASON else [Extension("adamix_kernels._C", ["csrc/registration.cpp"], py_limited_api=True)]
setup(
    distclass=Package,
    ext_modules=library,
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary},
    # For an isolated build; elsewhere, without ninja, the compilers run in threads.
    setup_requires=["ninja>=1.10"] if library and not _build.find_ninja() else [],
    # One library for every CPython: it is loaded by torch, not imported.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if library else {},
)
