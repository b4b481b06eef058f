"""A damaged checkpoint is refused by name, and the model stays untouched."""

import json

import pytest
import tiny
import torch
import transformers
from checkpoint_cases import (
    adapted,
    bare,
    edit_header,
    edit_text,
    flip,
    picture,
    rewrite_tensors,
    same_picture,
    tensor_file,
    truncate,
)  # fmt: skip
from two_writers import write_while_locked

from adamix_kernels import AdaMixConfig, adapt, pack
from adamix_kernels.models import checkpoint
from adamix_kernels.models.checkpoint import load_adamix, save_adamix
from adamix_kernels.models.merging import merge
from adamix_kernels.models.pooling import set_pooling

KEY = "bert.encoder.layer.1.output.dense.adapter.up_bias"
DAMAGE = {
    "truncated": (truncate, "truncated"),
    "corrupt": (flip, "SHA-256"),
    "no tensor file": (lambda f: tensor_file(f).unlink(), "no such file"),
    "no json": (lambda f: (f / checkpoint.CHECKPOINT_NAME).unlink(), "no such file"),
    "not json": (lambda f: (f / checkpoint.CHECKPOINT_NAME).write_text("{"), "not JSON"),
    "unknown version": (lambda f: edit_header(f, version=99), "version 99, expected 1"),
    "no version": (lambda f: edit_header(f, version=None), "version None, expected 1"),
    "edited": (lambda f: edit_text(f, '"dropout": 0.0', '"dropout": 0.1'), "corrupt, or was edited"),
    "no digest": (lambda f: edit_text(f, '"sha256": "', '"sha512": "'), "corrupt, or was edited"),
    "missing field": (lambda f: edit_header(f, layers=None), "layers = None"),
    "path outside": (lambda f: edit_header(f, tensors={"file": "../x"}), "expected a file name"),
    "unknown config": (lambda f: edit_header(f, config={"version": 1, "novel": 2}), "novel"),
    "missing key": (lambda f: rewrite_tensors(f, lambda t: t.pop(KEY)), f"missing keys {KEY}"),
    "unexpected key": (
        lambda f: rewrite_tensors(f, lambda t: t.update(novel=torch.ones(1))),
        "unexpected keys novel",
    ),
    "shape": (lambda f: rewrite_tensors(f, lambda t: t.update({KEY: torch.ones(1, 7)})), rf"{KEY}: got shape \(1, 7\)"),
}


@pytest.mark.parametrize("make", [bare, adapted])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_leave_the_model_untouched(damage, make, tmp_path):
    save_adamix(adapted(seed=8), tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    model = make()
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_adamix(model, tmp_path)
    same_picture(before, picture(model))


LORA_KEY = "bert.encoder.layer.0.attention.self.query"


def spoil_factors(folder, **facts):
    header = json.loads((folder / checkpoint.CHECKPOINT_NAME).read_text())
    header["layers"][LORA_KEY]["factors"].update(facts)
    edit_header(folder, layers=header["layers"])


FACTOR_DAMAGE = {
    "missing": (lambda f: rewrite_tensors(f, lambda t: t.pop(f"{LORA_KEY}.lora_b")), f"missing keys {LORA_KEY}.lora_b"),
    "shape of A": (
        lambda f: rewrite_tensors(f, lambda t: t.update({f"{LORA_KEY}.lora_a": torch.ones(2, 5)})),
        rf"{LORA_KEY}.lora_a: got shape \(2, 5\), expected \(2, 32\)",
    ),
    "shape of B": (
        lambda f: rewrite_tensors(f, lambda t: t.update({f"{LORA_KEY}.lora_b": torch.ones(32, 3)})),
        rf"{LORA_KEY}.lora_b: got shape \(32, 3\)",
    ),
    "too wide": (lambda f: spoil_factors(f, output_offsets=[8]), rf"{LORA_KEY}.lora_b: got shape"),
    "other facts": (lambda f: spoil_factors(f, novel=1), rf"{LORA_KEY}: got factors ="),
}


@pytest.mark.parametrize("damage", FACTOR_DAMAGE)
def test_damaged_factors_leave_the_model_untouched(damage, tmp_path):
    save_adamix(merge(adapted("bert_lora")), tmp_path)
    spoil, message = FACTOR_DAMAGE[damage]
    spoil(tmp_path)
    model = bare("bert_lora")
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_adamix(model, tmp_path)
    same_picture(before, picture(model))


def test_a_model_whose_head_can_read_no_mean_stays_untouched(tmp_path):
    """Of the checkpoint's sizes and with a head of its shape, but of another task."""
    model = adapted()
    set_pooling(model, "mean")
    save_adamix(model, tmp_path)
    other = tiny.tiny_bert(model_class=transformers.BertForTokenClassification)
    before = picture(other)
    message = "got a BertForTokenClassification, whose head reads .*, expected a BertForSequenceClassification"
    with pytest.raises(ValueError, match=message):
        load_adamix(other, tmp_path)
    same_picture(before, picture(other))


def test_a_head_of_another_task_is_refused_and_another_class_told(tmp_path, caplog):
    """Of the same sizes: a sentence's classifier and a token's."""

    class Own(transformers.BertForSequenceClassification):
        pass

    folder, plain = save_adamix(adapted(), tmp_path / "head"), tmp_path / "plain"
    other = tiny.tiny_bert(model_class=transformers.BertForTokenClassification)
    before = picture(other)
    said = "model: got a BertForTokenClassification, expected a BertForSequenceClassification, which the checkpoint was"
    with pytest.raises(ValueError, match=f"^{said} saved from: classifier was trained for another task"):
        load_adamix(other, folder)
    with pytest.raises(ValueError, match=f"^a: {said}"):
        pack(other, {"a": folder})
    same_picture(before, picture(other))
    save_adamix(adapt(tiny.tiny_bert(), AdaMixConfig(modules_to_save=[], num_experts=2)), plain)
    load_adamix(tiny.tiny_bert(model_class=Own), folder)
    load_adamix(bare(), save_adamix(torch.compile(adapted()), tmp_path / "compiled"))
    assert not caplog.messages
    load_adamix(other, plain)
    assert said in caplog.text
    caplog.clear()
    load_adamix(bare(), save_adamix(load_adamix(tiny.tiny_bert(model_class=Own), folder), tmp_path / "own"))
    assert "got a BertForSequenceClassification, expected a Own" in caplog.text


def test_two_writers_of_one_folder_wait_for_each_other(tmp_path, caplog):
    first, second = adapted(seed=1), adapted(seed=2)
    out = save_adamix(first, tmp_path / "out")
    write_while_locked(out, caplog, save_adamix, second, out)
    loaded = load_adamix(bare(), out)
    assert torch.equal(loaded.state_dict()[KEY], second.state_dict()[KEY])
    assert len(list(out.glob("*.safetensors"))) == 1
