"""The C++/CUDA library with the V100's code alone, as PTX: `python -m benchmarks.cuda_compile.volta --output FILE`.

The driver of a newer GPU compiles the PTX of compute_70 for itself, so that what only a V100 runs can be run without
one: ADAMIX_CUDA_LIBRARY=FILE makes the package load it. nvcc 13 compiles the host's part and NVRTC the device's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adamix_kernels import _build
from adamix_kernels._build import BuildError, Compiled
from adamix_kernels._build.objects import link, objects_folder, planned, sources, with_includes
from adamix_kernels._build.schedule import compile_all, parallel
from adamix_kernels._build.toolchain import find_nvcc, find_torch

from .compile import WHEELS, nvrtc_version


def build(output: Path, wheels: Path = WHEELS, jobs: int | None = None) -> Path:
    """Compiles csrc/ and links `output`, whose build_info() is "70+PTX"; BuildError. wheels: folder of NVRTC's."""
    torch, nvcc, csrc = find_torch(), find_nvcc(), _build.source_folder()
    flags = _build.fill(_build.NVCC, csrc, torch)
    tools = [Path(__file__).with_name(name) for name in ("volta_compiler.py", "nvrtc.py")]
    driver = [sys.executable, str(tools[0]), "--nvcc", str(nvcc.path), "--wheels", str(wheels)]
    versions = nvcc.version, torch.version, nvrtc_version(wheels)

    def plan(source: Path) -> Compiled:
        read = [*with_includes(source, csrc), *tools]
        if source.suffix == ".cu":
            return planned(driver, flags, source, read, folder, versions)
        told = [*flags, '-DADAMIX_ARCHITECTURES="70+PTX"']
        return planned([str(nvcc.path)], told, source, read, folder, versions)

    with objects_folder(csrc, "volta") as folder:
        objects = compile_all([plan(source) for source in sources(csrc)], parallel(jobs))
        link([str(nvcc.path), *_build.NVCC_LINK], objects, _build.fill(_build.LIBRARIES, csrc, torch), output)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1, with the reason on stderr, where nothing was built."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_compile.volta", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=_build.PACKAGE.parent / "build" / "csrc" / "adamix_volta.so")
    parser.add_argument("--jobs", type=int, help="files compiled at a time (default: $MAX_JOBS, else one a processor)")
    parser.add_argument("--nvrtc", type=Path, default=WHEELS, help="folder of NVRTC's wheels")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    try:
        print(build(options.output, options.nvrtc, options.jobs))
    except BuildError as error:
        print(f"volta: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
