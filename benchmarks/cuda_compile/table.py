"""The table of csrc/'s kernels: what every compiler made of each for each GPU, and what may not stand in it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import RESULTS
from ..measure.record import write_csv

TABLE = RESULTS / "cuda_compile.csv"
# 10 * compute capability -> the shape in the name of a 16-bit matrix instruction.
SHAPES = {70: "884", 75: "1688", 80: "16816", 90: "16816", 100: "16816", 120: "16816"}
_DTYPES = {"half": "float16", "bfloat16": "bfloat16"}
_STATIC_SHARED_LIMIT = 48 * 1024
# Kernels, or those whose template's last argument is named, that are launched from this target on alone; below it csrc/
# takes another one.
_FROM = {
    "merge_lora_product_kernel/false": 75,
    "merge_lora_product_kernel/true": 80,
    "routed_adapter_resident_forward_kernel": 75,
    "routed_adapter_resident_input_grad_kernel": 75,
    "routed_adapter_one_pass_kernel": 75,
    "routed_lora_one_pass_kernel": 75,
    "sample_grads_kernel": 75,
    "router_forward_kernel": 75,
    "gated_forward_mma_kernel": 75,
    "mixture_forward_mma_kernel": 75,
    "gated_resident_forward_kernel": 75,
    "gated_input_grad_mma_kernel": 75,
    "gated_weight_grad_mma_kernel": 75,
    "gated_sorted_forward_mma_kernel": 75,
    "gated_sorted_input_grad_mma_kernel": 75,
    "gated_sorted_weight_grad_mma_kernel": 75,
    "routed_lora_forward_mma_kernel": 75,
    "routed_lora_input_grad_mma_kernel": 75,
    "routed_lora_weight_grad_mma_kernel": 75,
}
# Kernels that are launched below this target alone, and empty from it on.
_BELOW = {"routed_adapter_held_forward_kernel": 75, "held_one_pass_kernel": 75}
# Kernels that keep to a number of registers, as more would halve the warps on a multiprocessor: from which target on,
# and how many bytes of spill stores and of spill loads they may show.
_MAY_SPILL = {
    "routed_adapter_resident_forward_kernel": (70, 1024, 1024),
    "routed_adapter_resident_input_grad_kernel": (70, 560, 580),  # most of it for tiles of several experts
    "routed_adapter_one_pass_kernel": (70, 88, 128),
    "held_one_pass_kernel": (70, 200, 212),  # most of it the sums of grad_out's columns, and what a block reads once
    "routed_lora_one_pass_kernel": (90, 4, 4),
    "routed_adapter_pass_sum_kernel": (100, 16, 16),
    "routed_lora_pass_sum_kernel": (100, 16, 16),
    "sample_sum_kernel": (100, 16, 16),
    "router_forward_kernel": (75, 16, 32),  # bfloat16 on a GPU that has no matrix unit for it
    "gated_forward_mma_kernel": (80, 32, 32),
    "mixture_forward_mma_kernel": (75, 176, 184),  # a few words a step of the second product
    "gated_resident_forward_kernel": (70, 192, 64),
    "merge_lora_product_kernel": (70, 320, 208),  # float32 factors, split into two of 16 bits
    "gated_input_grad_mma_kernel": (75, 44, 52),
    "gated_weight_grad_mma_kernel": (75, 144, 196),
    "gated_sorted_input_grad_mma_kernel": (90, 20, 28),
    "gated_sorted_weight_grad_mma_kernel": (75, 16, 20),  # of an adapter's biases
    "pair_loss_kernel": (90, 64, 28),  # rows of which no cluster holds all
    "routed_lora_forward_mma_kernel": (75, 60, 124),  # pointers to rows of x
    "routed_lora_input_grad_mma_kernel": (100, 60, 256),
}


@dataclass(frozen=True)
class Row:
    """One kernel with its template's arguments, compiled for one GPU.

    registers, spill_stores, spill_loads (bytes), stack_bytes: of a thread. shared_bytes: of a block, without what a
    launch asks for. mma: the matrix instructions in the machine code. async_copy: bits of the widest cp.async in it.
    source: fingerprint of the file and what it includes, without comments.
    """

    kernel: str
    target: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int
    mma: str
    async_copy: int
    file: str
    source: str
    compiler: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.kernel, self.target

    @property
    def name(self) -> str:
        return self.kernel.partition("<")[0]

    @property
    def dtype(self) -> str:
        """Of the first 16-bit type among the template's arguments; float32 without one."""
        words = re.findall(r"\w+", self.kernel.partition("<")[2])
        return next((_DTYPES[word] for word in words if word in _DTYPES), "float32")

    @property
    def last(self) -> str:
        """The last of the template's arguments."""
        return re.findall(r"\w+", self.kernel)[-1]

    def __str__(self) -> str:
        return f"{self.kernel} on sm_{self.target}"


COLUMNS = tuple(f.name for f in fields(Row))
_NUMBERS = ("target", "registers", "spill_stores", "spill_loads", "stack_bytes", "shared_bytes", "async_copy")
_FIGURES = (*_NUMBERS[1:], "mma")


def problems(rows: Sequence[Row]) -> list[str]:
    """What no kernel may show: spills beyond what it is allowed, too much shared memory, a product of 16-bit matrices
    off the matrix units.

    A kernel multiplies matrices if it does so with a matrix instruction on any GPU. bfloat16 has one from sm_80 on.
    """
    found = []
    products = {row.name for row in rows if row.mma}
    for row in rows:
        first, stores, loads = _MAY_SPILL.get(row.name, (0, 0, 0))
        if row.target < first:
            stores = loads = 0
        if row.spill_stores > stores or row.spill_loads > loads:
            found.append(f"{row}: {row.spill_stores} B of spill stores, {row.spill_loads} B of spill loads")
        if row.shared_bytes > _STATIC_SHARED_LIMIT:
            found.append(f"{row}: {row.shared_bytes} B of static shared memory, {_STATIC_SHARED_LIMIT} at most")
        if row.name not in products or row.dtype == "float32":
            continue
        first = _FROM.get(f"{row.name}/{row.last}", _FROM.get(row.name, 0))
        if (row.dtype == "bfloat16" and row.target < 80) or not first <= row.target < _BELOW.get(row.name, 1000):
            continue
        kinds = row.mma.split("+")
        if not all(kind.startswith(f"HMMA.{SHAPES[row.target]}.") for kind in kinds):
            found.append(f"{row}: {row.mma or 'no matrix instruction'}, HMMA.{SHAPES[row.target]} is expected")
    return found


def differences(committed: Sequence[Row], compiled: Sequence[Row]) -> list[str]:
    """Where the committed table and what was compiled part.

    Kernels and sources are compared always, figures between rows of the same compiler.
    """
    found = [f"{key}: two rows" for key, count in Counter(row.key for row in committed).items() if count > 1]
    have, made = {row.key: row for row in committed}, {row.key: row for row in compiled}
    found += [f"{row}: in the table, and no such kernel" for key, row in have.items() if key not in made]
    found += [f"{row}: not in the table" for key, row in made.items() if key not in have]
    for key in sorted(have.keys() & made.keys()):
        old, new = have[key], made[key]
        if old.source != new.source:
            found.append(f"{new}: its source has changed")
        if old.compiler == new.compiler:
            found += [
                f"{new}: {name} {getattr(new, name)}, the table has {getattr(old, name)}"
                for name in _FIGURES
                if getattr(new, name) != getattr(old, name)
            ]
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows as CSV, sorted, whole or not at all."""
    write_csv(path, COLUMNS, map(asdict, sorted(rows, key=lambda row: row.key)))


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `write` made; ValueError names the columns when the header is another."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [Row(**line | {name: int(line[name]) for name in _NUMBERS}) for line in reader]
