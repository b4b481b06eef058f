"""Lays the ops out as a source tree of the Hub's `kernels`: python -m adamix_kernels._hub FOLDER.

FOLDER/build.toml, and in FOLDER/torch-ext/adamix_kernels/ the functions of adamix_kernels.functional with what they
need: PyTorch and Triton code that finds its own parts by relative imports alone, so that it works under the name that
`kernels` gives it, and more than once in a process. The modules, models and converters stay in the whole package.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parent
NAME = "adamix_kernels"
FILES = (
    "functional.py",
    "_auto.py",
    "_backends.py",
    "_environment.py",
    "_extension.py",
    "_limits.py",
    "_triton_utils.py",
    "_version.py",
)
_BUILD = "build.toml"
_INIT = '''"""AdaMix's ops: routed adapters, routed LoRA, merging, and the consistency loss."""

from . import functional
from ._backends import BackendState, BackendUnavailableError, backends
from ._version import __version__
from .functional import *

__all__ = [*functional.__all__, "BackendState", "BackendUnavailableError", "__version__", "backends"]
'''


def lay_out(folder: Path) -> Path:
    """Writes the source tree into `folder` and returns its Python package.

    Raises:
        ValueError: `folder` holds a file or another folder already.
        FileNotFoundError: build.toml is missing: this is an installed package, not its source tree.
    """
    build = _PACKAGE.parent / _BUILD
    if not build.is_file():
        raise FileNotFoundError(f"{build}: no such file: run this in the source tree")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: got {str(folder)!r}, expected a new or empty one")
    target = folder / "torch-ext" / NAME
    target.mkdir(parents=True)
    shutil.copy2(build, folder / _BUILD)
    for name in FILES:
        shutil.copy2(_PACKAGE / name, target / name)
    shutil.copytree(_PACKAGE / "ops", target / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "__init__.py").write_text(_INIT, encoding="utf-8")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adamix_kernels._hub", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new or empty one")
    try:
        print(lay_out(parser.parse_args(argv).folder))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
