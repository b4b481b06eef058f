"""What every Triton kernel here shares: where it may run, number formats, activations, launches."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import torch
import triton
import triton.language as tl

from ._environment import tf32

# Fixed when the kernels are decorated, at import.
INTERPRETING: bool = (
    triton.knobs.runtime.interpret if hasattr(triton, "knobs") else os.environ.get("TRITON_INTERPRET") == "1"
)
_INTERPRETING = tl.constexpr(INTERPRETING)
# The launcher that Triton compiles for each signature takes what `Ready` gives it.
LAUNCHER_IS_KNOWN = not INTERPRETING and triton.__version__.startswith("3.6.")
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot serve this kind of device and dtype, or None; an op's `unsupported`."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float16, bfloat16 and float32, not {dtype}"
    if INTERPRETING:
        return None
    if device_type != "cuda":
        return f"Triton compiles for GPUs, not for {device_type!r} (TRITON_INTERPRET=1 interprets kernels in tests)"
    if torch.version.hip is not None:
        return "the shipped configurations are for NVIDIA GPUs"
    return None


def device_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this very device (without a number: on the current one), or None."""
    if INTERPRETING or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        number = "the current GPU" if device.index is None else f"GPU {device.index}"
        return f"no tensor cores in Triton below compute capability 8.0, {number} has {major}.{minor}"
    return None


def capability(device: torch.device) -> int:
    """10 * major + minor of a GPU; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 follows PyTorch's TF32 flag, three TF32 products where it is off."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32() else "tf32x3"


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype to cast to right after a load: the interpreter computes bfloat16 wrongly, so float32 there."""
    return tl.float32 if INTERPRETING and dtype == torch.bfloat16 else DTYPES[dtype]


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> None:
    """kernel[grid](*args, **meta) on `device`; an empty grid launches nothing. A recording notes it instead."""
    if 0 in grid:
        return
    recording = _here.recording
    if recording is not None:
        recording.launches.append((kernel, grid, device, args, meta))
        return
    with on(device):
        kernel[grid](*args, **meta)


def memory(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """New memory of like's device, and dtype if not another: what a launch writes, and what a recording may plan."""
    made = like.new_empty(shape, dtype=like.dtype if dtype is None else dtype)
    if _here.recording is not None:
        _here.recording.made.append(made)
    return made


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current device where it is not; nothing for another device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


class Recording:
    """While it is entered, this thread's launches are noted, not done: (kernel, grid, device, args, meta) of each."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.made: list[torch.Tensor] = []

    def __enter__(self) -> Recording:
        _here.recording = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.recording = None


class _Here(threading.local):
    recording: Recording | None = None


_here = _Here()


class Ready:
    """A compiled kernel with its grid and constants: `ready(stream, *arguments)` launches it, past Triton's JIT.

    The arguments are what `launch` was given before the constants: addresses as integers, 0 for None.
    """

    __slots__ = ("_after", "_before", "_compiled", "_launch", "_middle")

    def __init__(self, compiled: Any, grid: tuple[int, ...], constants: tuple[Any, ...]):
        launcher = compiled.run
        self._compiled, self._launch = compiled, launcher.launch
        self._before = *grid, *(1,) * (3 - len(grid))
        # No scratch memory of Triton's, no hooks.
        self._middle = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip
        self._after = constants

    def described(self) -> tuple[int, tuple[int, ...], int, int, tuple[str, ...]] | None:
        """(function, grid, threads of a block, bytes of shared memory, kinds of all arguments): what the driver's own
        launch takes; None for one that needs attributes besides."""
        metadata, launcher = self._compiled.metadata, self._compiled.run
        if metadata.num_ctas != 1 or launcher.launch_cooperative_grid or launcher.launch_pdl:
            return None
        kinds = tuple(self._compiled.src.signature.values())
        return self._compiled.function, self._before, 32 * metadata.num_warps, metadata.shared, kinds

    def __call__(self, stream: int, *arguments: int | float) -> None:
        self._launch(*self._before, stream, *self._middle, *arguments, *self._after)


def ready(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> Ready | None:
    """What launch(kernel, grid, device, *args, **meta) would launch; None for a kernel that needs scratch memory.

    Only where LAUNCHER_IS_KNOWN. It serves every launch of these types, constants and multiples of 16 as addresses.
    """
    with on(device):
        compiled = kernel.run(*args, grid=grid, warmup=True, **meta)
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            return None
        return Ready(compiled, grid, tuple(meta[name] for name in kernel.arg_names[len(args) :]))


def current_stream(device: int) -> int | None:
    """The stream to launch on; None where another device is current, or where a profiler has hung its hooks up."""
    runtime, active = triton.knobs.runtime, triton.runtime.driver.active
    if active.get_current_device() != device or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        return None
    return active.get_current_stream(device)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x rounded to DTYPE, to nearest even: the interpreter's own cast to bfloat16 truncates."""
    if _INTERPRETING and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def exp(x):
    """e^x, float32, to two spacings: tl.exp is 2^(x log2 e), whose rounded exponent costs as many as it has bits."""
    if _INTERPRETING:
        return tl.exp(x)
    else:
        t = x * 1.4426950216293335
        rest = tl.fma(x, 1.925963033500011e-8, tl.fma(x, 1.4426950216293335, -t))
        power = tl.exp2(t)
        return tl.where(tl.abs(t) < 126.0, tl.fma(power, rest * 0.6931471805599453, power), power)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_pair(z):
    """sigmoid(z) and 1 - sigmoid(z), the second as exact as the first where z is large."""
    e = tl.minimum(tl.exp(-z), 1e30)
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def _gaussian_tail(a):
    """erfc(a / sqrt 2) / 2 for a >= 0, to 3e-7, in a fifth of the instructions of erf: 2^p(a)."""
    p = -0.4592766166 + a * (-0.0525381193 + a * (0.0073872604 + a * -0.0005188704))
    return tl.exp2(-1.0000008345 + a * (-1.1510831118 + a * p))


@triton.jit
def _size(z):
    """|z|, but of infinity a large number, so that gelu of it is infinity; of -infinity NaN, as in PyTorch."""
    return tl.maximum(-z, tl.minimum(z, 1e4))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z), float32; ACTIVATION is "gelu", "gelu_16" for results of 16 bits, "gelu_tanh", "relu", "silu" or ""."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_16":
        return tl.where(z <= 0, 0.0, z) - _size(z) * _gaussian_tail(_size(z))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2 sigmoid(2u)
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        # A NaN stays, as in PyTorch.
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """d act(z) / dz, float32."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_16":
        tail = _gaussian_tail(_size(z))
        density = 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
        return tl.where(z < 0, tail, 1.0 - tail) + z * density
    elif ACTIVATION == "gelu_tanh":
        s, other = sigmoid_pair(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s * (1.0 + z * other * (1.5957691216057308 + 0.21406444881780075 * z * z))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s, other = sigmoid_pair(z)
        return s * (1.0 + z * other)
    else:
        # Not z * 0 + 1, which is NaN where z is infinite.
        return tl.zeros_like(z) + 1.0
