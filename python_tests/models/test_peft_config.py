"""At home from PEFT: its names in AdaMixConfig, LoraConfig taken over, PeftModel refused."""

import copy
import dataclasses
import json
import pickle

import peft
import pytest
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from adamix_kernels import AdaMixConfig, RoutedLoRALinear, adapt, load_adamix, merge, save_adamix
from adamix_kernels.convert import export_peft
from adamix_kernels.models.families import LORA_TARGETS

BUILD = {"bert": tiny.tiny_bert, "gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama}
ONE = dict(num_experts=1, consistency_weight=0.0)


def test_pefts_names_at_construction():
    config = AdaMixConfig(method="lora", r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, bias="none")
    assert (config.alpha, config.dropout, config.scaling) == (8, 0.1, 4.0)
    assert (config.lora_alpha, config.lora_dropout, config.bias) == (8, 0.1, "none")
    assert AdaMixConfig(alpha=8.0, r=4).scaling == 2.0
    assert AdaMixConfig(alpha=8.0, lora_alpha=8.0).alpha == 8.0
    assert AdaMixConfig(task_type=peft.TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"
    assert type(AdaMixConfig(task_type=peft.TaskType.CAUSAL_LM).task_type) is str


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=4.0, lora_alpha=8), "lora_alpha: got 8 beside alpha=4.0, expected one"),
        (dict(alpha=float("32"), lora_alpha=8), "lora_alpha: got 8 beside alpha=32.0"),  # given, though the default
        (dict(dropout=0.0, lora_dropout=0.5), "lora_dropout: got 0.5 beside dropout=0.0"),
        (dict(lora_alpha=0), "alpha: got 0, expected a number above 0"),
        (dict(lora_dropout=1.0), "dropout: got 1.0, expected 0 <= dropout < 1"),
        (dict(bias="lora_only"), "bias: got 'lora_only', expected 'none'.*modules_to_save"),
        (dict(use_rslora=1), "use_rslora: got 1, expected True or False"),
        (dict(task_type="NER"), "task_type: got 'NER', expected one of 'SEQ_CLS'"),
    ],
)
def test_conflicts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaMixConfig(**options)


def test_copies_keep_one_value_under_both_names():
    config = AdaMixConfig(lora_alpha=8, task_type="SEQ_CLS")
    assert dataclasses.replace(config, alpha=2.0).lora_alpha == 2.0
    assert dataclasses.replace(AdaMixConfig(), lora_alpha=2.0).alpha == 2.0
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)
    assert not {"lora_alpha", "lora_dropout", "bias"} & {f.name for f in dataclasses.fields(config)}


def test_json_holds_our_names_and_new_fields_only_where_they_matter(tmp_path):
    path = tmp_path / "adamix_config.json"
    AdaMixConfig(lora_alpha=8).save(path)
    first_release = (
        "method num_experts bottleneck activation r alpha dropout qkv share routing consistency_weight target_modules "
        "exclude_modules layers_to_transform layers_pattern modules_to_save version"
    )
    written = json.loads(path.read_text())
    assert set(written) == set(first_release.split())
    assert written["alpha"] == 8
    config = AdaMixConfig(use_rslora=True, task_type="SEQ_CLS", qkv=None)
    config.save(path)
    assert AdaMixConfig.load(path) == config
    # A file written by hand may use PEFT's names.
    path.write_text(json.dumps({"method": "lora", "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none"}))
    assert AdaMixConfig.load(path) == AdaMixConfig(method="lora", alpha=8, dropout=0.1)


CASES = {
    "bert": [
        dict(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"),
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="SEQ_CLS"),
        dict(target_modules="all-linear", exclude_modules=["key"], modules_to_save=["pooler"], task_type="SEQ_CLS"),
        dict(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
        dict(
            r=4,
            target_modules=["query", "value"],
            rank_pattern={"query": 2},
            alpha_pattern={"1.attention.self.value": 3},
        ),
        dict(target_modules=["query"], task_type=peft.TaskType.TOKEN_CLS, modules_to_save=["pooler", "classifier"]),
        dict(),
    ],
    "gpt2": [
        dict(r=4, fan_in_fan_out=True, lora_dropout=0.2),
        dict(r=4, use_rslora=True, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"),
    ],
    "llama": [dict(r=2, target_modules=r".*\.[qv]_proj", modules_to_save=["lm_head"])],
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in CASES for case in CASES[kind]])
def test_a_lora_config_is_the_same_lora(kind, case, tmp_path):
    """With one expert: PEFT's own weights, the same layers, heads, trainable tensors, outputs and export."""
    case = {k: list(v) if isinstance(v, list) else v for k, v in case.items()}
    lora = peft.LoraConfig(**case)
    config = AdaMixConfig.from_peft(lora, **ONE)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(BUILD[kind](), lora).eval()
    ours = adapt(BUILD[kind](), config).eval()
    found = {p: m for p, m in theirs.named_modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "r")}
    assert ours.adamix.paths == [path.removeprefix("base_model.model.") for path in found]
    with torch.no_grad():
        for path, layer in found.items():
            mine = ours.get_submodule(path.removeprefix("base_model.model."))
            assert isinstance(mine, RoutedLoRALinear)
            layer.lora_B["default"].weight.normal_(std=0.1)
            mine.lora_a[0].copy_(layer.lora_A["default"].weight)
            mine.lora_b[0].copy_(layer.lora_B["default"].weight)
            assert mine.scaling == pytest.approx(layer.scaling["default"])
            assert mine.dropout == lora.lora_dropout
    whole = {n for n, p in theirs.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    here = {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}
    assert here == {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in whole}
    batch = tiny.batch_for(BUILD[kind]())
    with torch.no_grad():
        want = theirs(**batch).logits
        torch.testing.assert_close(ours(**batch).logits, want, rtol=1e-5, atol=1e-5)
        export_peft(ours, tmp_path)
        back = peft.PeftModel.from_pretrained(BUILD[kind](), tmp_path).eval()
        torch.testing.assert_close(back(**batch).logits, want, rtol=1e-5, atol=1e-5)
        assert back.peft_config["default"].use_rslora == bool(lora.use_rslora)
        assert config.task_type is None or back.peft_config["default"].task_type == config.task_type
        save_adamix(ours, tmp_path / "checkpoint")
        again = load_adamix(BUILD[kind](), tmp_path / "checkpoint").eval()
        assert again.adamix.saved == ours.adamix.saved
        assert torch.equal(again(**batch).logits, ours(**batch).logits)
        torch.testing.assert_close(merge(ours)(**batch).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qkv", [("q", "v"), None])
def test_rslora_of_several_experts_saves_and_exports(qkv, tmp_path):
    options = dict(method="lora", r=4, lora_alpha=8, use_rslora=True, num_experts=2, qkv=qkv)
    model = adapt(tiny.tiny_gpt2(), AdaMixConfig(**options)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    batch = tiny.batch_for(model)
    layer = model.get_submodule(model.adamix.paths[0])
    assert layer.scaling == 8 / 4**0.5
    assert layer.groups == (1 if qkv is None else 2)
    with torch.no_grad():
        want = model(**batch).logits
        save_adamix(model, tmp_path / "a")
        again = load_adamix(tiny.tiny_gpt2(), tmp_path / "a").eval()
        assert torch.equal(again(**batch).logits, want)
        export_peft(model, tmp_path / "b")
        back = peft.PeftModel.from_pretrained(tiny.tiny_gpt2(), tmp_path / "b").eval()
        for logits in (back(**batch).logits, merge(model)(**batch).logits):
            torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(use_dora=True), ["use_dora=True"]),
        (dict(init_lora_weights="gaussian"), ["init_lora_weights='gaussian'"]),
        (dict(init_lora_weights=False), ["init_lora_weights=False"]),
        (dict(bias="all", lora_bias=True), ["bias='all'", "lora_bias=True"]),
        (dict(trainable_token_indices=[1, 2]), [r"trainable_token_indices=\[1, 2\]"]),
        (dict(target_parameters=["mlp.experts.down_proj"]), ["target_parameters="]),
        (dict(layer_replication=[(0, 2)]), ["layer_replication="]),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(options, names):
    config = peft.LoraConfig(target_modules=["query"], **options)
    for name in names:
        with pytest.raises(ValueError, match=f"config: got .*{name}.*no counterpart"):
            AdaMixConfig.from_peft(config)


def test_a_field_that_peft_adds_is_refused_too():
    @dataclasses.dataclass
    class Newer(peft.LoraConfig):
        use_magic: bool = False

    assert AdaMixConfig.from_peft(Newer(r=3, target_modules=["query"])).r == 3
    with pytest.raises(ValueError, match=r"config: got use_magic=True, .*use_magic=False"):
        AdaMixConfig.from_peft(Newer(use_magic=True))


def test_only_a_lora_config_is_taken():
    for other in (peft.AdaLoraConfig(total_step=10), peft.IA3Config(), {"r": 4}, peft.LoraConfig, None):
        with pytest.raises(TypeError, match=r"config: got \w+, expected a peft.LoraConfig"):
            AdaMixConfig.from_peft(other)
    assert AdaMixConfig.from_peft(peft.LoraConfig(r=8), r=2, num_experts=3).r == 2
    with pytest.raises(TypeError, match="expected an AdaMixConfig"):
        adapt(tiny.tiny_bert(), peft.LoraConfig())


def test_defaults_are_pefts_where_it_has_some():
    """A LoraConfig without target_modules means the same layers here as there."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS

    for kind, rule in LORA_TARGETS.items():
        assert kind not in PEFTS or sorted(rule) == sorted(PEFTS[kind]), kind


@pytest.mark.parametrize("part", ["whole", "tuner", "base"])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_peft_model_is_refused_and_unchanged(kind, part):
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
    }[kind]()
    whole = peft.get_peft_model(tiny.tiny_bert(), config)
    model = {"whole": whole, "tuner": whole.base_model, "base": whole.get_base_model()}[part]
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"model: got .*PEFT's, expected .*merge_and_unload\(\)"):
        adapt(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == before


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_the_ways_out_of_a_peft_model_work(way):
    whole = peft.get_peft_model(tiny.tiny_bert(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if "lora_B" in name:
                p.normal_()
    batch = tiny.batch_for(tiny.tiny_bert())
    with torch.no_grad():
        want = (whole if way == "merge_and_unload" else tiny.tiny_bert())(**batch).logits
        model = adapt(getattr(whole, way)(), AdaMixConfig(method="lora")).eval()
        if way == "unload":
            model.classifier.load_state_dict(tiny.tiny_bert().classifier.state_dict())
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-5, atol=1e-5)
