"""save_adamix / load_adamix: the same bits back, or a clear error and an untouched model."""

import copy
import errno
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from checkpoint_cases import CASES, adapted, bare, edit_header, picture, rewrite_tensors, same_bits, same_picture

from adamix_kernels.models import _files, checkpoint
from adamix_kernels.models.checkpoint import load_adamix, save_adamix
from adamix_kernels.models.contexts import eval_routing
from adamix_kernels.models.merging import learn_merging, merge, unmerge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_into_bare_and_adapted(case, dtype, tmp_path):
    model = adapted(case, dtype=dtype)
    save_adamix(model, tmp_path)
    fresh = load_adamix(bare(case, dtype), tmp_path)
    same_bits(model, fresh)
    assert fresh.adamix.config == model.adamix.config
    other = adapted(case, seed=9, dtype=dtype)
    assert load_adamix(other, tmp_path) is other
    same_bits(model, other)
    batch = tiny.batch_for(model)
    with eval_routing(model, "token"), eval_routing(fresh, "token"):
        torch.manual_seed(5)
        want = model(**batch).logits
        torch.manual_seed(5)
        assert torch.equal(fresh(**batch).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merged_round_trip(case, dtype, tmp_path):
    model = merge(adapted(case, dtype=dtype))
    save_adamix(model, tmp_path)
    fresh = load_adamix(bare(case, dtype), tmp_path)
    same_bits(model, fresh)
    assert fresh.adamix.merged
    batch = tiny.batch_for(model)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="without experts"):
        unmerge(fresh)
    save_adamix(fresh, tmp_path / "again")
    same_bits(model, load_adamix(bare(case, dtype), tmp_path / "again"))


def test_trainable_flags_come_back(tmp_path):
    model = learn_merging(adapted())
    model.classifier.bias.requires_grad_(False)
    save_adamix(model, tmp_path)
    fresh = load_adamix(bare(), tmp_path)
    same_bits(model, fresh)
    trainable = {n.rsplit(".", 1)[-1] for n, p in fresh.named_parameters() if p.requires_grad}
    assert trainable == {"down_score", "up_score", "weight"}


def test_an_adapted_model_keeps_its_own_settings(tmp_path):
    save_adamix(adapted(routing="batch", consistency_weight=1.0), tmp_path)
    other = adapted(seed=4, routing="token", consistency_weight=0.0)
    load_adamix(other, tmp_path)
    assert (other.adamix.config.routing, other.adamix.router.level) == ("token", "token")


def test_the_base_is_not_written(tmp_path):
    from safetensors import safe_open

    save_adamix(adapted(), tmp_path)
    header = json.loads((tmp_path / checkpoint.CHECKPOINT_NAME).read_text())
    with safe_open(tmp_path / header["tensors"]["file"], "pt") as file:
        keys = set(file.keys())
    layers = {f"bert.encoder.layer.{i}.output.dense" for i in range(tiny.LAYERS)}
    names = {f"{side}_{part}" for side in ("down", "up") for part in ("weight", "bias", "score")}
    want = {f"{layer}.adapter.{name}" for layer in layers for name in names}
    assert keys == want | {"classifier.weight", "classifier.bias"}
    assert set(header["layers"]) == layers
    assert (header["version"], header["merged"], header["base_model"]["hidden_size"]) == (3, False, tiny.HIDDEN)


MODELS = {
    "hidden size": (
        lambda: _bert(hidden_size=48),
        "hidden_size = 48, expected 32",
    ),
    "layers": (lambda: _bert(num_hidden_layers=3), "num_hidden_layers = 3, expected 2"),
    "vocabulary": (lambda: _bert(vocab_size=65), "vocab_size = 65, expected 64"),
    "model type": (tiny.tiny_roberta, "model_type = 'roberta', expected 'bert'"),
    "labels": (lambda: tiny.tiny_bert(num_labels=3), r"classifier.bias: got shape \(2,\), expected \(3,\)"),
    "no head": (lambda: _headless(), "layers: the model lacks bert.encoder.layer.0.output.dense"),
    "other method": (lambda: adapted("bert_lora"), "layers: the model lacks"),
    "other size": (lambda: adapted(bottleneck=6), "bottleneck = 6 in the model, expected 5"),
    "other experts": (lambda: adapted(num_experts=4), "num_experts = 4 in the model, expected 3"),
    "other sharing": (lambda: adapted(share="down"), "share = 'down' in the model, expected 'up'"),
    "other activation": (lambda: adapted(activation="relu"), "activation = 'relu' in the model, expected 'gelu'"),
    "other layers": (lambda: adapted(layers_to_transform=[0]), "lacks bert.encoder.layer.1.output.dense"),
    "merged": (lambda: merge(adapted()), "merged"),
}


def _bert(**options):
    import transformers

    config = copy.deepcopy(tiny.tiny_bert().config)
    for name, value in options.items():
        setattr(config, name, value)
    return transformers.BertForSequenceClassification(config)


def _headless():
    import transformers

    return tiny.tiny_bert(model_class=transformers.BertModel)


@pytest.mark.parametrize("which", MODELS)
def test_wrong_models_are_named_and_untouched(which, tmp_path):
    save_adamix(adapted(seed=8), tmp_path)
    make, message = MODELS[which]
    model = make()
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_adamix(model, tmp_path)
    same_picture(before, picture(model))


def test_a_model_and_a_checkpoint_in_other_states_say_what_to_do(tmp_path):
    save_adamix(merge(adapted()), tmp_path / "merged")
    save_adamix(adapted(), tmp_path / "unmerged")
    for model, folder, message in (
        (adapted(), "merged", r"got an unmerged model for .* expected a bare model.* or merge\(model\) first"),
        (merge(adapted()), "unmerged", r"got a merged model for .* expected a bare model, or unmerge\(model\) first"),
    ):
        before = picture(model)
        with pytest.raises(ValueError, match=message):
            load_adamix(model, tmp_path / folder)
        same_picture(before, picture(model))


@pytest.mark.parametrize("case", CASES)
def test_a_merged_checkpoint_goes_into_a_merged_model(case, tmp_path):
    """Whose own experts are gone then: they are not those of the checkpoint."""
    model = merge(adapted(case, seed=3))
    save_adamix(model, tmp_path)
    other = merge(adapted(case, seed=9))
    assert load_adamix(other, tmp_path) is other
    same_bits(model, other)
    with pytest.raises(ValueError, match=r"without experts .*\(a merged checkpoint was loaded\)"):
        unmerge(other)
    batch = tiny.batch_for(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    if other.adamix.factors:
        for path, factors in model.adamix.factors.items():
            assert torch.equal(other.adamix.factors[path].lora_b, factors.lora_b)


def test_merged_checkpoints_keep_small_factors(tmp_path):
    model = adapted("gpt2_lora")
    wanted = {path: model.get_submodule(path).merged_factors() for path in model.adamix.paths}
    merge(model)
    save_adamix(model, tmp_path)
    loaded = load_adamix(bare("gpt2_lora"), tmp_path)
    for path, (lora_a, lora_b) in wanted.items():
        factors = loaded.adamix.factors[path]
        assert torch.equal(factors.lora_a, lora_a)
        assert torch.equal(factors.lora_b, lora_b)
        assert (factors.r, factors.alpha, factors.scaling, factors.groups) == (2, 32.0, 16.0, 2)
        assert factors.output_offsets == (0, 2 * tiny.HIDDEN)
    header = json.loads((tmp_path / checkpoint.CHECKPOINT_NAME).read_text())
    assert header["version"] == 3
    names = set(header["layers"]["transformer.h.0.attn.c_attn"])
    assert names == {"in_features", "out_features", "fan_in_fan_out", "factors"}


@pytest.mark.parametrize("case", ["bert_lora", "gpt2_lora"])
def test_version_2_of_a_merged_lora_loads_without_factors(case, tmp_path):
    model = merge(adapted(case))
    save_adamix(model, tmp_path)

    def drop(tensors):
        for name in [name for name in tensors if name.endswith((".lora_a", ".lora_b"))]:
            del tensors[name]

    rewrite_tensors(tmp_path, drop)
    header = json.loads((tmp_path / checkpoint.CHECKPOINT_NAME).read_text())
    layers = {path: {k: v for k, v in facts.items() if k != "factors"} for path, facts in header["layers"].items()}
    old = ("class", "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "name_or_path")
    base = {name: header["base_model"][name] for name in old}
    edit_header(tmp_path, version=2, layers=layers, base_model=base)
    loaded = load_adamix(bare(case), tmp_path)
    same_bits(model, loaded)
    assert not loaded.adamix.factors
    save_adamix(loaded, tmp_path / "again")
    same_bits(model, load_adamix(bare(case), tmp_path / "again"))


def test_an_unadapted_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="without AdaMix"):
        save_adamix(bare(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        save_adamix(adapted(), tmp_path / "file")


def test_version_1_of_an_older_release_loads(tmp_path):
    model = adapted()
    save_adamix(model, tmp_path)
    path = tmp_path / checkpoint.CHECKPOINT_NAME
    header = json.loads(path.read_text())
    del header["sha256"]
    path.write_text(json.dumps({**header, "version": 1}))
    same_bits(model, load_adamix(bare(), tmp_path))


def test_saving_removes_what_killed_processes_left(tmp_path):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in (f".adamix.{process.stdout.strip()}.1.tmp", f".adamix.{os.getppid()}.1.tmp", "adamix-0.safetensors"):
        (tmp_path / name).write_text("")
    save_adamix(adapted(), tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == {f".adamix.{os.getppid()}.1.tmp"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_what_safetensors_cannot_write_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="No such file") as error:
        _files.write_safetensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(2)})
    assert error.value.errno == errno.ENOENT


def test_saving_again_replaces(tmp_path):
    save_adamix(adapted(seed=1), tmp_path)
    second = adapted(seed=2)
    save_adamix(second, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    same_bits(second, load_adamix(bare(), tmp_path))


@pytest.mark.parametrize("fails_at", range(7))
def test_an_interrupted_save_leaves_the_old_or_the_new(fails_at, tmp_path, monkeypatch):
    """Every rename and flush in turn is where the process dies."""
    first, second = adapted(seed=1), adapted(seed=2)
    save_adamix(first, tmp_path)
    calls = 0

    def dying(original):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls > fails_at:
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "fsync", dying(os.fsync))
        try:
            save_adamix(second, tmp_path)
            finished = True
        except KeyboardInterrupt:
            finished = False
    loaded = load_adamix(bare(), tmp_path)
    if finished:
        same_bits(second, loaded)
    else:
        old = torch.equal(loaded.classifier.weight, first.classifier.weight)
        same_bits(first if old else second, loaded)
        assert old or fails_at >= 5
    assert not list(tmp_path.glob(".*"))
