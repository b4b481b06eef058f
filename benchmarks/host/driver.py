"""A GPU that launches nothing: what Triton's JIT and csrc/ do on the host up to the driver's launch, on CPU tensors.

Triton binds, looks up and launches as on a GPU of compute capability 9.0, through its own C launcher, built against a
libcuda whose cuLaunchKernelEx counts and returns; only the compiler is left out, so a kernel is never more than its
name. csrc/ is the host library (`python -m adamix_kernels._build --host`) with ADAMIX_HOST_IDLE=1, which takes every
launch for done.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARCH, SHARED, THREADS = 90, 232448, 1024
# Every function of libcuda that Triton's launcher calls. 0 is CUDA_SUCCESS.
_LIBCUDA = """
#include <stdint.h>
static long launched;
long stand_in_launches(void) { return launched; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { return ++launched, 0; }
int cuCtxGetCurrent(void **context) { return *context = &launched, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &launched, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "no error", 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return *(uint64_t *)data = pointer, 0; }
"""
# What Triton's driver asks of a compiled kernel.
_METADATA = {
    "num_ctas": 1,
    "shared": 0,
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "tmem_size": None,
}


class Launches:
    """How many kernels were launched since this was made."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self._read = library.stand_in_launches
        self._read.restype = ctypes.c_long
        self._before = self._read()

    def __call__(self) -> int:
        return self._read() - self._before


class _Utils:
    """The part of triton.backends.nvidia.driver.CudaUtils that a kernel is loaded with."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, THREADS


class _Driver:
    """triton.runtime.driver.active for one GPU, always current, with its default stream."""

    def __init__(self, launcher_cls: type, target: Any):
        self.launcher_cls, self.utils, self._target = launcher_cls, _Utils(), target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _load_libcuda(folder: Path) -> ctypes.CDLL:
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_LIBCUDA)
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    # Known by its soname from now on: the launchers' dlopen("libcuda.so.1") finds this one.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _not_compiled(src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> Any:
    """triton.compile without the compiler: a CompiledKernel of `src` that has no code."""
    from triton.compiler import CompiledKernel, make_backend

    backend = make_backend(target)
    metadata = {**backend.parse_options(dict(options)).__dict__, **_METADATA, "name": src.fn.__name__, "target": target}
    made = CompiledKernel.__new__(CompiledKernel)
    made.metadata = namedtuple("KernelMetadata", sorted(metadata))(**metadata)
    made.packed_metadata = backend.pack_metadata(made.metadata)
    made.src, made.hash, made.name = src, src.fn.__name__, src.fn.__name__
    made.kernel, made.asm, made.metadata_group = b"", {}, {}
    made.module = made.function = made._run = None
    return made


def install(launcher: Callable[[type], type] | None = None) -> Launches:
    """backend="triton" takes CPU tensors and launches nothing from now on; before any op is used, never undone.

    launcher: given Triton's class of launchers, the one to use instead. Returns a count of launches.

    Raises RuntimeError where kernels are interpreted, OSError or CalledProcessError without `cc`.
    """
    import triton.compiler
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    import adamix_kernels._backends as backends
    import adamix_kernels._triton_utils as utils
    from adamix_kernels.ops import _checks
    from adamix_kernels.routing import draws

    if utils.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET: got 1, expected it unset: an interpreted kernel has no launch to measure")
    folder = Path(tempfile.mkdtemp(prefix="host-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = _load_libcuda(folder)
    nvidia.library_dirs = lambda: [str(folder)]
    knobs.cache.dir = str(folder / "cache")
    triton.compiler.compile = _not_compiled
    kind = nvidia.CudaLauncher if launcher is None else launcher(nvidia.CudaLauncher)
    driver.set_active(_Driver(kind, GPUTarget("cuda", ARCH, 32)))
    environment, problem = backends._environment_problem, utils.problem
    backends._environment_problem = lambda name: None if name == "triton" else environment(name)
    utils.problem = lambda device_type, dtype: problem("cuda", dtype)
    utils.capability = lambda device: ARCH
    _checks.values_at_hand = lambda index: False
    draws.draws_ahead = lambda device: True
    return Launches(library)
