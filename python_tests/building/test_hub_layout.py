"""The Hub's `kernels` layout: relative imports alone, under any name, beside the installed package."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest

from adamix_kernels import _hub

USE = """
import sys
import torch

assert "adamix_kernels" not in sys.modules
import kernel_7f3a as copy

assert copy.__file__.startswith(sys.argv[1]) and "adamix_kernels" not in sys.modules
assert copy.backends()["reference"].usable
torch.manual_seed(0)
x = torch.randn(4, 3, 8, requires_grad=True)
down, up = torch.randn(3, 2, 8, requires_grad=True), torch.randn(1, 8, 2)
index = torch.tensor([0, 2, 2, 0])


def run(ops):
    out = ops.routed_adapter(x, down, None, up, None, index, None, residual=x)
    lora = ops.routed_lora(out, torch.ones(1, 2, 8), torch.ones(1, 8, 2), None, None, base=out)
    loss = ops.adamix_loss(lora[:, 0], torch.tensor([1, 2])).loss + ops.merge_experts(down).sum()
    loss = loss + ops.consistency_loss(out[:2], out[2:])
    return loss.detach(), *torch.autograd.grad(loss, (x, down))


got = run(copy)
expected = x + torch.nn.functional.gelu(x @ down[index].mT) @ up.mT
torch.testing.assert_close(copy.routed_adapter(x, down, None, up, None, index, None, residual=x), expected)
compiled = torch.compile(lambda x: copy.routed_adapter(x, down, None, up, None, index, None), fullgraph=True,
                         backend="aot_eager")
torch.testing.assert_close(compiled(x), expected - x)
assert hasattr(torch.ops.kernel_7f3a, "routed_adapter") and not hasattr(torch.ops.adamix_kernels, "routed_adapter")
sys.path.append(sys.argv[2])
import adamix_kernels

assert all(torch.equal(a, b) for a, b in zip(got, run(adamix_kernels)))
print("both ran")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "source"
    assert _hub.main([str(folder)]) == 0
    return folder


def test_all_imports_are_relative_or_of_others(tree):
    files = sorted((tree / "torch-ext").rglob("*.py"))
    assert {"__init__.py", "functional.py", "op.py", "reference.py", "api.py"} <= {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {*sys.stdlib_module_names, "torch", "triton"}, f"{path}: {roots}"


def test_it_runs_under_another_name_beside_the_package(tree, tmp_path):
    shutil.copytree(tree / "torch-ext" / _hub.NAME, tmp_path / "kernel_7f3a")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = tmp_path / "use.py"
    script.write_text(USE, encoding="utf-8")
    root = str(_hub._PACKAGE.parent)
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", str(script), str(tmp_path), root]
    if os.environ.get("PYTHONPATH"):  # what the tests were given, but this package
        env["PYTHONPATH"] = os.pathsep.join(p for p in os.environ["PYTHONPATH"].split(os.pathsep) if p != root)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), env.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "both ran\n"


def test_it_writes_into_new_folders_only(tree, capsys):
    with pytest.raises(ValueError, match="expected a new or empty one"):
        _hub.lay_out(tree)
    with pytest.raises(SystemExit, match="2"):
        _hub.main([str(tree)])
    assert "expected a new or empty one\n" in capsys.readouterr().err


def test_build_toml_names_the_package(tree):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    values = tomllib.loads((tree / "build.toml").read_text(encoding="utf-8"))
    assert values["general"]["name"].replace("-", "_") == _hub.NAME
    assert values["torch-noarch"] == {}  # no compiled sources, and Python files alone
    files = [path for path in (tree / "torch-ext").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py"}


def test_kernels_reads_build_toml(tree):
    kernels = pytest.importorskip("kernels._rust")
    general = kernels.Build.open(tree).general
    assert general.backends == [kernels.Backend.CPU, kernels.Backend.CUDA]


def test_kernels_loads_it(tree, tmp_path, monkeypatch):
    """The folder that kernel-builder would make of it, made by hand: a variant with its metadata."""
    kernels = pytest.importorskip("kernels")
    torch = pytest.importorskip("torch")
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(tree / "torch-ext" / _hub.NAME, variant)
    metadata = {
        "id": "_adamix_kernels_cpu_0a1b2c3", "name": "adamix-kernels", "version": 1, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    module = kernels.get_local_kernel(tmp_path, backend="cpu")
    bank = torch.randn(3, 4)
    torch.testing.assert_close(module.merge_experts(bank), bank.mean(0))
    assert hasattr(torch.ops._adamix_kernels_cpu_0a1b2c3, "merge_experts")
