"""docs/counts.md and its picture, from benchmarks/results/count.csv and the model alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .. import ROOT, plot
from ..measure.record import write_text
from . import full as count_full
from . import gates as count_gates
from . import model
from .table import Row

PAGE = ROOT / "docs" / "counts.md"
PICTURE = PAGE.with_suffix(".png")
# Shapes of a few rows, whose share of copy bandwidth says nothing: only launches count there.
_SMALL = 1_000_000
# Of copy bandwidth.
MERGE_GOAL = 0.9
_COLOURS = {"V100": "#9aa3ad", "A100": "#6b8f71", "H100": "#3b6fb6", "H200": "#d9822b", "B200": "#8e5ea2"}


_HEAD = (
    "Nothing on this page was measured on a GPU. What compiled kernels do at the sizes that matter is counted on "
    "a CPU, and the counts say how fast a GPU can run them. `make count` counts again and fails where a count has "
    "grown by more than 5%; `python -m benchmarks.count --write` writes "
    "[benchmarks/results/count.csv](../benchmarks/results/count.csv) and this page. `adamix bench gpu-proof` "
    "prints the predictions beside what it measures."
)
_METHOD = (
    "A call of the op at its real size, of either backend; its launches run as PTX in the executor of "
    "[ptx/](../ptx/README.md), Triton's as Triton compiles it, those of csrc/ as nvcc does (NVRTC for the V100). "
    "Of a launch so many blocks run, evenly spread, until 3 million warp instructions or 2,048 blocks are "
    "reached; all counts are scaled from those blocks to the grid. Large tensors repeat 4 MB of random numbers "
    "and take no memory.",
    "Machine instructions: executed PTX, loop by loop, times the ratio of both codes' instructions in that loop, "
    "after the assembler (ptxas, nvdisasm); a product of wmma is as many as it becomes. Loops are matched by what "
    "the assembler leaves alone (loads, stores, exponentials, matrix products), their size and lines, the most alike "
    "first, and in order where that tells nothing; what it leaves alone also tells how far it unrolled one.",
    "Bytes in flight: in the machine code, what a warp has asked for when the first register loaded is used, or "
    "the groups of cp.async that may be open when one is waited for.",
    "Not counted: kernels in which a function calls another one.",
    "A cluster's blocks run one after another; what one reads from another's shared memory is its own, and costs what "
    "its own costs. Clusters of eight are taken to fill all multiprocessors; a chip whose groups are not whole runs "
    "fewer of them at once, and the backward in one pass then takes smaller ones, which write more. A tile of wmma "
    "counts the bank waves that ldmatrix would take.",
    "B200: the counts of sm_90's code, as the executor has no sm_100.",
)
_WORDS = (
    "Instructions: of warps, machine code, in all (millions) and for a byte of the op's floor; PTX: machine "
    "instructions for one of PTX. Loaded: bytes through L2; device: bytes to and from memory under the model's "
    "L2; both over the floor. Of the launch that takes longest: bytes in flight on a multiprocessor, its blocks "
    "and warps there, waves, barriers in a step of the main loop, and the limit that binds; banks: passes over "
    "shared memory over the fewest. The columns before the shares are those of the newest target counted, as a "
    "rule sm_90; V100 and A100 have counts of their own in the CSV. Shares are of copy bandwidth; where an op "
    "moves less than a megabyte none is given, as only its launches count. Newer than the pairing of the most alike "
    "loops (before, their order decided) are the counts of csrc/'s losses and of its backwards on sm_90, and of "
    "Triton's losses of 30,522 and 128,256 classes. Older than the matching of wmma's products, and of loops that "
    "ptxas leaves by a call, are, from sm_80 on, the counts of one expert a token beside gates. Sizes of loops are "
    "compared in machine code, and what L1 serves again misses no L2, in the counts of csrc/'s losses from sm_80 on "
    "and of merge_lora on sm_90."
)
_MERGES = (
    f"Merges below {MERGE_GOAL} of an H100's copy bandwidth, beside the most that the bytes they move at least and the "
    "ramps of their launches allow at that size:"
)
_WIDE = (
    "Triton's losses of 128,256 classes: of a row's 31 steps registers hold 7 from the first pass to the second; "
    "the others are read again for the gradients, half of them from memory, 0.19 of the floor. Shared memory has room "
    "for 8 steps more, but Triton gives it to copies in flight alone, and Triton 3.6 does not compile a sum over a "
    "cluster's blocks (num_ctas=2 fails in TritonGPUPlanCTAPass). csrc/ holds the row in a cluster's shared memory."
)
_WAYS = (
    "The losses' gradient is written in three ways, each for its count: with the loss (1.0 to 1.3 of the floor); in "
    "the backward (float16 without an expected scale, 1.5); and in place, where another gradient comes in than was "
    "expected, by a multiplication of what lies there. That moves as many bytes again as the floor, and returns at "
    "once where there is nothing to do, as torch's own would not. Only a cluster's blocks share a row (csrc/, sm_90), "
    "which is then read once; on sm_80, 128,256 classes are read twice in part and come to 1.2 of the floor."
)
_ROUTED = (
    "Adapters and LoRA below what was wanted of them, and what binds: N rows of H = 1,024 columns of 16 bits, the "
    "model's times for an H100 where no other GPU is named."
)
_LIMITS = (
    "Adapter forward, r = 16, N = 8,192: 0.82 (csrc/) and 0.79 (Triton), wanted 0.85. x and out take 11.4 "
    "microseconds, the weights 0.15 and the launch's ramp 2: 0.84 at most. 0.85 would take a ramp below 1.9; fewer "
    "bytes there are none.",
    "Adapter forward, r = 48: weights read through L2 are 0.77 of what a tile's own rows move, wanted 0.5. A tile of "
    "R rows reads 48 / R of that in weights, 0.75 at 64 rows; 0.5 takes 96 rows and more. Those fit neither into the "
    "registers (64 rows are half of them, sums and operands the rest) nor, beside the sums, into shared memory, and "
    "at N = 8,192 would leave 46 of 132 multiprocessors without a tile. A cluster whose two blocks are sent the same "
    "weights (multicast) would come to 0.39; no kernel here does so.",
    "Adapter backward, r = 48 and 64: 8.7 and 8.9 N H bytes, wanted 8. Two passes read grad_out twice and x once and "
    "write dx, which is 8. Between them pre is read, dpre and h are written and read, 10 N r bytes (0.47 and 0.63 N "
    "H); the shares' sums and the weights are the rest. One pass keeps the sums of both weight gradients, 8 r H "
    "bytes: 131 KB at r = 16, 393 KB at r = 48, where a multiprocessor has 256 KB of registers. The four blocks of a "
    "cluster could share them, but every cluster leaves as many bytes an expert to be summed: 13 MB beside a floor of "
    "50 at N = 8,192, and more where its rows have several experts (calculated).",
    "Adapter backward, r = 16, N = 8,192: 0.75 (csrc/) and 0.56 (Triton), wanted 0.75. The floor takes 17.1 "
    "microseconds. csrc/: with the sums that blocks leave 18.3, ramps 2 and 1, 0.80 at most. Triton reads grad_out "
    "twice at this size, 1.32 of the floor in three launches: 0.60 at most.",
    "Adapter backward, r = 48, H = 768, on a V100: 0.29, where 0.60 is wanted at r = 16 (there 0.72). The kernels for "
    "any shape take 0.60 warp instructions a byte with 4 warps a multiprocessor, of which the model issues 1.25 a "
    "cycle: 0.32 at most. The one pass of a V100 holds 16 ranks.",
)
_GATES = (
    "What gates cost beside one expert a token without any, at the same size: instructions, bytes (those that each "
    "launch moves at least) and device bytes (as above, under the model's L2) over those of routing by token, and "
    "launches. Up to 256 narrow columns of all experts (M r), `make count` fails above "
    f"{count_gates.INSTRUCTIONS} of the instructions, {count_gates.BYTES} of the bytes, or a launch more; beyond, "
    f"above {count_gates.LAUNCHES['wide']} launches more. Those that cost more stand below the table, with the reason; "
    "forward and backward of a size together are held to the same, but for a V100 "
    f"({count_gates.STEP_V100} of the bytes, as below the table)."
)

_MIXTURES = (
    "A router and the LoRAs that it weighs as one op (`mixture_lora`) beside both ops of that size: instructions "
    "over those of both and of gated LoRA alone, bytes (those that each launch moves at least) over gated LoRA's, and "
    "launches. `make count` fails where it takes as many instructions as both, more than "
    f"{count_gates.MIXTURE_BYTES} of gated LoRA's bytes, or a launch more than that."
)


def page(rows: Sequence[Row]) -> str:
    """The page."""
    formula = (model.__doc__ or "").partition("\n\n")[2].strip("\n")
    parts = [
        "# Counts",
        _filled(_HEAD),
        f"[![predicted share of copy bandwidth]({PICTURE.name})]({PICTURE.name})",
        "## How it is counted",
        "\n".join(_filled(text, "- ") for text in _METHOD),
        f"## The model\n\n```text\n{formula}\n```",
        "\n".join(_gpus()),
        "\n".join(_filled(f"{name}: {source}.", "- ") for name, source in model.SOURCES.items()),
        "## The counts",
        _filled(_WORDS),
        "\n".join(_table(rows)),
        *(["\n".join([_filled(_MERGES), "", *(_filled(line, "- ") for line in few)])] if (few := merges(rows)) else []),
        _filled(_WIDE),
        _filled(_WAYS),
        *([_filled(said)] if (said := count_full.sentence(rows)) else []),
        "\n".join([_filled(_ROUTED), "", *(_filled(line, "- ") for line in _LIMITS)]),
        "## Gates",
        _filled(_GATES),
        "\n".join(count_gates.table(rows)),
        *(["\n".join(_filled(line, "- ") for line in more)] if (more := count_gates.exceptions(rows)) else []),
        *([_filled(_MIXTURES), "\n".join(mixed)] if (mixed := count_gates.mixture_table(rows)) else []),
    ]
    reasons = [_filled(f"{row}: {row.reason}", "- ") for row in rows if row.reason]
    parts += ["## Counts that have grown, and why", "\n".join(reasons)] if reasons else []
    return "\n\n".join(parts) + "\n"


def _filled(text: str, bullet: str = "") -> str:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 118, initial_indent=bullet, subsequent_indent=" " * len(bullet), **options)


def _gpus() -> list[str]:
    lines = [
        "| GPU | code for | multiprocessors | clock, GHz | copy, TB/s | L2, MB | L2, TB/s | bytes in flight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for g in model.GPUS:
        lines.append(
            f"| {g.name} | sm_{g.target} | {g.multiprocessors} | {g.clock / 1e9:.4g} | {g.copy / 1e12:.3g} | "
            f"{g.l2 / 1e6:.0f} | {g.l2_rate / 1e12:.3g} | {g.needed / 1e3:.0f} KB |"
        )
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    names = [g.name for g in model.GPUS]
    lines = [
        "| op, size | backend | launches | instructions, M | a byte | PTX | loaded | device | in flight, KB | "
        f"blocks, warps | waves | barriers | banks | limit | {' | '.join(names)} |",
        "|---" * (14 + len(names)) + "|",
    ]
    for group in grouped(rows).values():
        row = max(group, key=lambda one: one.target)
        shares = {name: value for one in group for name, value in one.shares.items()}
        cells = [f"{shares[n]:.2f}" if n in shares and row.floor >= _SMALL else "" for n in names]
        lines.append(
            f"| {row.op}, {row.shape}, {row.dtype} | {row.backend} | {row.launches} | {row.instructions / 1e6:.3g} | "
            f"{row.a_byte:.3g} | {row.sass_ratio:.2f} | "
            f"{row.loaded:.2f} | {row.device:.2f} | {row.in_flight / 1e3:.1f} | {row.blocks_an_sm}, "
            f"{row.warps_an_sm} | {row.waves:.3g} | {row.barriers:.3g} | {row.bank_waves:.2f} | {row.limit} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def merges(rows: Sequence[Row]) -> list[str]:
    """Those below MERGE_GOAL on an H100, and the most that their sizes allow."""
    gpu = next(gpu for gpu in model.GPUS if gpu.name == "H100")
    found = []
    for row in rows:
        share = row.shares.get(gpu.name)
        if row.op.startswith("merge_") and share is not None and share < MERGE_GOAL:
            most = row.floor / (row.floor * row.distinct + row.launches * model.RAMP * gpu.copy)
            found.append(f"{row.op} {row.shape} {row.dtype}, {row.backend}: {share:.2f} of at most {most:.2f}")
    return found


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows of one op, size and backend, their targets together."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.shape, row.dtype, row.backend), []).append(row)
    return found


def picture(rows: Sequence[Row]) -> Path:
    """Draws the shares, a panel for each backend; returns the file."""
    plt = plot.pyplot()
    groups = {k: g for k, g in grouped(rows).items() if g[0].floor >= _SMALL}
    backends = sorted({key[3] for key in groups}, reverse=True)
    labels = list(dict.fromkeys(key[:3] for key in groups))
    figure, axes = plt.subplots(
        1, max(1, len(backends)), figsize=(6 + 4 * len(backends), 1.5 + 0.3 * len(labels)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, backend in zip(axes[0], backends):
        for place, label in enumerate(reversed(labels)):
            for row in groups.get((*label, backend), []):
                for name, value in row.shares.items():
                    axis.plot(value, place, "o", color=_COLOURS[name], markersize=6, alpha=0.9)
        axis.set(xlim=(0, 1.02), title=backend, xlabel="predicted share of copy bandwidth")
        axis.set_yticks(
            range(len(labels)), [f"{op}, {shape}, {dtype}" for op, shape, dtype in reversed(labels)], fontsize=7
        )
        axis.margins(y=0.01)
        axis.grid(axis="x", color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    for name, colour in _COLOURS.items():
        axes[0][0].plot([], [], "o", color=colour, label=name)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(_COLOURS))
    return plot.save(figure, PICTURE, rows)


def write(rows: Sequence[Row]) -> None:
    """The page and the picture."""
    picture(rows)
    write_text(PAGE, page(rows))
