"""The whole task head is trained and saved: what stands outside the encoder, and no pretrained file holds."""

import json

import pytest
import torch
import transformers as tr
from checkpoint_cases import edit_header
from tiny import HEADS, HIDDEN, LAYERS, VOCAB, tiny_bert
from tiny_families import spread

from adamix_kernels import AdaMixConfig, adapt, load, load_adamix
from adamix_kernels.models.checkpoint import CHECKPOINT_NAME

IDS = torch.arange(3, 35).view(4, 8)
SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64,
    max_position_embeddings=40, pad_token_id=0, pooler_hidden_size=HIDDEN,
)  # fmt: skip


@pytest.fixture
def deberta(tmp_path):
    """A folder like that of a published DeBERTa, which has no pooler; and a classifier from it."""
    torch.manual_seed(0)
    tr.DebertaV2Model(tr.DebertaV2Config(**SIZES)).save_pretrained(tmp_path / "base")
    return tr.DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "base")


def test_debertas_pooler_is_of_its_head(deberta, tmp_path):
    model = spread(adapt(deberta, AdaMixConfig(bottleneck=4)))
    assert model.adamix.saved == ["pooler", "classifier"]
    assert all(p.requires_grad for p in model.pooler.parameters())
    model.save_pretrained(tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_checkpoint_without_the_pooler_is_loaded_and_named(deberta, tmp_path, caplog):
    model = spread(adapt(deberta, AdaMixConfig(bottleneck=4, modules_to_save=["classifier"])))
    model.save_pretrained(tmp_path / "out")
    header = json.loads((tmp_path / "out" / CHECKPOINT_NAME).read_text())
    # As releases wrote it that did not know of the pooler.
    edit_header(tmp_path / "out", config={**header["config"], "modules_to_save": None})
    again, _ = load(tmp_path / "out")
    assert "no values for 2 weights, which were drawn at random: pooler.dense.bias, pooler.dense.weight" in caplog.text
    assert again.adamix.saved == ["classifier"]
    again.pooler.load_state_dict(model.pooler.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_whole_head_more_is_refused(tmp_path):
    model = adapt(tiny_bert(), AdaMixConfig(bottleneck=4, modules_to_save=[]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CHECKPOINT_NAME).read_text())["config"]
    edit_header(tmp_path, config={**config, "modules_to_save": None})
    with pytest.raises(ValueError, match="saved_modules: the model lacks none and has classifier besides"):
        load_adamix(tiny_bert(), tmp_path)


def test_an_encoders_own_pooler_stays_frozen():
    assert adapt(tr.BertModel(tiny_bert().config), AdaMixConfig(bottleneck=4)).adamix.saved == []


def test_xlnets_head_has_names_of_its_own():
    config = tr.XLNetConfig(vocab_size=VOCAB, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS, d_inner=64)
    model = adapt(tr.XLNetForSequenceClassification(config), AdaMixConfig(bottleneck=4, target_modules=["ff.layer_2"]))
    assert model.adamix.saved == ["sequence_summary", "logits_proj"]
