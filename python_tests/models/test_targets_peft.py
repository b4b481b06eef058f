"""target_modules and its companions choose the layers that PEFT itself chooses."""

import peft
import pytest
import tiny
from peft.tuners.tuners_utils import BaseTunerLayer

from adamix_kernels import AdaMixConfig, adapt
from adamix_kernels.models.targets import layer_number

MODELS = {
    "bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta, "gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama,
    "t5": tiny.tiny_t5, "gpt2_classifier": tiny.tiny_gpt2_classifier,
}  # fmt: skip
TASKS = dict.fromkeys(("bert", "roberta", "gpt2_classifier"), "SEQ_CLS")
EVERYWHERE = [dict(target_modules="all-linear"), dict(target_modules="All-Linear")]
CASES = {
    "bert": [
        dict(target_modules=["query", "value"]),
        dict(target_modules=["output.dense"]),  # also attention.output.dense
        dict(target_modules=["dense"]),
        dict(target_modules=["bert.encoder.layer.1.attention.self.key", "pooler.dense"]),
        dict(target_modules=r".*\.layer\.\d+\.output\.dense"),
        dict(target_modules=r".*layer\.1.*(query|key)"),
        dict(target_modules=["query", "dense"], exclude_modules=["pooler.dense"]),
        dict(target_modules=["query", "dense"], exclude_modules=r".*attention.*"),
        dict(target_modules="all-linear", exclude_modules=["intermediate.dense", "query"]),
        dict(target_modules=["query", "dense"], layers_to_transform=1),
        dict(target_modules=["query", "value"], layers_to_transform=[0]),
        dict(target_modules=["query"], layers_to_transform=[]),
        dict(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
        dict(target_modules=["query"], layers_to_transform=[0], layers_pattern=["h", "layer"]),
        dict(target_modules=["query", "dense"], modules_to_save=["pooler", "classifier"]),
        dict(target_modules="all-linear", modules_to_save=["pooler", "classifier"]),
    ],
    "roberta": [dict(target_modules=["dense", "out_proj"]), dict(target_modules=["query"], layers_to_transform=[1])],
    "gpt2": [
        dict(target_modules=["c_attn"]),
        dict(target_modules=["c_proj"]),
        dict(target_modules=["mlp.c_proj", "h.0.attn.c_proj"]),
        dict(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h"),
    ],
    "gpt2_classifier": [dict(target_modules=["c_fc"], layers_to_transform=0)],
    "llama": [
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=1),
        dict(target_modules=r"model\.layers\.0\..*_proj"),
    ],
    "t5": [
        dict(target_modules=["q", "v"]),
        dict(target_modules=["SelfAttention.q", "wo"]),
        dict(target_modules=["q"], layers_to_transform=[1]),  # the block, not the sublayer (peft 0.21; 0.18 differs)
        dict(target_modules=["q", "wi"], layers_to_transform=[1], layers_pattern="block"),
        dict(target_modules=r"decoder\..*EncDecAttention\.[kv]"),
    ],
}
ALL = [(kind, case) for kind in MODELS for case in CASES[kind] + EVERYWHERE]


def pefts(kind, case):
    case = {**case, "modules_to_save": list(case["modules_to_save"])} if "modules_to_save" in case else case
    model = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(r=2, task_type=TASKS.get(kind), **case))
    found = [path for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer) and hasattr(layer, "r")]
    return [path.removeprefix("base_model.model.") for path in found]


@pytest.mark.parametrize(("kind", "case"), ALL, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_the_same_layers_as_peft(kind, case):
    want = pefts(kind, case)
    assert want
    model = adapt(MODELS[kind](), AdaMixConfig(method="lora", r=2, **case))
    assert model.adamix.paths == want


@pytest.mark.parametrize(
    "case", [dict(target_modules=["quer"]), dict(target_modules=["query"], layers_to_transform=[9])]
)
def test_what_peft_refuses_is_refused(case):
    with pytest.raises(ValueError, match=r"(?i)target.modules"):
        pefts("bert", case)
    with pytest.raises(ValueError, match="target_modules: got"):
        adapt(tiny.tiny_bert(), AdaMixConfig(method="lora", **case))


def test_layers_pattern_needs_layers():
    with pytest.raises(ValueError, match="layers_pattern"):
        peft.LoraConfig(target_modules=["query"], layers_pattern="layer")
    with pytest.raises(ValueError, match="layers_pattern: got 'layer', expected layers_to_transform"):
        AdaMixConfig(layers_pattern="layer")


def test_the_same_modules_train_whole():
    names = ["pooler", "classifier"]
    theirs = peft.get_peft_model(
        tiny.tiny_bert(), peft.LoraConfig(target_modules=["query"], modules_to_save=list(names))
    )
    ours = adapt(tiny.tiny_bert(), AdaMixConfig(method="lora", target_modules=["query"], modules_to_save=names))
    want = {n for n, p in theirs.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    found = {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}
    assert found == {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in want}


@pytest.mark.parametrize(
    ("path", "pattern", "number"),
    [
        ("bert.encoder.layer.3.output.dense", None, 3),
        ("h.0.attn.c_attn", None, 0),  # a headless model, where PEFT finds none
        ("encoder.block.2.layer.0.SelfAttention.q", None, 2),
        ("encoder.block.2.layer.0.SelfAttention.q", "layer", 0),
        ("model.layers.5.mlp.experts.7.up_proj", ["experts"], 7),
        ("model.layers.5.mlp.experts.7.up_proj", ["nothing", "layers"], 5),
        ("model.layers.5.mlp.up_proj", "h", None),
        ("classifier.dense", None, None),
    ],
)
def test_layer_numbers(path, pattern, number):
    assert layer_number(path, pattern) == number
