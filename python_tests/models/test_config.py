"""AdaMixConfig: validation and its JSON."""

import json

import pytest

from adamix_kernels import AdaMixConfig


def test_round_trip_through_json(tmp_path):
    config = AdaMixConfig(method="lora", r=8, qkv=("q", "k"), target_modules=["a", "b"], share=None, routing="token")
    config.save(tmp_path)
    written = json.loads((tmp_path / "adamix_config.json").read_text())
    assert written["version"] == 1
    assert AdaMixConfig.load(tmp_path) == config
    assert AdaMixConfig.load(tmp_path / "adamix_config.json") == config
    assert AdaMixConfig.from_dict(config.to_dict()) == config
    assert list(tmp_path.iterdir()) == [tmp_path / "adamix_config.json"]


def test_passes_follow_the_consistency_weight():
    assert AdaMixConfig().passes == 2
    assert AdaMixConfig(consistency_weight=0.0).passes == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "prefix"), ("num_experts", 0), ("num_experts", 2.0), ("bottleneck", -1), ("r", True),
        ("dropout", 1.0), ("alpha", 0), ("consistency_weight", -1), ("activation", "tanh"), ("share", "both"),
        ("routing", "layer"), ("qkv", ()), ("qkv", ("q", "x")), ("version", 2),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got "):
        AdaMixConfig(**{field: value})


def test_a_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "adamix_config.json"
    path.write_text("{nonsense")
    with pytest.raises(ValueError, match=r"adamix_config\.json: got a file that is not JSON"):
        AdaMixConfig.load(path)
    path.write_text('{"version": 1, "colour": 3}')
    with pytest.raises(ValueError, match=r"config: got unknown keys \['colour'\]"):
        AdaMixConfig.load(path)
    path.write_text('{"version": 9, "colour": 3}')
    with pytest.raises(ValueError, match="version: got 9, expected 1"):
        AdaMixConfig.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="config: got list"):
        AdaMixConfig.load(path)
