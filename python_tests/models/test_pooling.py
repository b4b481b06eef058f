"""What a classification head reads, and the run file that remembers it."""

import copy
import json
import pickle

import pytest
import tiny
import tiny_text
import torch
import transformers
from checkpoint_cases import edit_sealed

from adamix_kernels.models._files import sealed
from adamix_kernels.models.pooling import head_reads, mean_pool, pooling_of, set_pooling
from adamix_kernels.routing import SentenceRouter
from adamix_kernels.tasks import Run, load_causal, load_classifier, read_run, resolve_model, write_run

SIZES = dict(
    vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    pad_token_id=0,
)  # fmt: skip


def built(name, **options):
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


READS = {
    "Bert": "pooler", "Albert": "pooler", "Ernie": "pooler", "RemBert": "pooler", "Roberta": "first",
    "XLMRoberta": "first", "Electra": "first", "MPNet": "first", "BigBird": "first", "DebertaV2": "first",
}  # fmt: skip
MORE = {"Albert": {"embedding_size": 8}, "RemBert": {"input_embedding_size": 8, "output_embedding_size": 8}}


@pytest.mark.parametrize("name", READS)
def test_what_the_head_reads_is_tried(name):
    model = built(name, **MORE.get(name, {})).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    assert head_reads(model) == READS[name]
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.base_model._forward_hooks
    assert "forward" not in vars(model.base_model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [tiny.tiny_gpt2_classifier, tiny.tiny_bert])
def test_decoders_have_none(make):
    assert head_reads(make()) == ("pooler" if make is tiny.tiny_bert else None)


@pytest.mark.parametrize(("asked", "given"), [("auto", "mean"), ("mean", "mean"), ("model", "model")])
def test_the_choice_is_real_and_told(asked, given, encoder):
    torch.manual_seed(0)
    model, tokenizer = load_classifier(resolve_model(str(encoder)), ["a", "b"], asked)
    assert pooling_of(model) == given
    assert model.config.adamix_pooling == given
    batch = tokenizer(["good", "a very bad film"], padding=True, return_tensors="pt")
    states = model.bert(**batch).last_hidden_state
    pooled = mean_pool(states, batch["attention_mask"]) if given == "mean" else model.bert.pooler(states)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.eval()(**batch).logits, model.classifier(pooled))
        assert pooling_of(twin) == given


def with_tokenizer(folder, model):
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tiny_text.VOCABULARY))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return resolve_model(str(folder))


@pytest.mark.parametrize(("asked", "given"), [("auto", "mean"), ("mean", "mean"), ("model", "model")])
def test_a_head_that_takes_the_first_token_reads_the_mean_there(asked, given, tmp_path):
    model, tokenizer = load_classifier(with_tokenizer(tmp_path, tiny.tiny_roberta()), ["a", "b"], asked)
    assert pooling_of(model) == given
    batch = tokenizer(["good", "a very bad film"], padding=True, return_tensors="pt")
    states = tiny.tiny_roberta().roberta(**batch).last_hidden_state
    read = mean_pool(states, batch["attention_mask"]) if given == "mean" else states[:, 0]
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.eval()(**batch).logits, model.classifier(read.unsqueeze(1)))
        torch.testing.assert_close(twin.roberta(**batch).last_hidden_state[:, 1:], states[:, 1:])
        assert pooling_of(twin) == given


def test_a_head_that_takes_the_last_token_keeps_it(tmp_path, caplog):
    for asked in ("auto", "mean", "model"):
        model, _ = load_classifier(with_tokenizer(tmp_path, tiny.tiny_gpt2_classifier()), ["a", "b"], asked)
        assert pooling_of(model) == "model"
        assert ("'mean' changes nothing" in caplog.text) == (asked != "auto")
    with pytest.raises(ValueError, match="pooling: got 'mean' for a GPT2ForSequenceClassification"):
        set_pooling(tiny.tiny_gpt2_classifier(), "mean")


def test_pooling_is_not_undone(encoder):
    model, _ = load_classifier(resolve_model(str(encoder)), ["a", "b"])
    set_pooling(model, "mean")
    assert len(model.bert._forward_hooks) == 1
    with pytest.raises(ValueError, match="pooling: got 'model' for a model whose head reads the mean"):
        set_pooling(model, "model")


def test_without_a_mask_all_tokens_count(encoder):
    model, _ = load_classifier(resolve_model(str(encoder)), ["a", "b"])
    ids = torch.tensor([[2, 5, 3]])
    torch.testing.assert_close(model.eval()(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_a_row_that_is_all_padding_has_no_mean():
    """Zeros, for which no gate and no class is more likely by the text, in every dtype; the other rows are unmoved."""
    states, mask = torch.randn(3, 4, 8), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        pooled = mean_pool(states.to(dtype), mask)
        assert torch.equal(pooled[1], torch.zeros(8, dtype=dtype))
        assert torch.equal(pooled[2], states[2].to(dtype).mean(0))
    gates = SentenceRouter(8, 4)(states, mask).gates
    torch.testing.assert_close(gates[1], torch.full((4,), 0.25))


def test_a_classifier_that_reads_the_mean_answers_a_row_of_padding(encoder):
    model, _ = load_classifier(resolve_model(str(encoder)), ["a", "b"], "mean")
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [0] * 5])}
    logits = model.eval()(**batch).logits
    assert logits.isfinite().all()
    alone = model(**{name: value[:1] for name, value in batch.items()}).logits
    torch.testing.assert_close(logits[:1], alone)


def test_a_regression_has_one_output(encoder):
    model, tokenizer = load_classifier(resolve_model(str(encoder)), [], task="regression")
    batch = tokenizer(["good"], return_tensors="pt")
    out = model(**batch, labels=torch.tensor([0.5]))
    assert out.logits.shape == (1, 1)
    torch.testing.assert_close(out.loss, (out.logits[0, 0] - 0.5) ** 2)
    with pytest.raises(ValueError, match="task: got 'generation', expected one of 'classification', 'regression'"):
        load_classifier(resolve_model(str(encoder)), [], task="generation")


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    tiny.tiny_gpt2().save_pretrained(tmp_path)
    for load in (load_causal, lambda encoder: load_classifier(encoder, ["a", "b"])):
        with pytest.raises(ValueError, match="no file of a tokenizer"):
            load(resolve_model(str(tmp_path)))


def test_only_the_head_is_drawn_in_silence(encoder, caplog):
    load_classifier(resolve_model(str(encoder)), ["a", "b"])
    assert not caplog.text
    whole = transformers.BertModel.from_pretrained(encoder)
    state = {name: value for name, value in whole.state_dict().items() if "pooler" not in name}
    whole.save_pretrained(encoder, state_dict=state)
    caplog.clear()
    load_classifier(resolve_model(str(encoder)), ["a", "b"])  # a mean stands in its place
    assert not caplog.text
    load_classifier(resolve_model(str(encoder)), ["a", "b"], "model")
    assert "2 weights, which were drawn at random: bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text


RUN = Run(
    "some/model", "some/data", ["a", "b"], 48, "mean", "generation", "prompt", None, "answer", {"max_new_tokens": 3}
)


def test_a_run_comes_back(tmp_path):
    write_run(tmp_path, RUN)
    assert read_run(tmp_path) == RUN
    write_run(tmp_path, Run("m", "d", [], 8))
    assert read_run(tmp_path) == Run("m", "d", [], 8, "model", "classification", None, None, None, {})


@pytest.mark.parametrize("version", [1, 2])
def test_older_runs_are_read(version, tmp_path):
    values = {"version": version, "model": "m", "data": "d", "label_names": ["a"], "max_tokens": 8, "pooling": "mean"}
    (tmp_path / "adamix_run.json").write_text(json.dumps(values if version == 1 else sealed(values)))
    assert read_run(tmp_path) == Run("m", "d", ["a"], 8, "mean")


def test_places_of_this_machine_are_written_as_names(tmp_path):
    for name in ("base", "sets", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "sets" / "mine.csv").write_text("text,label\n")
    run = Run(str(tmp_path / "base"), str(tmp_path / "sets" / "mine.csv"), ["a"], 8)
    write_run(tmp_path / "run", run)
    text = (tmp_path / "run" / "adamix_run.json").read_text()
    assert str(tmp_path) not in text
    assert read_run(tmp_path / "run") == run
    (tmp_path / "base").rmdir()
    assert read_run(tmp_path / "run") == run  # a name alone would be somebody else's on the Hub
    write_run(tmp_path / "run", Run("/gone/away/base", "d", ["a"], 8))
    assert read_run(tmp_path / "run").model == "/gone/away/base"


BAD = {"task": "translation", "label_names": "ab", "generation": None, "max_tokens": "many", "novel": 1}


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_of_a_run_are_named(name, tmp_path):
    write_run(tmp_path, RUN)
    edit_sealed(tmp_path / "adamix_run.json", lambda values: values.update({name: BAD[name]}))
    with pytest.raises(ValueError, match=rf"adamix_run\.json: not a run file of this release: .*{name}"):
        read_run(tmp_path)
