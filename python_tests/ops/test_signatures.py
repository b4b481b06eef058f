"""Every list of an op's arguments is the one in its signatures.py: the C++ library's schemas, Triton's functions."""

import ast
import re
from pathlib import Path

import pytest
import torch

from adamix_kernels.ops.consistency.signatures import AdaMix, AdaMixBackward, Consistency, ConsistencyBackward, Linear
from adamix_kernels.ops.gated_adapter import signatures as gated_adapter
from adamix_kernels.ops.gated_lora import signatures as gated_lora
from adamix_kernels.ops.merge.signatures import Experts, ExpertsBackward, LoRA, LoRABackward, LoRAs
from adamix_kernels.ops.mixture_lora import signatures as mixture_lora
from adamix_kernels.ops.routed_adapter import signatures as routed_adapter
from adamix_kernels.ops.routed_lora import signatures as routed_lora
from adamix_kernels.ops.router import signatures as router

ROOT = Path(__file__).parents[2]
# (op, the C++ library's op, the folder, Triton's function, the list)
OPS = [
    *(
        case
        for op, lists in dict(
            routed_adapter=routed_adapter, routed_lora=routed_lora, gated_adapter=gated_adapter, gated_lora=gated_lora
        ).items()
        for case in (
            (op, f"{op}_forward", op, "forward", lists.Forward),
            (f"{op}_backward", f"{op}_backward", op, "backward", lists.Backward),
        )
    ),
    ("routed_lora_", "routed_lora_forward_", "routed_lora", "forward", routed_lora.Forward),
    ("gated_lora_", "gated_lora_forward_", "gated_lora", "forward", gated_lora.Forward),
    ("router", "router_forward", "router", "forward", router.Forward),
    ("router_backward", None, "router", None, router.Backward),
    ("mixture_lora", "mixture_lora_forward", "mixture_lora", "forward", mixture_lora.Forward),
    ("mixture_lora_", "mixture_lora_forward_", "mixture_lora", "forward", mixture_lora.Forward),
    ("mixture_lora_backward", None, "mixture_lora", None, mixture_lora.Backward),
    ("merge_experts", "merge_experts_forward", "merge", "experts_forward", Experts),
    ("merge_experts_backward", "merge_experts_backward", "merge", "experts_backward", ExpertsBackward),
    ("merge_lora", "merge_lora_forward", "merge", "lora_forward", LoRA),
    ("merge_loras", "merge_loras_forward", "merge", "loras_forward", LoRAs),
    ("merge_lora_backward", None, "merge", None, LoRABackward),
    ("consistency", "consistency_forward", "consistency", "forward", Consistency),
    ("consistency_backward", "consistency_backward", "consistency", "backward", ConsistencyBackward),
    ("adamix_loss", "adamix_forward", "consistency", "adamix_forward", AdaMix),
    ("adamix_loss_backward", "adamix_backward", "consistency", "adamix_backward", AdaMixBackward),
    ("linear_adamix_loss", None, "consistency", None, Linear),
]
# What a backend takes behind an op's arguments: where to write, and for what incoming gradient.
BEHIND = {"float expected", "float? expected", "Tensor(a!)? da", "Tensor(b!)? db", "Tensor(a!)? d_logits",
          "Tensor(a!) d_logits"}  # fmt: skip


def _csrc():
    text = (ROOT / "csrc/registration.cpp").read_text()
    found = ("".join(re.findall(r'"([^"]*)"', call)) for call in re.findall(r"m\.def\((.*?)\);", text, re.S))
    return {schema.partition("(")[0]: schema.partition("(")[2].rpartition(" -> ")[0][:-1] for schema in found}


@pytest.mark.parametrize(("op", "cuda", "folder", "triton", "arguments"), OPS, ids=[case[0] for case in OPS])
def test_one_list_of_arguments(op, cuda, folder, triton, arguments):
    schema = str(getattr(torch.ops.adamix_kernels, op).default._schema).partition("(")[2].rpartition(" -> ")[0][:-1]
    *types, backend = schema.split(", ")
    assert backend == "str backend"
    assert [field.split()[-1] for field in types] == list(arguments._fields)
    if cuda is not None:
        there = _csrc()[cuda].split(", ")
        assert there[: len(types)] == types
        assert set(there[len(types) :]) <= BEHIND
    if triton is not None:
        tree = ast.parse((ROOT / f"adamix_kernels/ops/{folder}/triton_impl/__init__.py").read_text())
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == triton)
        names = [a.arg for a in function.args.args]
        assert names[: len(types)] == list(arguments._fields)
        assert set(names[len(types) :]) <= {"inplace", "out", "expected"}


def test_every_op_is_in_the_table():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("adamix_kernels::")}
    assert {name.partition("::")[2] for name in registered} == {case[0] for case in OPS} | {"merge_banks"}
