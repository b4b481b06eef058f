"""A layer of eight LoRAs with gates against other ways to compute it, and a 24-layer model of them against its base.

`python -m benchmarks.run mixtures`. Times are paired: all ways of a case run right after one another, round by round.
`calls` are what reaches the dispatcher and computes, views left out: one launch each, or more, on a GPU;
`calls, kernels` the same where kernels serve, a router as one op. `kept` is what autograd saves beside arguments, and
parameters, until the backward. --table prints what docs/gates.md shows of a CSV.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adamix_kernels import AdaMixConfig, adapt, routed_lora
from adamix_kernels.routing import Gates, dense_gates, linear

from . import RESULTS
from .measure import record
from .measure.harness import Check, time_paired

TABLE = RESULTS / "mixtures_cpu.csv"
EXPERTS, RANK, SCALING = 8, 8, 2.0
KINDS = {"dense": None, "top-2": 2}
TOLERANCE = 1e-4  # float32, against the same formula in float64, of the largest element
# Shapes by which the bytes of a decoded token are counted: BERT-large's, Llama-2-7B's.
DEPTHS = {"24 x 1024": (24, 1024, 4096), "32 x 4096": (32, 4096, 11008)}
_VIEWS = ("view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "t.")
_VIEWS += ("detach", "as_strided", "split", "unbind", "lift_fresh", "unsafe_view", "_unsafe_view", "narrow", "chunk")


class Layer:
    """One mixture: x [B, S, K], banks [M, r, K] and [M, N, r], gates dense, and chosen if top_k is given."""

    def __init__(self, batch: int, tokens: int, width: int, top_k: int | None):
        torch.manual_seed(0)
        self.x = torch.randn(batch, tokens, width, requires_grad=True)
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(EXPERTS, RANK, width) / width**0.5)
        self.b = nn.Parameter(torch.randn(EXPERTS, width, RANK) / RANK**0.5)
        # The loop's: an expert's own parameters, as its trainers hold them.
        self.each = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in zip(self.a.data, self.b.data)]
        scores = torch.randn(batch, tokens, EXPERTS)
        found = Gates(scores.softmax(-1), None)
        if top_k is not None:
            best, index = scores.topk(top_k)
            found = Gates(best.softmax(-1), index)
        self.gates, self.index = found.gates.requires_grad_(), found.chosen
        self.top_k = top_k

    @property
    def dense(self) -> torch.Tensor:
        return dense_gates(Gates(self.gates, self.index), EXPERTS)

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.a, self.b, self.gates, *(factor for pair in self.each for factor in pair)]

    def wanted(self) -> torch.Tensor:
        x, a, b, g = (t.detach().double() for t in (self.x, self.a, self.b, self.dense))
        out = F.linear(x, self.base.weight.double(), self.base.bias.double())
        for e in range(EXPERTS):
            out = out + SCALING * g[..., e : e + 1] * (x @ a[e].T @ b[e].T)
        return out


def ours(layer: Layer) -> torch.Tensor:
    return routed_lora(
        layer.x, layer.a, layer.b, layer.index, layer.index, base=layer.base(layer.x), gates=layer.gates,
        scaling=SCALING, inplace=True,
    )  # fmt: skip


def python_loop(layer: Layer) -> torch.Tensor:
    """Each expert's tokens looked up, computed and added to the rows: the trainers of MoE-PEFT and MoLA."""
    flat = layer.x.flatten(0, 1)
    out = layer.base(flat)
    gates = layer.gates.flatten(0, 1)
    for e, (a, b) in enumerate(layer.each):
        if layer.index is None:
            out = out + F.linear(F.linear(flat, a), b) * (SCALING * gates[:, e : e + 1])
            continue
        rows, slot = torch.where(layer.index.flatten(0, 1) == e)
        delta = F.linear(F.linear(flat[rows], a), b) * (SCALING * gates[rows, slot].unsqueeze(-1))
        out = out.index_add(0, rows, delta)
    return out.view(layer.x.shape)


def einsum(layer: Layer) -> torch.Tensor:
    """Every expert's output of every token [tokens, M, N], then the weighted sum: PEFT's Arrow."""
    flat = layer.x.flatten(0, 1)
    each = torch.einsum("ter,eor->teo", torch.einsum("tf,erf->ter", flat, layer.a), layer.b) * SCALING
    return layer.base(layer.x) + torch.einsum("te,teo->to", layer.dense.flatten(0, 1), each).view(layer.x.shape)


def grouped_mm(layer: Layer) -> torch.Tensor:
    """Rows sorted by expert, two grouped products, added back: what torch has for it."""
    flat = layer.x.flatten(0, 1)
    slots = EXPERTS if layer.index is None else layer.index.shape[-1]
    index = torch.arange(EXPERTS).expand(flat.shape[0], -1) if layer.index is None else layer.index.flatten(0, 1)
    order = index.flatten().argsort(stable=True)
    ends = torch.bincount(index.flatten(), minlength=EXPERTS).cumsum(0).to(torch.int32)
    rows = order // slots
    narrow = torch._grouped_mm(flat[rows], layer.a.mT, offs=ends)
    wide = torch._grouped_mm(narrow, layer.b.mT, offs=ends)
    wide = wide * (SCALING * layer.gates.flatten()[order].unsqueeze(-1))
    return layer.base(layer.x) + torch.zeros_like(flat).index_add(0, rows, wide).view(layer.x.shape)


def peft_xlora(layer: Layer) -> Callable[[Layer], torch.Tensor] | None:
    """PEFT's own X-LoRA layer; None without PEFT."""
    try:
        import peft
        from peft.tuners.xlora.layer import XLoraLinearLayer
    except ImportError:
        return None
    holder = nn.Sequential(layer.base)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=["0"])
    model = peft.get_peft_model(holder, config, adapter_name="0")
    for e in range(1, EXPERTS):
        model.add_adapter(str(e), config)
    model.base_model.set_adapter([str(e) for e in range(EXPERTS)])
    target: Any = model.base_model.model[0]
    for e, (a, b) in enumerate(layer.each):
        target.lora_A[str(e)].weight, target.lora_B[str(e)].weight = a, b
    mixed: Any = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, peft.XLoraConfig())
    return lambda one: mixed.forward(one.x, scalings=one.dense.unsqueeze(2))


def ways(layer: Layer) -> dict[str, Callable[[Layer], torch.Tensor]]:
    found = {"adamix": ours, "loop": python_loop, "einsum": einsum}
    theirs = peft_xlora(layer)
    if theirs is not None:
        found["peft x-lora"] = theirs
    with contextlib.suppress(RuntimeError, AttributeError):  # a CPU, or a torch, without it
        grouped_mm(layer)
        found["grouped_mm"] = grouped_mm
    return found


class Calls(TorchDispatchMode):
    """Counts what computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).partition(".")[2]
        if not name.startswith(_VIEWS):
            self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(run: Callable[[], object]) -> int:
    with Calls() as counted:
        run()
    return counted.count


def kept_bytes(run: Callable[[], torch.Tensor], given: list[torch.Tensor]) -> int:
    """What the graph of run() saves, each storage once, those of `given` left out."""
    known = {t.untyped_storage().data_ptr() for t in given}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    total = sum(found.values())
    del out
    return total


def measure_layer(batch: int, tokens: int, width: int, rounds: int | None, seconds: float) -> list[record.Row]:
    made = []
    for kind, top_k in KINDS.items():
        layer = Layer(batch, tokens, width, top_k)
        found = ways(layer)
        shape = f"{kind} {batch}x{tokens} K=N={width} M={EXPERTS} r={RANK}"
        grad = torch.randn_like(layer.x)

        def both(way: Callable[[Layer], torch.Tensor], layer: Layer = layer, grad: torch.Tensor = grad) -> None:
            for leaf in layer.leaves():
                leaf.grad = None
            way(layer).backward(grad)

        def forward(way: Callable[[Layer], torch.Tensor], layer: Layer = layer) -> None:
            with torch.no_grad():
                way(layer)

        checks = [
            Check(f"{kind} {name}", lambda way=way, layer=layer: _wrong(way, layer)) for name, way in found.items()
        ]
        for direction, run in (("forward", forward), ("forward+backward", both)):
            calls = {name: lambda _k, way=way, run=run: run(way) for name, way in found.items()}
            timing = time_paired(calls, checks, rounds=rounds, seconds=seconds)
            for name, way in found.items():
                op = f"mixture/{direction}"
                made.append(record.row(op, name, shape, "float32", "time_p50", "ms", 1e3 * timing.time(name).p50))
                ratio = timing.ratio(name, "adamix").p50
                made.append(record.row(op, name, shape, "float32", "ratio_p50 to adamix", "", ratio))
                made.append(record.row(op, name, shape, "float32", "calls", "", calls_of(lambda r=run, w=way: r(w))))
        given = [*layer.leaves(), *layer.base.parameters()]
        for name, way in found.items():
            size = kept_bytes(lambda w=way, one=layer: w(one), given) / 2**20
            made.append(record.row("mixture/forward+backward", name, shape, "float32", "kept", "MiB", size))
    return made


def _wrong(way: Callable[[Layer], torch.Tensor], layer: Layer) -> str | None:
    with torch.no_grad():
        got, want = way(layer).double(), layer.wanted()
    error = ((got - want).abs().max() / want.abs().max()).item()
    return None if error <= TOLERANCE else f"differs by {error:.2g}, allowed {TOLERANCE:g}"


def decoder(gated: AdaMixConfig | None, width: int) -> nn.Module:
    """A 24-layer Llama of that width, bare or with gates."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=24,
        num_attention_heads=width // 32, num_key_value_heads=width // 32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model if gated is None else adapt(model, gated).eval()


def configurations() -> dict[str, AdaMixConfig]:
    return {
        "LoRAMoE": AdaMixConfig.lora_moe(),
        "MoLA top-2": AdaMixConfig.mola(experts_pattern=None),
        "HydraLoRA": AdaMixConfig.hydra_lora(num_experts=8),
    }


def measure_decoding(width: int, rounds: int | None, seconds: float) -> list[record.Row]:
    """One token behind a prompt of 16: calls, time against the base; bytes at the sizes of DEPTHS."""
    models = {"base": decoder(None, width), **{name: decoder(c, width) for name, c in configurations().items()}}
    ids = torch.randint(0, 128, (1, 16))
    steps: dict[str, Callable[[int], object]] = {}
    for name, model in models.items():
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values

        def step(_k: int, model: nn.Module = model, cache: Any = cache) -> None:
            with torch.no_grad():
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache.crop(-1)

        steps[name] = step
    timing = time_paired(steps, [], rounds=rounds, seconds=seconds)
    shape, made = f"24 layers, width {width}, 1 token", []
    for name in models:
        made.append(record.row("decode", name, shape, "float32", "calls", "", calls_of(lambda n=name: steps[n](0))))
        with mock.patch.object(linear, "by_kernel", return_value=True):
            calls = calls_of(lambda n=name: steps[n](0))
        made.append(record.row("decode", name, shape, "float32", "calls, kernels", "", calls))
        made.append(
            record.row("decode", name, shape, "float32", "ratio_p50 to base", "", timing.ratio(name, "base").p50)
        )
    for size, (layers, hidden, inner) in DEPTHS.items():
        base = layers * (4 * hidden * hidden + 3 * hidden * inner)
        for name, config in configurations().items():
            m, r, downs = config.num_experts, config.r, 1 if config.share == "down" else config.num_experts
            banks = downs * r * hidden + m * r * hidden + m * hidden  # A, B and the router, of q and of v
            ratio = (base + 2 * layers * banks) / base
            made.append(record.row("decode", name, size, "bfloat16", "weight bytes to base", "", ratio))
    return made


def table(rows: list[record.Row]) -> str:
    """What docs/gates.md shows of a CSV's rows."""
    found = {(row.op, row.backend, row.shape, row.metric): row.value for row in rows}
    lines = [
        "| layer | way | forward | calls | forward and backward | calls | kept, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    shapes = dict.fromkeys(row.shape for row in rows if row.op == "mixture/forward")
    for shape in shapes:
        for name in dict.fromkeys(row.backend for row in rows if row.shape == shape):
            cells = [shape.partition(" ")[0], "ours" if name == "adamix" else name]
            for op in ("mixture/forward", "mixture/forward+backward"):
                ratio, calls = (found[op, name, shape, metric] for metric in ("ratio_p50 to adamix", "calls"))
                cells += [f"{ratio:.2f}", f"{calls:.0f}"]
            cells.append(f"{found[op, name, shape, 'kept']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| one token, 24 layers | calls, kernels | over the base | time over the base, reference, width 256 |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.metric == "calls, kernels":
            base, ratio = (found["decode", name, row.shape, metric] for name, metric in (
                ("base", row.metric), (row.backend, "ratio_p50 to base")))  # fmt: skip
            lines.append(f"| {row.backend} | {row.value:.0f} | {row.value / base:.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "mixtures", help="LoRAs with gates: a layer against PEFT and loops, 24 layers decoding"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=768, help="K = N of the layer")
    parser.add_argument("--decoder-width", type=int, default=256, help="of the 24-layer model")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: what fits into --seconds)")
    parser.add_argument("--seconds", type=float, default=20.0, help="budget for the timed rounds of a case")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", help="CSV to write, for example benchmarks/results/mixtures_cpu.csv")
    parser.add_argument("--table", action="store_true", help=f"measure nothing: the tables of {TABLE.name}")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.table:
        print(table(record.read(TABLE)))
        return 0
    torch.set_num_threads(options.threads)
    made = measure_layer(options.batch, options.tokens, options.width, options.repeats, options.seconds)
    made += measure_decoding(options.decoder_width, options.repeats, options.seconds)
    for one in made:
        print(f"{one.op:26} {one.backend:12} {one.metric:22} {one.value:10.4g} {one.unit:4} {one.shape}")
    if options.out:
        record.write(options.out, made)
        print(f"wrote {len(made)} rows to {options.out}")
    return 0
