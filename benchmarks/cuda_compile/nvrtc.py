"""A compiler of device code for sm_70, which nvcc 13 no longer knows: NVRTC 12.9 from PyPI's wheels, through ctypes.

python benchmarks/cuda_compile/nvrtc.py --wheels FOLDER [-I FOLDER] [--ptx] SOURCE -o CUBIN

It compiles every kernel that SOURCE instantiates, prints what NVRTC and ptxas say, and takes a warning for an error.
--ptx makes the PTX of compute_70, which the driver of a newer GPU compiles for itself, instead of machine code;
--lineinfo says in it which line of SOURCE it comes from.
No GPU is needed. FOLDER is the --target folder of the wheels (see the Makefile).
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

# The one message that every compilation for sm_70 brings.
_EXPECTED = "warning: Architectures prior to '<compute/sm>_75' are deprecated"


class NvrtcError(RuntimeError):
    """What NVRTC said."""


class Nvrtc:
    """NVRTC and its headers out of `wheels`; FileNotFoundError where one is missing."""

    def __init__(self, wheels: Path):
        found = sorted((wheels / "nvidia" / "cuda_nvrtc" / "lib").glob("libnvrtc.so.*"))
        parts = [wheels / "nvidia" / name / "include" for name in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
        missing = [str(path) for path in parts if not path.is_dir()]
        if not found or missing:
            raise FileNotFoundError(f"{wheels}: no {', '.join(missing) or 'nvidia/cuda_nvrtc/lib/libnvrtc.so.*'}")
        self._library = ctypes.CDLL(str(found[0]))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._includes = [f"-I{path}" for path in parts]

    def compile(
        self, source: Path, includes: Sequence[Path] = (), *, ptx: bool = False, lines: bool = False
    ) -> tuple[bytes, str]:
        """(cubin or PTX, messages); NvrtcError, with the messages, on an error or a warning."""
        options = ["-arch=compute_70"] if ptx else ["-arch=sm_70", "-Xptxas=-v"]
        options += ["-std=c++17", "-default-device", *(["-lineinfo"] if lines else [])]
        options += [f"-I{path}" for path in includes] + self._includes
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), str(source).encode()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), words)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status or any("warning" in line and _EXPECTED not in line for line in log.splitlines()):
                raise NvrtcError(log)
            return self._read(program, "PTX").rstrip(b"\0") if ptx else self._read(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, status: int) -> None:
        if status:
            raise NvrtcError(self._library.nvrtcGetErrorString(status).decode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with the messages on stderr where nothing was compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", dest="output", type=Path, required=True)
    parser.add_argument("-I", dest="includes", type=Path, action="append", default=[])
    parser.add_argument("--ptx", action="store_true")
    parser.add_argument("--lineinfo", action="store_true")
    parser.add_argument("--wheels", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        code, log = Nvrtc(options.wheels).compile(
            options.source, options.includes, ptx=options.ptx, lines=options.lineinfo
        )
    except (NvrtcError, OSError) as error:
        print(f"nvrtc: {options.source}: {error}", file=sys.stderr)
        return 1
    options.output.write_bytes(code)
    print(log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
