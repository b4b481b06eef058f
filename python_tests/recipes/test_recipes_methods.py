"""What each method trains, prompts, and beam search."""

import pytest
import tiny
import tiny_recipes
import tiny_text
import torch
import transformers
from transformers.generation import NoRepeatNGramLogitsProcessor

from adamix_kernels.models import gating
from adamix_kernels.recipes import parse_method
from adamix_kernels.recipes.config import from_dict
from adamix_kernels.recipes.methods import build, kept_parameters
from adamix_kernels.recipes.prompt import Prompt, encode_prompts, prompt_for, read_at_mask, word_ids
from adamix_kernels.tasks import TextSplit
from adamix_kernels.tasks.generation import _AfterContext, beam_decode, encode_texts, pair_collator

H, LAYERS = tiny.HIDDEN, tiny.LAYERS
HEAD = 2 * H + 2


def _recipe(kind="classification", **adamix):
    more = {"prompt": {"template": "{text} {mask}", "words": {}}} if kind == "prompt" else {}
    return from_dict(
        {
            "name": "t", "kind": kind, "model": "m", "data": "d",
            "metrics": ["bleu" if kind == "generation" else "accuracy"],
            "training": {"learning_rate": 1e-3}, "adamix": {"bottleneck": 6, **adamix}, **more,
        }
    )  # fmt: skip


def _trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _adapter(width):
    return 2 * H * width + H + width


@pytest.mark.parametrize(
    ("method", "size", "kept"),
    [
        ("head", HEAD, HEAD),
        ("pfeiffer", HEAD + LAYERS * _adapter(6), HEAD + LAYERS * _adapter(6)),
        ("houlsby", HEAD + 2 * LAYERS * _adapter(3), HEAD + 2 * LAYERS * _adapter(3)),
        ("houlsby:bottleneck=2", HEAD + 2 * LAYERS * _adapter(2), HEAD + 2 * LAYERS * _adapter(2)),
        ("soup:models=3,bottleneck=5", HEAD + LAYERS * _adapter(5), HEAD + LAYERS * _adapter(5)),
        ("adamix:learning_rate=0.1", HEAD + LAYERS * (_adapter(6) + 3 * (6 * H + 6)), HEAD + LAYERS * _adapter(6)),
        ("adamix", HEAD + LAYERS * (_adapter(6) + 3 * (6 * H + 6)), HEAD + LAYERS * _adapter(6)),
        ("adamix:num_experts=2,share=null", HEAD + 2 * LAYERS * _adapter(6), HEAD + LAYERS * _adapter(6)),
        ("lora:r=2", HEAD + LAYERS * 2 * 2 * 2 * H, HEAD + LAYERS * 2 * 2 * 2 * H),
        ("prefix:tokens=3", HEAD + LAYERS * 2 * 3 * H, HEAD + LAYERS * 2 * 3 * H),
    ],
)
def test_sizes_on_an_encoder(method, size, kept):
    if method.partition(":")[0] in ("lora", "prefix"):
        pytest.importorskip("peft")
    built = build(parse_method(method), tiny.tiny_bert(), _recipe())
    assert (_count(built.model), kept_parameters(built)) == (size, kept)
    assert built.experts == method.startswith("adamix")
    built.model.train()(**tiny.batch_for(tiny.tiny_bert())).loss.backward()
    # None of what is trained stays out of the gradient (of M experts, those drawn).
    without = [n for n, p in built.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("make", [tiny.tiny_bert, tiny.tiny_roberta])
def test_prefixes_reach_an_encoder_with_and_without_a_pooler(make):
    pytest.importorskip("peft")
    model, batch = make(), tiny.batch_for(tiny.tiny_bert())
    plain = model(**batch).logits
    built = build(parse_method("prefix:tokens=3"), model, _recipe()).model
    (prefix,) = (p for n, p in built.named_parameters() if "prompt_encoder" in n and p.requires_grad)
    with torch.no_grad():
        prefix.fill_(1.0)
    logits = built(**batch).logits
    assert logits.shape == plain.shape
    assert (logits - plain).abs().max() > 1e-3
    logits.sum().backward()
    assert prefix.grad.abs().sum() > 0


def test_prefixes_reach_what_is_generated():
    pytest.importorskip("peft")
    built = build(parse_method("prefix:tokens=3"), tiny.tiny_gpt2(), _recipe("generation")).model
    (prefix,) = (p for p in built.parameters() if p.requires_grad)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    seen = []
    for scale in (0.0, 5.0):
        torch.manual_seed(0)
        with torch.no_grad():
            prefix.copy_(scale * torch.randn(prefix.shape))
        out = built.generate(**inputs, **options)
        for step, logits in enumerate(out.logits):
            known = out.sequences[:, : 4 + step]
            once = built(input_ids=known, attention_mask=torch.ones_like(known)).logits[:, -1]
            torch.testing.assert_close(logits, once, atol=1e-5, rtol=1e-5)
        seen.append(out.logits[0])
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_equal_gates_are_one_wide_lora_and_stay_so():
    recipe = _recipe(method="lora", share=None, num_experts=4, r=3, alpha=6.0, qkv=None)
    built = build(parse_method("equal"), tiny.tiny_bert(), recipe)
    assert (built.experts, built.gates, kept_parameters(built)) == (False, False, _count(built.model))
    layers = gating.routed_layers(built.model)
    optimizer = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        built.model.train()(**tiny.batch_for(tiny.tiny_bert())).loss.backward()
        optimizer.step()
    plain = tiny.tiny_bert()
    plain.classifier.load_state_dict(built.model.classifier.state_dict())
    for path, layer in layers.items():
        assert not layer.gate.weight.requires_grad
        assert not layer.gate.weight.any()
        wide_a, wide_b = layer.lora_a.flatten(0, 1), torch.cat(list(layer.lora_b), 1)  # of rank 12, scaling 6 / 12
        assert wide_b.any()
        with torch.no_grad():
            plain.get_submodule(path).weight += 6 / 12 * wide_b @ wide_a
    batch = tiny.batch_for(plain)
    torch.testing.assert_close(built.model.eval()(**batch).logits, plain.eval()(**batch).logits, atol=1e-5, rtol=1e-5)


def test_learned_gates_are_kept_whole_and_a_soup_may_be_of_loras():
    recipe = _recipe(method="lora", share=None, num_experts=4, r=3)
    built = build(parse_method("adamix:routing=learned,consistency_weight=0"), tiny.tiny_bert(), recipe)
    assert (built.experts, built.gates, kept_parameters(built)) == (True, True, _count(built.model))
    soup = build(parse_method("soup"), tiny.tiny_bert(), recipe).model
    assert (soup.adamix.config.method, soup.adamix.config.num_experts, soup.adamix.config.r) == ("lora", 1, 3)


def test_full_and_biases():
    model = tiny.tiny_bert()
    assert _trained(build(parse_method("full"), model, _recipe()).model) == {n for n, _ in model.named_parameters()}
    trained = _trained(build(parse_method("bitfit"), tiny.tiny_bert(), _recipe()).model)
    assert "bert.encoder.layer.0.attention.output.LayerNorm.bias" in trained
    assert {n for n in trained if not n.endswith(".bias")} == {"classifier.weight"}


def test_houlsby_has_both_places_and_both_model_families():
    for model, places in (
        (
            tiny.tiny_roberta(),
            ("roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.0.output.dense"),
        ),
        (tiny.tiny_gpt2(), ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj")),
    ):
        built = build(parse_method("houlsby"), model, _recipe())
        assert built.model.adamix.paths[:2] == list(places)
        assert len(built.model.adamix.paths) == 2 * LAYERS


def test_lora_on_gpt2_leaves_the_keys_alone():
    recipe = _recipe("generation").changed({"methods.lora": {"r": 2, "alpha": 4}})
    built = build(parse_method("lora"), tiny.tiny_gpt2(), recipe)
    assert _count(built.model) == kept_parameters(built) == LAYERS * 2 * 2 * 2 * H
    assert not built.experts
    assert built.model.adamix.config.consistency_weight == 0


def test_what_cannot_be_says_why():
    with pytest.raises(ValueError, match="has no head of its own"):
        build(parse_method("head"), tiny.tiny_gpt2(), _recipe("generation"))
    with pytest.raises(NotImplementedError, match="masked language models"):
        build(parse_method("prefix"), tiny.tiny_bert(model_class=transformers.BertForMaskedLM), _recipe("prompt"))
    with pytest.raises(ValueError, match="houlsby: got a model of type 'llama'"):
        build(parse_method("houlsby"), tiny.tiny_llama(), _recipe("generation"))


def test_head_of_a_masked_model_is_its_own_part():
    model = tiny.tiny_bert(model_class=transformers.BertForMaskedLM)
    trained = _trained(build(parse_method("head"), model, _recipe("prompt")).model)
    assert trained
    assert all(name.startswith("cls.") and "decoder.weight" not in name for name in trained)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny_text.write_encoder(tmp_path_factory.mktemp("encoder"))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_prompts_are_words_around_the_mask(tokenizer):
    prompt = Prompt("{text} very {mask} {pair}", ["good", "bad"], bare_text=True, lower_pair=True)
    split = TextSplit(["the film.", "a story"], ["The meal", "not fine"], [1, 0])
    rows = encode_prompts(split, tokenizer, prompt, 16)
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    assert words[0] == ["[CLS]", "the", "film", "very", "[MASK]", "the", "meal", "[SEP]"]
    assert [row["labels"] for row in rows] == [1, 0]
    assert word_ids(prompt, tokenizer) == tokenizer.convert_tokens_to_ids(["good", "bad"])


def test_long_texts_lose_their_ends_and_never_the_mask(tokenizer):
    prompt = Prompt("{text} very {mask}", ["good", "bad"])
    text = "the film was a story was the [MASK] meal"
    (row,) = encode_prompts(TextSplit([text], None, [0]), tokenizer, prompt, 8)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] the film was a very [MASK] [SEP]"
    (row,) = encode_prompts(TextSplit([text], None, [0]), tokenizer, prompt, 30)
    assert row["input_ids"].count(tokenizer.mask_token_id) == 1
    with pytest.raises(ValueError, match="the template alone exceeds"):
        encode_prompts(TextSplit([text], None, [0]), tokenizer, prompt, 3)


def test_wrong_prompts(tokenizer):
    with pytest.raises(ValueError, match=r"expected \{text\} and one \{mask\}"):
        Prompt("{text} was", ["good"])
    with pytest.raises(ValueError, match="expected a word for the label '1'"):
        prompt_for({"template": "{text} {mask}", "words": {"good": ["0", "up"]}}, ["0", "1"])
    with pytest.raises(ValueError, match="got 'splendid', which is"):
        word_ids(Prompt("{text} {mask}", ["splendid"]), tokenizer)
    with pytest.raises(ValueError, match="single sentences"):
        encode_prompts(TextSplit(["a"], None, [0]), tokenizer, Prompt("{text} {mask} {pair}", ["good"]), 9)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_logits_at_the_mask_are_those_of_the_whole_model(kind):
    make = tiny.tiny_bert if kind.startswith("Bert") else tiny.tiny_roberta
    model = make(model_class=getattr(transformers, kind))
    ids = torch.randint(5, tiny.VOCAB, (3, 7))
    places = torch.tensor([2, 6, 4])
    ids[torch.arange(3), places] = 4
    expected = model(input_ids=ids).logits[torch.arange(3), places][:, [9, 11]]
    read_at_mask(model, 4, [9, 11])
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_pairs_are_labelled_from_the_text_on(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_recipes.write_causal(tmp_path))
    rows = encode_texts(["name : blue", "a"], ["a blue place", "the place is red ."], tokenizer, 8)
    assert tokenizer.decode(rows[0]["input_ids"]) == "name : blue [BOS] a blue place [EOS]"
    assert rows[0]["labels"] == [-100] * 4 + rows[0]["input_ids"][4:]
    batch = pair_collator(tokenizer)(rows)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum().item() == 8 + len(rows[1]["input_ids"])


def test_beam_search_decodes_alike_alone_and_in_a_batch(tmp_path):
    folder = tiny_recipes.write_causal(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    contexts = ["name : blue | area : north", "name : red"]
    options = {"beams": 3, "max_new_tokens": 6, "stop_ids": [628, 5]}
    alone = beam_decode(model, tokenizer, contexts, batch_size=1, **options)
    assert alone == beam_decode(model, tokenizer, contexts, batch_size=2, **options)
    assert all(len(text.split()) <= 6 for text in alone)
    for text in beam_decode(model, tokenizer, contexts, no_repeat_ngram=1, beams=2, max_new_tokens=12):
        assert len(set(text.split())) == len(text.split()) > 1


def test_the_context_may_come_again():
    scores = torch.zeros(1, 10)
    ids = torch.tensor([[7, 8, 9, 1, 7, 8]])
    banned = NoRepeatNGramLogitsProcessor(3)
    assert banned(ids, scores)[0, 9] == -torch.inf
    assert torch.equal(_AfterContext(banned, 4)(ids, scores), scores)
