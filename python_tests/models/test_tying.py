"""A weight that stands in two places, an lm_head tied to the input embedding: what is done to one keeps the other."""

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import AdaMixConfig, adapt, load_adamix, merge, pack, save_adamix, summary, unmerge
from adamix_kernels.models.tying import shared_parameters, tied_outside


def tied_llama(tie=True):
    return tiny.tiny_llama(tie_word_embeddings=tie)


def adapted(tie=True, **options):
    given = {"num_experts": 3, "r": 2, "target_modules": ["q_proj", "lm_head"], **options}
    return tp.randomise(adapt(tied_llama(tie), AdaMixConfig(method="lora", **given)), 3).eval()


def logits(model):
    with torch.no_grad():
        return model(**tp.inputs(model)).logits


@pytest.mark.parametrize("tie", [True, False])
def test_a_merged_lora_on_a_tied_head_leaves_the_embedding(tie, tmp_path):
    model = adapted(tie)
    want, embedding = logits(model), model.model.embed_tokens.weight.clone()
    merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert list(model.adamix.factors) == [path for path in model.adamix.paths if "q_proj" in path or not tie]
    loaded = load_adamix(tied_llama(tie), save_adamix(model, tmp_path / "merged")).eval()
    assert torch.equal(logits(loaded), logits(model))
    packed = pack(tied_llama(tie), {"a": tmp_path / "merged"})
    torch.testing.assert_close(tp.logits(packed, "a", tp.inputs(packed)), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(unmerge(model)), want)


def test_the_summary_says_that_the_tied_head_keeps_its_lora():
    kept = {tie: int(summary(adapted(tie)).split("\n")[-3].split()[-1]) for tie in (True, False)}
    assert kept == {True: 2 * (tiny.HIDDEN + tiny.VOCAB), False: 0}


def test_a_checkpoint_merged_into_an_untied_head_is_refused_by_a_tied_one(tmp_path):
    folder = save_adamix(merge(adapted(False)), tmp_path)
    model = tied_llama()
    before = tp.state_of(model)
    with pytest.raises(ValueError, match=r"lm_head: got a weight that takes no update, being quantised or another"):
        load_adamix(model, folder)
    tp.same_state(before[:5], tp.state_of(model)[:5])


@pytest.mark.parametrize("tie", [True, False])
def test_tokens_are_added_before_the_head_is_adapted(tie):
    model = adapted(tie)
    before, want = tp.state_of(model), logits(model)
    for refused in ({"new_num_tokens": tiny.VOCAB + 3}, {"pad_to_multiple_of": 48}):
        with pytest.raises(
            ValueError, match=r"new_num_tokens: got \d+ for a model whose lm_head is adapted.* 64 columns"
        ):
            model.resize_token_embeddings(**refused)
    tp.same_state(before, tp.state_of(model))
    for _ in range(2):  # with its experts, and merged
        assert model.resize_token_embeddings(tiny.VOCAB) is model.get_input_embeddings()
        model.tie_weights()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
        model = model if model.adamix.merged else merge(model)
    larger = tied_llama(tie)
    larger.resize_token_embeddings(tiny.VOCAB + 3)
    assert adapt(larger, model.adamix.config).lm_head.lora_b.shape[1] == tiny.VOCAB + 3


def test_tokens_are_added_where_the_head_is_not_adapted():
    model = adapted(target_modules=["q_proj"])
    assert model.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False).num_embeddings == tiny.VOCAB + 3
    assert logits(model).shape[-1] == tiny.VOCAB + 3


def test_which_parameters_are_shared():
    model = tied_llama()
    assert list(shared_parameters(model).values()) == [["model.embed_tokens.weight", "lm_head.weight"]]
    for one in (model, torch.compile(model)):
        assert tied_outside(one, "lm_head") == ["model.embed_tokens.weight"]
    assert not tied_outside(model, "model.layers.0")
    assert not shared_parameters(tied_llama(False))
    bert = tiny.tiny_bert()
    bert.alias = bert.bert  # one encoder by two ways
    leaf = torch.nn.Linear(2, 2)
    bert.one, bert.two = leaf, torch.nn.Sequential(leaf)
    assert list(shared_parameters(bert).values()) == [["one.weight", "two.0.weight"], ["one.bias", "two.0.bias"]]
