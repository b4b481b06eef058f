"""use_experts: one batch, many domains, in a forward and in generate()."""

import pytest
import tiny
import torch

from adamix_kernels import AdaMixConfig, adapt, merge, use_experts
from adamix_kernels.routing import Router

MODELS = {
    "bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta, "gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama,
    "t5": tiny.tiny_t5,
}  # fmt: skip
GENERATORS = ("gpt2", "llama", "t5")
EXPERTS = [2, 0, 1, 0]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(kind, method="lora", share=None, spread=0.3):
    options = dict(method=method, num_experts=3, share=share, r=4, alpha=8.0, bottleneck=8)
    model = adapt(MODELS[kind](), AdaMixConfig(**options))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.copy_(torch.randn_like(parameter) * spread)
    return model


def padded_batch(model, left=False):
    batch = {k: v for k, v in tiny.batch_for(model).items() if k != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)[:, :5]
    short = slice(0, 3) if left else slice(5, None)
    batch["attention_mask"][1, short] = 0
    return batch


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize("share", [None, "up"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_domain_of_a_mixed_batch_is_as_when_run_alone(kind, method, share):
    model = adapted(kind, method, share)
    batch = padded_batch(model)
    with torch.no_grad():
        with use_experts(model, EXPERTS):
            mixed = model(**batch).logits
        for expert in range(3):
            rows = [n for n, chosen in enumerate(EXPERTS) if chosen == expert]
            with use_experts(model, expert):
                alone = model(**rows_of(batch, rows)).logits
            torch.testing.assert_close(mixed[rows], alone, **CLOSE)
        others = [(e + 1) % 3 for e in EXPERTS]
        with use_experts(model, others):
            assert ((model(**batch).logits - mixed).flatten(1).abs().amax(1) > 1e-3).all()


GENERATION = {
    "greedy": dict(num_beams=1),
    "beams": dict(num_beams=3),
    "sequences": dict(num_beams=4, num_return_sequences=3),
    "no_cache": dict(num_beams=2, use_cache=False),
    "static": dict(num_beams=2, cache_implementation="static"),
}


def generated(model, batch, options):
    """(tokens, the scores they were chosen by), each with a first axis of samples."""
    samples = batch["input_ids"].shape[0]
    out = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    scores = torch.stack(out.scores, 1) if options["num_beams"] == 1 else out.sequences_scores
    return out.sequences.unflatten(0, (samples, -1)), scores.unflatten(0, (samples, -1))


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("kind", GENERATORS)
def test_generation_serves_mixed_domains(kind, way):
    """What each domain generates alone: with a KV cache, beams, several sequences, an encoder before."""
    model = adapted(kind, spread=0.3)
    options = {**GENERATION[way], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = padded_batch(model, left=True)
    batch.pop("decoder_input_ids", None)
    with use_experts(model, torch.tensor(EXPERTS)):
        mixed, scores = generated(model, batch, options)
    assert mixed.shape[1] == options.get("num_return_sequences", 1)
    for row, expert in enumerate(EXPERTS):
        with use_experts(model, expert):
            alone, own = generated(model, rows_of(batch, [row]), options)
        assert torch.equal(mixed[row], alone[0])
        torch.testing.assert_close(scores[row], own[0], **CLOSE)
        with use_experts(model, (expert + 1) % 3):
            _, other = generated(model, rows_of(batch, [row]), options)
        assert not torch.allclose(other, own, rtol=1e-4, atol=1e-4)


def test_sampling_follows_too():
    """Sampled with one seed, row for row: the same draw from the same distribution."""
    model = adapted("gpt2", spread=0.15)
    batch = padded_batch(model, left=True)
    options = dict(do_sample=True, max_new_tokens=4, pad_token_id=0, num_return_sequences=2)
    outs = []
    for index in (EXPERTS, torch.tensor(EXPERTS).repeat_interleave(2)):
        torch.manual_seed(3)
        with use_experts(model, index):
            outs.append(model.generate(**batch, **options))
    assert torch.equal(*outs)


def test_in_training_mode_generate_still_gives_each_beam_its_sample_s_expert():
    model = adapted("gpt2", spread=0.15)
    batch = padded_batch(model, left=True)
    options = dict(num_beams=2, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with use_experts(model, EXPERTS):
        want = model.generate(**batch, **options)
        assert torch.equal(model.train().generate(**batch, **options), want)


def test_a_doubled_training_batch_repeats_whole_passes():
    model = adapted("bert")
    batch = padded_batch(model)
    doubled = {name: torch.cat([value, value]) for name, value in batch.items()}
    with use_experts(model.train(), EXPERTS):
        once, both = model(**batch).logits, model(**doubled).logits
    torch.testing.assert_close(both, torch.cat([once, once]), **CLOSE)
    both.sum().backward()
    banks = [p for n, p in model.named_parameters() if n.endswith("lora_b")]
    assert all((bank.grad.flatten(1).abs().amax(1) > 0).all() for bank in banks)


def test_contexts_nest_and_end():
    model = adapted("bert")
    batch = padded_batch(model)
    with torch.no_grad():
        merged = model(**batch).logits
        with use_experts(model, 1):
            one = model(**batch).logits
            with use_experts(model, 2):
                assert not torch.equal(model(**batch).logits, one)
            assert torch.equal(model(**batch).logits, one)
        assert torch.equal(model(**batch).logits, merged)
        with pytest.raises(KeyError), use_experts(model, 1):
            raise KeyError
        for names in ("leases", ["leases", "patents"]):
            with pytest.raises(TypeError, match="for a model that is no pack"), use_experts(model, names):
                pass
        assert torch.equal(model(**batch).logits, merged)
    with pytest.raises(ValueError, match="got a merged model"), use_experts(merge(model), 1):
        pass


def test_what_does_not_fit_the_batch_is_refused():
    model = adapted("gpt2")
    ids = torch.randint(3, 60, (2, 4))
    per_token = torch.randint(3, (2, 4))
    with use_experts(model, per_token), torch.no_grad():
        model(ids)
        with pytest.raises(ValueError, match=r"got experts for 4 tokens in a forward of 1, expected .* \[B\]"):
            model.generate(ids, max_new_tokens=3, pad_token_id=0)
    router = Router(passes=2)
    router.experts = torch.tensor([0, 1, 2])
    cpu = torch.device("cpu")
    # Rows of one token: a layer that flattens [B, S, H] tells nothing of the order of a doubled batch.
    with pytest.raises(ValueError, match="got 3 rows for 24 rows of one token in training, expected 24 or 12"):
        router.draw(3, 24, 1, cpu, True)
    assert router.draw(3, 6, 1, cpu, True).tolist() == [0, 1, 2, 0, 1, 2]
    assert router.draw(3, 6, 1, cpu, False).tolist() == [0, 0, 1, 1, 2, 2]
