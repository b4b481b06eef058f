"""`python -m benchmarks.proof.build`: the C++/CUDA library for this machine's GPUs.

One that lies here already, of these sources and for this GPU, is not compiled again (another machine with the same
nvcc may have compiled it: ADAMIX_CUDA=1 ADAMIX_ARCHITECTURES=90 python -m adamix_kernels._build); autograd's nodes,
which are of one torch and one Python, are.
"""

from __future__ import annotations

import sys

from adamix_kernels import _build, _extension
from adamix_kernels._build import __main__ as build
from adamix_kernels.ops import _node


def main() -> int:
    """Exit status 0; 1 where nothing was built."""
    why = outdated()
    if why is not None:
        print(f"the library is built: {why}", flush=True)
        return build.main([])
    print(f"the library is here, of these sources: {_extension.library_path()}", flush=True)
    # Without its nodes the library works, in Python.
    if _node.find()[0] is None and build.main(["--node"]):
        print("autograd's nodes stay in Python")
    return 0


def outdated() -> str | None:
    """Why the library that is here will not do, or None."""
    if _extension.library_path() is None:
        return "there is none"
    try:
        if _extension.record().get("sources") != _build.sources_fingerprint(_build.source_folder()):
            return "the one here is of other sources"
    except _build.BuildError as error:
        return str(error)
    return _extension.problem()


if __name__ == "__main__":
    sys.exit(main())
