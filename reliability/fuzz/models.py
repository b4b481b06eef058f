"""Random adaptations of whole models: adapted, routed, disabled, saved, loaded, merged and unmerged."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import adamix_kernels as ak

from .. import small_models

FAMILIES = ("BERT", "GPT-2", "Llama", "T5", "no transformer")
# What names layers in one of these at least; some name none in the others, or what is not linear.
TARGETS = (
    None, None, None, "all-linear", ["dense"], ["query", "value"], ["c_attn", "mlp.c_proj"], ["q_proj", "down_proj"],
    ["q", "v", "wo"], ["first", "second"], r".*\.(dense|wo|c_fc|up_proj|first)", ["LayerNorm"], ["nowhere"],
)  # fmt: skip
ROWS, TOKENS = 4, 5


@dataclass
class Adaptation:
    family: str
    fields: dict[str, Any]
    seed: int
    index: list[int]

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{self.family}, AdaMixConfig({given}), seed {self.seed}, experts {self.index}"


@st.composite
def adaptations(draw) -> Adaptation:
    one = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    experts = draw(st.integers(1, 4))
    fields = {
        "method": one("adapter", "lora"), "num_experts": experts, "bottleneck": draw(st.integers(1, 3)),
        "r": draw(st.integers(1, 3)), "alpha": one(0.5, 8), "dropout": one(0.0, 0.0, 0.5),
        "activation": one("auto", "gelu", "relu", None), "share": one("up", "down", None),
        "qkv": one(["q", "v"], ["k"], ["v", "q", "k"]), "routing": one("batch", "sample", "token"),
        "consistency_weight": one(0, 1.0), "target_modules": one(*TARGETS),
        "exclude_modules": one(None, None, ["1"], ".*0.*"),
        "layers_to_transform": one(None, None, None, [0], 1), "modules_to_save": one(None, None, []),
    }  # fmt: skip
    index = draw(st.lists(st.integers(0, experts - 1), min_size=ROWS, max_size=ROWS))
    return Adaptation(one(*FAMILIES), fields, draw(st.integers(0, 2**32 - 1)), index)


class Network(nn.Module):
    """Blocks of two linear layers, nn.Linear and Conv1D, and a head: [B, S, 8] -> [B, S, 3]."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"first": nn.Linear(8, 12), "second": Conv1D(8, 12)}) for _ in range(2)
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["second"](block["first"](x).relu())
        return self.classifier(x)


@functools.cache
def _base(family: str) -> nn.Module:
    torch.manual_seed(1)
    if family == "no transformer":
        return Network().eval()
    if family in ("BERT", "GPT-2"):
        return small_models.base(family)
    sizes = {"vocab_size": small_models.VOCAB, "pad_token_id": 0}
    if family == "Llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=16, **sizes,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, **sizes
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def _logits(family: str, model: nn.Module, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if family == "no transformer":
        return model(torch.randn(ROWS, TOKENS, 8, generator=generator)[:rows])
    ids = torch.randint(3, small_models.VOCAB, (ROWS, TOKENS), generator=generator)[:rows]
    more = {"decoder_input_ids": ids} if family == "T5" else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


def check_adaptation(case: Adaptation) -> None:
    """A configuration that fits nothing is refused and changes nothing; another trains the banks and the head alone,
    draws the same from the same seed, computes the base where it is disabled, serves each row by the expert named,
    comes back from its checkpoint bit for bit, and merges into a model of the same outputs, and back."""
    base = copy.deepcopy(_base(case.family))
    before = _state(base)
    config = ak.AdaMixConfig(**case.fields)
    assert ak.AdaMixConfig.from_dict(config.to_dict()) == config, f"{case}: another configuration after its JSON"
    try:
        model = ak.adapt(base, config)
    except ValueError as error:
        if "target_modules" not in str(error):
            raise
        assert _same(before, _state(base)), f"{case}: refused, and changed the model"
        assert all(p.requires_grad for p in base.parameters()), f"{case}: refused, and froze the model"
        return
    _check_what_trains(case, model, before)
    small_models.filled(model, case.seed)
    served = _served(case, model)
    _check_training(case, model)
    _check_contexts(case, model, served)
    _check_checkpoint(case, model, served)
    _check_merging(case, model, served)


def _check_what_trains(case: Adaptation, model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    state = model.adamix
    heads = tuple(f"{path}." for path in state.saved)
    for name, parameter in model.named_parameters():
        inside = next((name[len(p) + 1 :] for p in state.paths if name.startswith(f"{p}.")), None)
        bank = inside is not None and not inside.startswith(("base.", "weight", "bias")) and not name.endswith("_score")
        assert parameter.requires_grad == (bank or name.startswith(heads)), f"{case}: {name}.requires_grad"
        if bank and case.fields["num_experts"] > 1:
            assert len(parameter) in (1, case.fields["num_experts"]), f"{case}: {name} {tuple(parameter.shape)}"
    kept = {name.replace(".base.", "."): value for name, value in _state(model).items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items()), f"{case}: adapt() changed the base"
    with contextlib.redirect_stdout(io.StringIO()):
        trainable, total = ak.print_trainable_parameters(model)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad), f"{case}: {trainable} trainable"
    assert f"{trainable:,} of {total:,} parameters" in ak.summary(model), f"{case}: {ak.summary(model)}"
    if case.fields["method"] == "lora":  # whose B is zero
        plain = copy.deepcopy(_base(case.family))
        assert torch.equal(_served(case, model), _served(case, plain)), f"{case}: a fresh LoRA changes the output"


def _check_training(case: Adaptation, model: nn.Module) -> None:
    results = []
    model.train()
    for _ in range(2):
        torch.manual_seed(case.seed)
        model.zero_grad(set_to_none=True)
        logits = _logits(case.family, model)
        loss = ak.consistency_loss(*logits.chunk(2)) + logits.square().mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    model.zero_grad(set_to_none=True)
    model.eval()
    (loss, grads), (again, other) = results
    assert torch.equal(loss, again), f"{case}: {loss} and {again} from the same seed"
    assert _same(grads, other), f"{case}: other gradients from the same seed"
    assert all(g.isfinite().all() for g in grads.values()), f"{case}: a gradient that is not finite"
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(grads) <= wanted, f"{case}: gradients of {set(grads) - wanted}"


def _check_contexts(case: Adaptation, model: nn.Module, served: torch.Tensor) -> None:
    plain = copy.deepcopy(_base(case.family))
    for path in model.adamix.saved:
        plain.get_submodule(path).load_state_dict(model.get_submodule(path).state_dict())
    with ak.disable(model):
        assert torch.equal(_served(case, model), _served(case, plain)), f"{case}: disabled, and not the base"
    each = []
    for expert in range(case.fields["num_experts"]):
        with ak.use_experts(model, expert):
            each.append(_served(case, model))
    with ak.use_experts(model, case.index):
        mixed = _served(case, model)
    twin = copy.deepcopy(model)
    _only(twin, case.index[0])
    assert _close(each[case.index[0]], _served(case, twin)), f"{case}: not what expert {case.index[0]} alone computes"
    for row, expert in enumerate(case.index):
        assert _close(mixed[row], each[expert][row]), f"{case}: row {row} is not expert {expert}'s"
    with ak.eval_routing(model, case.fields["routing"]):
        torch.manual_seed(case.seed)
        drawn = _served(case, model)
        torch.manual_seed(case.seed)
        assert torch.equal(drawn, _served(case, model)), f"{case}: random evaluation differs from the same seed"
    assert torch.equal(served, _served(case, model)), f"{case}: another output after the contexts"


def _check_checkpoint(case: Adaptation, model: nn.Module, served: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ak.save_adamix(model, folder)
        loaded = ak.load_adamix(copy.deepcopy(_base(case.family)), folder)
    assert torch.equal(served, _served(case, loaded)), f"{case}: another output after loading"
    # Weights, what is trained, configuration, routing.
    assert small_models.picture(model) == small_models.picture(loaded), f"{case}: another model after loading"


def _check_merging(case: Adaptation, model: nn.Module, served: torch.Tensor) -> None:
    before = small_models.picture(model)
    merged = _served(case, ak.merge(model))
    assert _close(merged, served), f"{case}: merged {(merged - served).abs().max()} from the experts' mean"
    with tempfile.TemporaryDirectory() as folder:
        ak.save_adamix(model, folder)
        loaded = ak.load_adamix(copy.deepcopy(_base(case.family)), folder)
    assert torch.equal(merged, _served(case, loaded)), f"{case}: another output after loading it merged"
    ak.unmerge(model)
    assert small_models.picture(model) == before, f"{case}: another model after unmerging"
    assert torch.equal(served, _served(case, model)), f"{case}: another output after unmerging"


@torch.no_grad()
def _only(model: nn.Module, expert: int) -> None:
    """Makes every expert this one."""
    for path in model.adamix.paths:
        for name, bank in model.get_submodule(path).named_parameters():
            if bank.requires_grad and not name.startswith("base."):
                bank.copy_(bank[min(expert, len(bank) - 1)].clone())


@torch.no_grad()
def _served(case: Adaptation, model: nn.Module) -> torch.Tensor:
    return _logits(case.family, model)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = 1 + max(one.abs().max().item(), other.abs().max().item())
    return (one - other).abs().max().item() <= 1e-4 * scale
