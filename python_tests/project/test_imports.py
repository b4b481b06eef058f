"""The house law on imports: downward only, torch alone at the bottom, triton in its two rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adamix_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = (
    "routed_adapter", "routed_lora", "gated_adapter", "gated_lora", "router", "mixture_lora", "merge", "consistency",
)  # fmt: skip
# The public function of the first hands calls with gates to the second.
HANDED_ON = {("routed_adapter", "gated_adapter"), ("routed_lora", "gated_lora")}
# A backend of the first is built of that of the others: gates of what has none, the mixture of its parts.
BUILT_OF = {
    "gated_adapter": ("routed_adapter",), "gated_lora": ("routed_lora",),
    "mixture_lora": ("gated_lora", "routed_lora", "router"),
}  # fmt: skip
# What Triton's kernels of several ops share.
TRITON_ROOMS = ("_triton_utils", "_routed_tiles", "_gated_tiles", "_row_tiles", "_adapter_planes", "_gated_sum")
# A room may import rooms of a lower floor, and its own.
FLOORS = {
    "_environment": -1, "_limits": -1, "_version": 0, "_extras": 0, "_build": 0, "_extension": 0, "_triton_utils": 0,
    "_auto": 0, "testing": 0, "_scratch": 0, "_backends": 0.5,
    "ops": 1, "functional": 2, "routing": 2, "modules": 3, "verifying": 3, "models": 4, "packs": 4.7, "peft": 5,
    "_official_keys": 4.5, "convert": 5, "compat": 5, "tasks": 5, "reports": 5, "recipes": 5.5,
    "commands": 6, "demo": 6, "_hub": 6, "cli": 7, "__main__": 7.5, "__init__": 8,
}  # fmt: skip
# What a room may load only when first used, from inside a function.
HEAVY = {"transformers", "safetensors", "datasets", "pyarrow", "peft", "matplotlib", "rich", "accelerate", "tqdm"}


def _module(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts


def _imports(path):
    """(absolute dotted module parts, whether at the top of the file) of every import in a file."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = base + tuple((node.module or "").split(".")) if node.module else base
            if node.module is None:
                for alias in node.names:
                    yield (*target, alias.name), id(node) in top
            else:
                yield target, id(node) in top


def _room(parts):
    if len(parts) > 1 and parts[1] in FLOORS:
        return parts[1]
    assert len(parts) == 1, f"{'.'.join(parts)}: give its room a floor"
    return "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    me = _module(path)
    room = _room(me)
    for target, _ in _imports(path):
        if target[0] != "adamix_kernels":
            continue
        other = _room(target)
        if other != room and other != "__init__":
            assert FLOORS[other] < FLOORS[room], f"{'.'.join(me)} imports {'.'.join(target)}, which is not below it"
        if other == "__init__":
            assert room in ("commands", "cli", "demo"), f"{'.'.join(me)} imports the package's face"


@pytest.mark.parametrize("path", [p for p in FILES if "ops" in p.parts and set(p.parts) & set(OPS)], ids=str)
def test_an_op_imports_no_other_op_and_a_backend_no_other_backend(path):
    backends = {"reference", "triton_impl", "cuda_impl"}
    mine = next((part for part in (path.stem, *path.parts) if part in backends), None)
    op = next(part for part in path.parts if part in OPS)
    for target, _ in _imports(path):
        if target[:2] != ("adamix_kernels", "ops") or len(target) < 3 or target[2] not in OPS:
            continue
        handed_on = path.stem == "api" and (path.parent.name, target[2]) in HANDED_ON and target[3] == "api"
        built_of = mine is not None and target[2] in BUILT_OF.get(op, ()) and mine in target[3:4]
        assert target[2] in path.parts or handed_on or built_of, f"{path} imports op {target[2]}"
        if mine is not None and len(target) > 3:
            assert target[3] not in backends - {mine}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_triton_rooms_import_triton(path):
    allowed = path.stem in TRITON_ROOMS or "triton_impl" in path.parts
    assert allowed or all(target[0] != "triton" for target, _ in _imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_lies_below_the_models_needs_torch_alone(path):
    if FLOORS[_room(_module(path))] <= 3:
        assert not [target for target, _ in _imports(path) if target[0] in HEAVY]


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "transformers", "safetensors", "numpy_blocked"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
compiler = "torch._dynamo" in sys.modules
import adamix_kernels as ak

assert compiler or "torch._dynamo" not in sys.modules  # it takes longer than all the rest
torch.manual_seed(0)
x = torch.randn(4, 3, 8, requires_grad=True)
down, up = torch.randn(3, 2, 8, requires_grad=True), torch.randn(1, 8, 2)
index = torch.tensor([0, 2, 2, 0])
out = ak.routed_adapter(x, down, None, up, None, index, None, residual=x)
out = ak.routed_lora(out, torch.randn(1, 2, 8), torch.randn(1, 8, 2), None, None, base=out)
loss = ak.adamix_loss(out[:, 0], torch.tensor([1, 2])).loss
loss = loss + ak.consistency_loss(out[:2], out[2:]) + ak.merge_experts(down).sum()
loss.backward()
assert torch.isfinite(loss) and x.grad is not None and down.grad[1].isfinite().all()
layer = ak.RoutedAdapter(8, 2, 4)
assert layer(x).shape == x.shape
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
ak.adapt(model, ak.AdaMixConfig(target_modules=["0"], bottleneck=2))
assert model(x).shape == x.shape
for name in ("triton", "transformers", "safetensors"):
    assert name not in sys.modules, name
print("ran without them")
"""


def test_the_package_and_its_ops_run_without_triton_and_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ran without them" in done.stdout
