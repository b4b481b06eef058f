"""`python -m benchmarks.proof.race`: whether weight gradients race on this GPU, again and again on the same inputs.

Triton 3.6 overwrites a pipelined tile that an asynchronous dot still reads (ptx/race.py). The smallest kernel that has
it runs as it was found and as it is mended; the backwards of this package run as they are, or, with --package, as
another copy has them: `git archive 78189c0^ adamix_kernels | tar -x -C before` makes one that races.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Nothing of benchmarks: it would bring this tree's own adamix_kernels along.
import torch

REPEATS, BACKENDS = 100, ("triton", "cuda")
# Relative error of a gradient in 16 bits that no rounding explains.
WRONG = 0.03
# batch, tokens, width, rank, experts: few tokens and many, tails, wide ranks.
SHAPES = ((16, 512, 1024, 16, 4), (64, 128, 768, 48, 4), (7, 333, 1024, 64, 3), (128, 512, 1024, 32, 4))


def told(call: Callable[[], Sequence[torch.Tensor]], truth: Sequence[torch.Tensor]) -> tuple[int, float]:
    """(of REPEATS calls those that gave other bits than the first, the largest relative error of any)."""
    first = [t.clone() for t in call()]
    different = torch.zeros((), dtype=torch.int64, device=first[0].device)
    worst = torch.zeros((), dtype=torch.float64, device=first[0].device)
    for _ in range(REPEATS):
        found = call()
        same = torch.stack([(one == other).all() for one, other in zip(found, first)]).all()
        different += ~same
        errors = [(one.double() - want).norm() / want.norm() for one, want in zip(found, truth)]
        worst = torch.maximum(worst, torch.stack(errors).max().nan_to_num(nan=float("inf")))
    return int(different.item()), worst.item()


def smallest(device: torch.device) -> Iterator[tuple[str, int, float]]:
    """ptx.race.grads: (what, differing calls, error)."""
    from ptx.race import grads

    n, c, r = 4096 + 40, 128, 64
    z, g = (torch.randn(n, k, device=device, dtype=torch.bfloat16) for k in (c, r))
    truth = [z.double().T @ g.double(), g.double().sum(0)]
    for sum_from in ("tile", "again"):
        out, bias = torch.empty(c, r, device=device), torch.empty(r, device=device)

        def call(sum_from=sum_from, out=out, bias=bias) -> Sequence[torch.Tensor]:
            out.fill_(float("nan"))
            bias.fill_(float("nan"))
            # All blocks do the same work and write the same numbers, so that the memory is busy.
            options = dict(SUM=sum_from, ROWS=64, C=c, R=r, num_warps=4, num_stages=3)
            grads[(528,)](z, g, out, bias, n, **options)
            return out, bias

        yield f"smallest kernel, sum of {sum_from}", *told(call, truth)


def backwards(device: torch.device) -> Iterator[tuple[str, int, float]]:
    """routed_adapter and routed_lora of every backend: (what, differing calls, error)."""
    from adamix_kernels import routed_adapter, routed_lora

    for batch, tokens, width, rank, experts in SHAPES:
        draw = lambda *shape, scale=1.0: (torch.randn(*shape, device=device) * scale).bfloat16()  # noqa: E731
        x, grad = draw(batch, tokens, width), draw(batch, tokens, width)
        down, up = draw(experts, rank, width, scale=width**-0.5), draw(1, width, rank, scale=rank**-0.5)
        down_bias, up_bias = draw(experts, rank), draw(1, width)
        index = torch.randint(experts, (batch,), device=device)
        ops = {
            "routed_adapter": ((x, down, down_bias, up, up_bias), lambda x, d, db, u, ub, backend, index=index:
                               routed_adapter(x, d, db, u, ub, index, None, residual=x, backend=backend)),
            "routed_lora": ((x, down, up, grad), lambda x, a, b, base, backend, index=index:
                            routed_lora(x, a, b, index, None, base=base, scaling=2.0, backend=backend)),
        }  # fmt: skip
        for op, (leaves, function) in ops.items():

            def gradients(backend: str, dtype: torch.dtype, leaves=leaves, function=function, grad=grad):
                given = [t.detach().to(dtype).requires_grad_() for t in leaves]
                out = function(*given, backend)
                return lambda: torch.autograd.grad(out, given, grad.to(dtype), retain_graph=True)

            truth = gradients("reference", torch.float64)()
            for backend in BACKENDS:
                what = f"{op} {backend} {batch}x{tokens}x{width} r{rank}"
                try:
                    yield what, *told(gradients(backend, torch.bfloat16), truth)
                except (RuntimeError, ValueError, TypeError) as error:
                    print(f"{what}: not run: {_described(error)}", flush=True)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:200]


def of(package: str) -> None:
    """From now on adamix_kernels is the one in that folder; ImportError where it is another one."""
    sys.path.insert(0, package)
    import adamix_kernels

    found = Path(adamix_kernels.__file__).resolve().parent
    if found != (Path(package) / "adamix_kernels").resolve():
        raise ImportError(f"--package: got adamix_kernels of {found}, expected that of {package}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a backward of the package gave other bits, or wrong ones; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.race", description=__doc__)
    parser.add_argument("--package", help="folder that holds another adamix_kernels")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("race: this machine has no CUDA GPU", file=sys.stderr)
        return 2
    device, bad = torch.device("cuda"), 0
    torch.manual_seed(0)
    if options.package:
        of(options.package)
    else:
        try:
            for what, different, error in smallest(device):
                print(f"{what}: {different} of {REPEATS} calls differ, error {error:.1e}", flush=True)
        except Exception as error:
            # Another Triton may not have it; the package's own are looked at all the same.
            print(f"smallest kernel: not run: {_described(error)}", flush=True)
    whose = f"{options.package}: " if options.package else ""
    for what, different, error in backwards(device):
        bad += different > 0 or error > WRONG
        print(f"{whose}{what}: {different} of {REPEATS} calls differ, error {error:.1e}", flush=True)
    print(f"{bad} backwards race or are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
