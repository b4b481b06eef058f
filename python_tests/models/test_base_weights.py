"""A base of the same sizes and other weights: a pack refuses it, load_adamix warns."""

import json
import logging

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import AdaMixConfig, adapt, add_expert, load_adamix, load_pack, merge, pack, save_adamix, save_pack
from adamix_kernels.models.base_weights import others, sampled


def another():
    """tiny_bert with every frozen matrix drawn anew."""
    model = tiny.tiny_bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def test_a_pack_refuses_what_was_trained_on_other_weights_of_the_same_sizes(tmp_path):
    own = tp.saved(tmp_path / "own", tiny.tiny_bert, 1)
    foreign = tp.saved(tmp_path / "foreign", another, 2, method="lora")
    said = "other frozen weights than the one that the checkpoint was trained on"
    bare = tiny.tiny_bert()
    before = tp.state_of(bare)
    with pytest.raises(ValueError, match=f"^foreign: model: got a BertFor.*{said}"):
        pack(bare, {"own": own, "foreign": foreign})
    tp.same_state(before, tp.state_of(bare))
    packed = pack(bare, {"own": own}, capacity=2)
    with pytest.raises(ValueError, match=f"^foreign: .*{said}"):
        add_expert(packed, "foreign", foreign)
    with pytest.raises(ValueError, match=f"^own: .*{said}"):
        load_pack(another(), save_pack(packed, tmp_path / "pack"))


def test_load_adamix_warns_of_other_weights_and_of_nothing_else(tmp_path, caplog):
    folder = tp.saved(tmp_path / "own", tiny.tiny_bert, 1, merged=False)
    with caplog.at_level(logging.WARNING):
        load_adamix(tiny.tiny_bert(), folder)
        load_adamix(tiny.tiny_bert().bfloat16(), folder)
        load_adamix(tiny.tiny_bert().half(), folder)
    assert not caplog.messages
    load_adamix(another(), folder)
    assert "other frozen weights than the one that the checkpoint was trained on" in caplog.text


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_where_every_layer_is_adapted_and_the_embedding_trained_the_layers_bases_tell(method, tmp_path, caplog):
    def llama(seed=1):
        model = tiny.tiny_llama(tie_word_embeddings=True)
        for parameter in model.parameters():
            parameter.data.add_(seed - 1)
        return model

    config = AdaMixConfig(method=method, target_modules="all-linear", modules_to_save=["embed_tokens"], num_experts=2)
    model = tp.randomise(adapt(llama(), config), 1)
    stored = sampled(model)
    assert len(stored) == 5
    assert set(stored) <= {name for name, _ in llama().named_parameters()} - {"model.embed_tokens.weight"}
    folders = [save_adamix(model, tmp_path / "experts")]
    if method == "adapter":
        folders.append(save_adamix(merge(model), tmp_path / "merged"))
        assert sampled(model) == stored
    for folder in folders:
        with caplog.at_level(logging.WARNING):
            load_adamix(llama(), folder)
            load_adamix(load_adamix(llama(), folder), folder)
        assert not caplog.messages
        load_adamix(llama(2), folder)
        assert "other frozen weights" in caplog.text
        caplog.clear()


def test_what_a_lora_was_merged_into_tells_nothing(tmp_path, caplog):
    model = tp.randomise(adapt(tiny.tiny_bert(), AdaMixConfig(method="lora", target_modules="all-linear")), 1)
    experts = save_adamix(model, tmp_path / "experts")
    merged = save_adamix(merge(model), tmp_path / "merged")
    assert not [name for name in sampled(model) if name.rpartition(".")[0] in model.adamix.paths]
    with caplog.at_level(logging.WARNING):
        load_adamix(load_adamix(tiny.tiny_bert(), merged), merged)
    assert not caplog.messages
    assert others(another(), json.loads((experts / "adamix_checkpoint.json").read_text())["base_model"]["weights"])


def test_one_matrix_that_is_new_in_each_process_and_a_base_without_values_tell_nothing():
    model = tiny.tiny_bert().requires_grad_(False)
    stored = sampled(model)
    assert 3 <= len(stored) <= 6
    torch.nn.init.normal_(model.get_parameter(next(iter(stored))))
    assert not others(model, stored)
    assert not others(tiny.tiny_bert().to("meta"), stored)
    assert not others(model, {})


class _Packed(torch.nn.Parameter):
    """As bitsandbytes keeps four bits a value in floats, and torchao in a subclass."""


@pytest.mark.parametrize("kind", ["8-bit floats", "codes in a subclass"])
def test_codes_of_a_quantised_base_are_not_its_values(kind):
    model = tiny.tiny_bert().requires_grad_(False)
    stored, names = sampled(model), []
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 2:
            owner, _, last = name.rpartition(".")
            packed = _Packed(100 * parameter, requires_grad=False)
            if kind == "8-bit floats":
                packed = torch.nn.Parameter((100 * parameter).to(torch.float8_e4m3fn), requires_grad=False)
            setattr(model.get_submodule(owner), last, packed)
            names.append(name)
    assert stored.keys() <= set(names)
    assert not sampled(model)
    assert not others(model, stored)


def test_a_compiled_model_has_the_names_of_its_own():
    model = adapt(tiny.tiny_bert(), AdaMixConfig())
    stored, compiled = sampled(model), torch.compile(model)
    assert sampled(compiled) == stored
    assert not others(compiled, stored)
    torch.nn.init.normal_(model.get_parameter(next(iter(stored))))
    assert sampled(compiled) != stored
