"""Libraries that let a CUDA build of torch be imported without NVIDIA's: `python -m reliability.cuda_stubs FOLDER`.

FOLDER holds torch/ (pip install --no-deps --target FOLDER torch==2.11.0). PyPI has no older torch for Linux without
CUDA, and the libraries it asks for are gigabytes. The CPU's part of torch calls none of them, but the loader wants
every symbol: here each is a function that returns 100, cudaErrorNoDevice, so `torch.cuda.is_available()` is False, and
what asks for more gets an exception. The libraries land in FOLDER/torch/lib, where torch looks last. Needs gcc and nm;
for tests of the CPU's part alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_NEEDED = re.compile(r"NEEDED.*\[((?:libcu|libnccl|libnv)[^\]]*)\]")
_NO_DEVICE = "mov $100, %eax"
_WORDS = 'lea 1f(%rip), %rax\nret\n1: .asciz "no device"'
# With these torch makes an exception of the 100.
_ANSWERS = {"cudaGetErrorString": _WORDS, "cudaGetErrorName": _WORDS}
_OWNERS = {"ncclu": "libnccl", "nccl": "libnccl", "cusparseLt": "libcusparseLt", "nvshmem": "libnvshmem_host"}


def write_stubs(torch_lib: Path) -> list[Path]:
    """Writes a library for each that those in `torch_lib` need and that is not there; returns their paths."""
    libraries = sorted(torch_lib.glob("*.so"))
    needed = {name for library in libraries for name in _needed(library)} - {path.name for path in libraries}
    wanted: dict[str, set[str]] = {name: set() for name in needed}
    for library in libraries:
        for symbol in _undefined(library):
            owner = _owner(symbol, needed)
            if owner:
                wanted[owner].add(symbol)
    return [_compile(torch_lib / name, symbols) for name, symbols in sorted(wanted.items())]


def _needed(library: Path) -> list[str]:
    return _NEEDED.findall(_output("readelf", "-d", str(library)))


def _undefined(library: Path) -> Iterator[str]:
    for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines():
        yield line.split()[-1]


def _owner(symbol: str, needed: Iterable[str]) -> str | None:
    """The library that a symbol is asked of: its version names it, else its prefix."""
    name, _, version = symbol.partition("@")
    if version in needed:
        return version
    if version and version != "NVSHMEM":
        return None
    prefixes = [*_OWNERS.items(), ("cuFile", "libcufile"), ("cupti", "libcupti"), ("curand", "libcurand")]
    start = next((library for prefix, library in prefixes if name.startswith(prefix)), None)
    return next((library for library in needed if start and library.startswith(f"{start}.so")), None)


def _compile(path: Path, symbols: set[str]) -> Path:
    names = sorted({symbol.partition("@")[0] for symbol in symbols})
    versions = sorted({symbol.partition("@")[2] for symbol in symbols} - {""})
    source = "\n".join(
        f".globl {name}\n.type {name}, @function\n{name}: {_ANSWERS.get(name, _NO_DEVICE)}\nret" for name in names
    )
    script = path.with_suffix(".map")
    script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions) or "{ global: *; };\n")
    command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}"]
    command += ["-x", "assembler", "-", "-o", str(path)]
    subprocess.run(command, input=source + '\n.section .note.GNU-stack,"",@progbits\n', text=True, check=True)
    script.unlink()
    return path


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for stub in write_stubs(Path(sys.argv[1]) / "torch" / "lib"):
        print(stub)
