"""export_adapterhub: the files of `adapters`, read back without it."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from adamix_kernels.convert import export_adapterhub
from adamix_kernels.models.config import AdaMixConfig
from adamix_kernels.models.inject import adapt
from adamix_kernels.models.merging import merge

H, L, R = tiny.HIDDEN, tiny.LAYERS, 5
FAMILIES = {"bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta}


def adapted(family="bert", **options):
    model = adapt(FAMILIES[family](), AdaMixConfig(**{**dict(bottleneck=R, num_experts=3), **options}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def read(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_shapes_and_both_weight_files(family, tmp_path):
    export_adapterhub(adapted(family), tmp_path, name="task-1")
    _, tensors = read(tmp_path)
    want = {}
    for i in range(L):
        stem = f"{family}.encoder.layer.{i}.output.adapters.task-1"
        want |= {f"{stem}.adapter_down.0.weight": (R, H), f"{stem}.adapter_down.0.bias": (R,)}
        want |= {f"{stem}.adapter_up.weight": (H, R), f"{stem}.adapter_up.bias": (H,)}
    assert {k: tuple(v.shape) for k, v in tensors.items()} == want
    pickled = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    assert pickled.keys() == tensors.keys()
    assert all(torch.equal(pickled[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_describes_the_merged_model(family, tmp_path):
    """AdapterHub's arithmetic for this config, hooked onto the bare model."""
    model = adapted(family, activation="gelu_tanh")
    export_adapterhub(model, tmp_path)
    config, tensors = read(tmp_path)
    assert config["config"]["non_linearity"] == "gelu_new"
    bare = FAMILIES[family]()
    for i, layer in enumerate(getattr(bare, family).encoder.layer):
        stem = f"{family}.encoder.layer.{i}.output.adapters.adamix"
        down = [tensors[f"{stem}.adapter_down.0.{kind}"] for kind in ("weight", "bias")]
        up = [tensors[f"{stem}.adapter_up.{kind}"] for kind in ("weight", "bias")]
        layer.output.dense.register_forward_hook(
            lambda _m, _i, out, down=down, up=up: F.linear(F.gelu(F.linear(out, *down), approximate="tanh"), *up) + out
        )
    bare.load_state_dict(load_file(tmp_path / "model_head.safetensors"), strict=False)
    batch = tiny.batch_for(bare)
    with torch.no_grad():
        torch.testing.assert_close(bare(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "name"), [("gelu", "gelu"), ("relu", "relu"), ("silu", "silu"), (None, "linear")]
)
def test_config_fields(activation, name, tmp_path):
    export_adapterhub(adapted(activation=activation), tmp_path)
    config, _ = read(tmp_path)
    assert (config["model_type"], config["hidden_size"], config["name"]) == ("bert", H, "adamix")
    assert (config["model_class"], config["version"]) == ("BertForSequenceClassification", "adapters.1.3.0")
    bottleneck = config["config"]
    want = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}
    want |= {"ln_before": False, "ln_after": False, "mh_adapter": False, "output_adapter": True, "leave_out": []}
    assert {key: bottleneck[key] for key in want} == want
    assert bottleneck["non_linearity"] == name


@pytest.mark.parametrize("bottleneck", [1, 3, 5, 7, 16, 31])
def test_reduction_factor_rounds_to_the_bottleneck(bottleneck, tmp_path):
    export_adapterhub(adapted(bottleneck=bottleneck), tmp_path)
    factor = read(tmp_path)[0]["config"]["reduction_factor"]
    assert int(H // factor) == bottleneck


def test_widths_that_differ_are_told_layer_by_layer(tmp_path):
    model = adapted(rank_pattern={"1.output.dense": 3})
    for exported in (model, merge(model)):
        export_adapterhub(exported, tmp_path)
        config, tensors = read(tmp_path)
        factors = config["config"]["reduction_factor"]
        widths = {i: len(tensors[f"bert.encoder.layer.{i}.output.adapters.adamix.adapter_down.0.bias"]) for i in "01"}
        assert widths == {i: int(H // factors[i]) for i in "01"} == {"0": R, "1": 3}


def test_head_files(tmp_path):
    model = adapted()
    export_adapterhub(model, tmp_path)
    config = json.loads((tmp_path / "head_config.json").read_text())
    assert (config["name"], config["config"], config["num_labels"]) == (None, None, 2)
    assert config["label2id"] == model.config.label2id
    for tensors in (
        load_file(tmp_path / "model_head.safetensors"),
        torch.load(tmp_path / "pytorch_model_head.bin", weights_only=True),
    ):
        assert tensors.keys() == {"classifier.weight", "classifier.bias"}
        assert torch.equal(tensors["classifier.weight"], model.classifier.weight)


def test_a_headless_model_has_the_prefix_and_no_head_files(tmp_path):
    model = adapt(tiny.tiny_bert(model_class=transformers.BertModel), AdaMixConfig(bottleneck=R))
    export_adapterhub(model, tmp_path)
    assert all(key.startswith("bert.encoder.layer.") for key in read(tmp_path)[1])
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin", "README.md"
    }  # fmt: skip


def test_the_model_card(tmp_path):
    model = adapted()
    model.config._name_or_path = "google-bert/bert-base-uncased"
    export_adapterhub(model, tmp_path / "new", name="task")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.library_name == "adapter-transformers"
    assert set(card.data.tags) >= {"adapter-transformers", "bert"}
    assert "width 5" in card.text
    assert "3 experts" in card.text
    model.config._name_or_path = str(tmp_path)  # a folder is no name on the Hub
    export_adapterhub(model, tmp_path / "local")
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None
    (tmp_path / "new" / "README.md").write_text("mine")
    export_adapterhub(model, tmp_path / "new", name="task")
    assert (tmp_path / "new" / "README.md").read_text() == "mine"


def test_a_merged_model_exports_the_same_values(tmp_path):
    model = adapted()
    export_adapterhub(model, tmp_path / "unmerged")
    export_adapterhub(merge(model), tmp_path / "merged")
    (config, tensors), (merged_config, merged_tensors) = read(tmp_path / "unmerged"), read(tmp_path / "merged")
    assert config == merged_config
    assert all(torch.equal(v, merged_tensors[k]) for k, v in tensors.items())


def test_layers_left_out(tmp_path):
    export_adapterhub(adapted(layers_to_transform=[1]), tmp_path)
    config, tensors = read(tmp_path)
    assert config["config"]["leave_out"] == [0]
    assert all(".layer.1." in key for key in tensors)


def test_what_cannot_be_exported_is_refused(tmp_path):
    folder = tmp_path / "out"
    for model, message in (
        (adapt(tiny.tiny_bert(), AdaMixConfig(method="lora")), "got method 'lora', expected 'adapter'"),
        (adapt(tiny.tiny_gpt2(), AdaMixConfig()), "model_type 'gpt2'"),
        (adapt(tiny.tiny_bert(), AdaMixConfig(target_modules=["output.dense"])), "attention.output.dense"),
        (tiny.tiny_bert(), "without AdaMix"),
    ):
        with pytest.raises(ValueError, match=message):
            export_adapterhub(model, folder)
    with pytest.raises(ValueError, match=r"name: got 'a\.b'"):
        export_adapterhub(adapted(), folder, name="a.b")
    assert not folder.exists()
