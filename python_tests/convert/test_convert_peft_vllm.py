"""export_peft's folders under the rules by which vLLM reads a LoRA, written down here once more.

A serving engine loads a folder in one go: required keys, features it lacks, a bound on the rank, the names of
the weights, the modules it knows for a model, one shape for all of a layer's stacked parts. vLLM itself needs a
GPU build and is not installed; these are its rules as its users meet them, not its code.
"""

import json

import pytest
import tiny
import torch
from safetensors import safe_open

from adamix_kernels import AdaMixConfig, adapt, export_peft, use_experts

BOUNDS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
# The names of layers that the engine can attach a LoRA to: what it packs together, and what it holds alone.
KNOWN = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"},
    "bert": {"query", "key", "value", "dense"},
}
SIDES = {"lora_A": 0, "lora_B": 1}


class Refused(ValueError):
    pass


def read_folder(folder, known, max_rank):
    """layer -> (A [r, K], B [N, r], scaling). Raises Refused, with every reason."""
    if max_rank not in BOUNDS:
        raise Refused(f"max_rank {max_rank}")
    config = json.loads((folder / "adapter_config.json").read_text())
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    reasons = [f"no {key}" for key in missing]
    if not missing and not 0 < config["r"] <= max_rank:
        reasons.append(f"rank {config['r']} above {max_rank}")
    if config.get("bias", "none") != "none":
        reasons.append("bias")
    reasons += [feature for feature in ("modules_to_save", "use_dora") if config.get(feature)]
    layers = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            *path, side, kind = key.split(".")
            if path[:2] != ["base_model", "model"] or side not in SIDES or kind != "weight":
                reasons.append(f"weight {key}")
            elif path[-1] not in known:
                reasons.append(f"module {key}")
            else:
                layers.setdefault(".".join(path[2:]), {})[side] = file.get_tensor(key)
    for layer, sides in layers.items():
        if set(sides) != set(SIDES):
            reasons.append(f"one side of {layer}")
            continue
        (rank, _), (_, other) = sides["lora_A"].shape, sides["lora_B"].shape
        if rank != other or rank > config["r"]:
            reasons.append(f"shapes of {layer}")
    if reasons:
        raise Refused("; ".join(reasons))
    scaling = config["lora_alpha"] / config["r"]  # one for all: no rank_pattern, no alpha_pattern
    return {layer: (sides["lora_A"], sides["lora_B"], scaling) for layer, sides in layers.items()}


def adapted(build, **options):
    model = adapt(build(), AdaMixConfig(**{**dict(method="lora", num_experts=3, r=3, alpha=6.0), **options}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def add_updates(base, layers):
    """The engine's arithmetic, on weights."""
    with torch.no_grad():
        for path, (lora_a, lora_b, scaling) in layers.items():
            base.get_submodule(path).weight += scaling * lora_b @ lora_a
    return base


@pytest.mark.parametrize("expert", [None, 1])
def test_a_llama_folder_is_taken_and_computes_the_same(expert, tmp_path):
    model = adapted(tiny.tiny_llama, target_modules=["q_proj", "v_proj", "down_proj"])
    export_peft(model, tmp_path, expert=expert)
    layers = read_folder(tmp_path, KNOWN["llama"], 8)
    assert set(layers) == set(model.adamix.paths)
    batch = tiny.batch_for(model)
    base = add_updates(tiny.tiny_llama(), layers)
    with torch.no_grad():
        got = base(**batch).logits
        if expert is None:
            want = model(**batch).logits
        else:
            with use_experts(model, expert):
                want = model(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.tiny_bert, tiny.tiny_roberta])
def test_an_encoder_is_taken_without_its_head(build, tmp_path):
    model = adapted(build, share=None)
    with pytest.raises(Refused, match="modules_to_save"):
        read_folder(export_peft(model, tmp_path / "with_head"), KNOWN["bert"], 8)
    layers = read_folder(export_peft(model, tmp_path / "without", head=False), KNOWN["bert"], 8)
    base = add_updates(build(), layers)
    base.classifier.load_state_dict(model.classifier.state_dict())
    batch = tiny.batch_for(model)
    with torch.no_grad():
        torch.testing.assert_close(base(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_rank_in_the_config_bounds_every_layer(tmp_path):
    """In one model the wider layer (two slices of rank 5) comes first, in the other last."""
    for name, targets in (("a", ["c_attn", "mlp.c_fc"]), ("b", ["h.0.mlp.c_fc", "h.1.attn.c_attn"])):
        model = adapted(tiny.tiny_gpt2, r=5, target_modules=targets)
        folder = export_peft(model, tmp_path / name)
        known = {"c_attn", "c_fc"}
        layers = read_folder(folder, known, 16)
        assert {a.shape[0] for a, _, _ in layers.values()} == {5, 10}
        assert {scaling for _, _, scaling in layers.values()} == {6.0 / 5}
        with pytest.raises(Refused, match="rank 10 above 8"):
            read_folder(folder, known, 8)
