"""What a verdict is about: a device, and one op on one backend, in one dtype and class of shapes; and its key."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import _backends, _extension
from .._auto import SHAPES
from .._environment import triton_table
from .._version import __version__

DTYPES = ("float16", "bfloat16", "float32")
KERNELS = ("triton", "cuda")
_PACKAGE = Path(__file__).parent.parent
_SHARED = ("_triton_utils.py", "_extension.py", "_environment.py")


class Job(NamedTuple):
    """dtype: a name of DTYPES. shape: a class of _auto.SHAPES."""

    op: str
    backend: str
    dtype: str
    shape: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Machine:
    """A device: torch's name for it in this process, and what tells it from others.

    capability: 10 * major + minor. setup: of a stand-in for a GPU, "module:function" that its process calls first.
    """

    device: str
    name: str
    capability: int
    processors: int
    driver: str
    setup: str = ""

    @classmethod
    def of(cls, device: torch.device | str | int) -> Machine:
        """A GPU of this process."""
        facts = torch.cuda.get_device_properties(device)
        number = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        index = torch.cuda.current_device() if number.index is None else number.index
        return cls(f"cuda:{index}", facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count, _driver())

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def key(self, job: Job) -> dict[str, str]:
        """All that decides what the kernels of a job do here: where one of these differs, nothing is known."""
        facts = {name: str(value) for name, value in asdict(self).items() if name != "device"}
        return {
            **job._asdict(),
            **facts,
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
            "package": __version__,
            "kernels": sources(job.op, job.backend),
        }


def jobs(
    ops: tuple[str, ...] = tuple(SHAPES), dtypes: tuple[str, ...] = DTYPES, backends: tuple[str, ...] = KERNELS
) -> list[Job]:
    """Every job there is of these: of each op on the backends that this build has it for."""
    made = {name: state.ops for name, state in _backends.backends().items()}
    return [
        Job(op, backend, dtype, shape)
        for op in ops
        for shape in SHAPES[op]
        for dtype in dtypes
        for backend in backends
        if op in made[backend]
    ]


def sources(op: str, backend: str) -> str:
    """A hash of what the kernels are made from: Python sources, measured tables, the compiled library, the checks."""
    library = _extension.library_path() if backend == "cuda" else None
    return _sources(op, backend, library, triton_table() if backend == "triton" else None)


@functools.cache
def _sources(op: str, backend: str, library: Path | None, table: str | None) -> str:
    folder = _PACKAGE / "ops"
    files = [
        *sorted((folder / op).rglob("*.py")),
        *sorted(folder.glob("*.py")),
        *(_PACKAGE / name for name in _SHARED),
        *sorted(Path(__file__).parent.glob("*.py")),
        *(Path(extra) for extra in (library, table) if extra),
    ]
    made = hashlib.sha256(backend.encode())
    for path in files:
        made.update(f"\0{path.name}\0".encode())
        try:
            made.update(path.read_bytes())
        except OSError as error:
            made.update(str(error).encode())
    return made.hexdigest()[:32]


def _driver() -> str:
    """The driver's own version, else the CUDA version that it runs."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found.group()
    except OSError:
        pass
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else os.name


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
