"""Where the package writes pickles: in its source, and in what its functions leave on the disk."""

from __future__ import annotations

import ast
import contextlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from adamix_kernels import merge, save_adamix
from adamix_kernels.convert import export_peft

from .. import small_models

# (module, function): each writes a file of another library's format, which that library reads under this very name.
ALLOWED = {
    "models/_files.py:write_pickled_tensors": "AdapterHub's pytorch_adapter.bin: tensors alone",
    "models/trainer_checkpoints.py:_save": "the base Trainer's training_args.bin",
    "models/trainer_checkpoints.py:_save_optimizer_and_scheduler": "the base Trainer's scheduler.pt, under FSDP",
}
_WRITERS = {("torch", "save"), ("np", "save"), ("numpy", "save")}
_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_WRITING = {"dump", "dumps", "Pickler", "open"}


def calls_in(folder: Path) -> list[str]:
    """file:function of every call that writes a pickle."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(folder).as_posix()}:{name}" for name in _calls(tree, "module")]
    return found


def _calls(node: ast.AST, function: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        called = isinstance(child, ast.Call) and _writes(child.func)
        names = child.names if isinstance(child, ast.ImportFrom) else []
        if called or any(_writes_name(child.module, alias.name) for alias in names):
            yield inside
        yield from _calls(child, inside)


def _writes(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return False
    return _writes_name(function.value.id, function.attr)


def _writes_name(module: str | None, name: str) -> bool:
    return (module, name) in _WRITERS or (module in _MODULES and name in _WRITING)


def written_by_everything(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """(files, those that are pickles, calls of the package to a writer of pickles) of save, merge, and export_peft."""
    with watched() as ours:
        for number, kind in enumerate(small_models.KINDS):
            model = small_models.adapted(kind)
            save_adamix(model, folder / f"{number}" / "experts")
            merge(model)
            save_adamix(model, folder / f"{number}" / "merged")
            if "LoRA" in kind:
                export_peft(model, folder / f"{number}" / "peft")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files, [path.name for path in files if is_pickle(path)], ours


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the functions of adamix_kernels that call torch.save or pickle meanwhile."""
    found: list[str] = []

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_globals.get("__name__", "").startswith("adamix_kernels"):
                found.append(f"{caller.f_globals['__name__']}.{caller.f_code.co_name}")
            return original(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "save"), (pickle, "dump"), (pickle, "dumps")):
            stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name))))
        yield found


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of protocol 2 and later, or a zip of torch.save."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(".pkl") for name in file.namelist())
    start = path.read_bytes()[:2]
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= pickle.HIGHEST_PROTOCOL
