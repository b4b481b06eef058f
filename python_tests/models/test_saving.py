"""save_pretrained, push_to_hub and trainers of others: an AdaMix checkpoint, or plain weights, and nothing is lost."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import stat

import pytest
import tiny
import tiny_text
import tiny_training
import torch
import transformers
from tiny_saved import TEXTS, adapted, logits, randomise

from adamix_kernels import (
    AdaMixConfig,
    AdaMixTrainer,
    adapt,
    export_adapterhub,
    export_peft,
    load,
    load_adamix,
    load_pack,
    merge,
    pack,
    save_pack,
)
from adamix_kernels.models import checkpoint
from adamix_kernels.models.checkpoint import CHECKPOINT_NAME, save_adamix
from adamix_kernels.tasks import load_causal, load_classifier, resolve_model

WAY = "AdaMix checkpoint without its base model: use adamix_kernels.load"


@pytest.mark.parametrize("pooling", ["auto", "model"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_save_pretrained_and_load_give_the_same_bits(method, merged, pooling, encoder, tmp_path):
    model, tokenizer = adapted(encoder, method, pooling)
    if merged:
        merge(model)
    want = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again, own = load(tmp_path / "out")
    assert not again.training
    assert torch.equal(logits(again, own), want)
    plain = method == "lora" and merged and pooling == "model"
    assert (tmp_path / "out" / CHECKPOINT_NAME).exists() != plain
    assert (tmp_path / "out" / "model.safetensors").exists() == plain
    if plain:
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(whole.eval(), tokenizer), want)
        return
    base, _ = load_classifier(resolve_model(str(encoder)), ["bad", "good"], pooling)
    assert torch.equal(logits(load_adamix(base, tmp_path / "out").eval(), tokenizer), want)
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)  # knows of no pooling
    assert torch.equal(logits(load_adamix(bare, tmp_path / "out").eval(), tokenizer), want)


PLAIN = {
    "AutoConfig": transformers.AutoConfig.from_pretrained,
    "AutoModel": transformers.AutoModel.from_pretrained,
    "AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification.from_pretrained,
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM.from_pretrained,
    "BertModel": transformers.BertModel.from_pretrained,
    "BertForSequenceClassification": transformers.BertForSequenceClassification.from_pretrained,
    "RobertaModel": transformers.RobertaModel.from_pretrained,
    "pipeline": lambda folder: transformers.pipeline("text-classification", model=str(folder)),
}


@pytest.mark.parametrize("way", PLAIN)
def test_plain_transformers_refuses_by_name(way, encoder, tmp_path):
    model, tokenizer = adapted(encoder)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=WAY):
        PLAIN[way](tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_even_a_configuration_of_one_s_own_draws_no_weights(encoder, tmp_path):
    model, _ = adapted(encoder)
    model.save_pretrained(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(encoder)
    with pytest.raises((TypeError, OSError)):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", config=config)


def test_copies_and_pickles_save_themselves(encoder, tmp_path):
    model, _ = adapted(encoder)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.classifier.bias.fill_(number + 1.0)
        twin.save_pretrained(tmp_path / str(number))
        again, _ = load(tmp_path / str(number))
        assert again.classifier.bias.tolist() == [number + 1.0] * 2
    assert model.save_pretrained.model is model


def test_a_state_dict_stands_for_the_model_s_own_values(encoder, tmp_path):
    model, _ = adapted(encoder)
    values = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "all", state_dict=values, save_function=torch.save)
    model.save_pretrained(tmp_path / "none", state_dict={})
    assert torch.equal(load(tmp_path / "all")[0].classifier.bias, model.classifier.bias + 1)
    assert torch.equal(load(tmp_path / "none")[0].classifier.bias, model.classifier.bias)
    with pytest.raises(ValueError, match=r"state_dict: got classifier.bias of shape \(3,\)"):
        model.save_pretrained(tmp_path / "wrong", state_dict={"classifier.bias": torch.zeros(3)})
    assert not (tmp_path / "wrong").exists()


def test_only_the_main_process_writes(encoder, tmp_path):
    model, _ = adapted(encoder)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_in_the_folder_stays_and_is_told_of(encoder, tmp_path, caplog):
    model, _ = adapted(encoder)
    before = {path.name: path.read_bytes() for path in encoder.iterdir()}
    model.save_pretrained(encoder)
    assert "holds a whole model (model.safetensors)" in caplog.text
    assert all((encoder / name).read_bytes() == value for name, value in before.items())
    assert torch.equal(load(encoder)[0].classifier.bias, model.classifier.bias)
    caplog.clear()
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    assert not caplog.text


def test_merged_weights_do_not_hide_behind_a_checkpoint(encoder, tmp_path):
    model, _ = adapted(encoder, "lora", "model")
    model.save_pretrained(tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="holds an AdaMix checkpoint"):
        merge(model).save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_the_card_and_no_place_of_this_machine(encoder, tmp_path):
    model, _ = adapted(encoder)
    out = tmp_path / "out"
    model.save_pretrained(out)
    text = "".join(path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text
    card = (out / "README.md").read_text()
    assert "from adamix_kernels import load" in card
    assert "Base model: `encoder`" in card
    assert "base_model:" not in card
    (out / "README.md").write_text("mine")
    model.config.name_or_path = "some/encoder"
    model.save_pretrained(out)
    assert (out / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path / "hub")
    assert "base_model: some/encoder" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_any_new_file(umask, encoder, tmp_path):
    model, _ = adapted(encoder)
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "out")
        save_adamix(model, tmp_path / "bare")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for folder in ("out", "bare") for path in (tmp_path / folder).iterdir()}
    assert modes == {0o666 & ~umask}


def trained(kind, encoder, folder, **options):
    model, tokenizer = adapted(encoder)
    rows = [{**tokenizer(text), "labels": number} for number, text in enumerate(TEXTS)]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    args = tiny_training.arguments(folder, **options)
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=collate, processing_class=tokenizer,
                   eval_dataset=rows)  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [transformers.Trainer, AdaMixTrainer])
def test_what_a_trainer_saves_is_loaded(kind, encoder, tmp_path):
    trainer = trained(kind, encoder, tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=2)
    trainer.save_model()
    tokenizer = trainer.processing_class
    want = logits(trainer.model.eval(), tokenizer)
    assert torch.equal(logits(load(tmp_path / "out")[0], tokenizer), want)
    assert torch.equal(logits(load(tmp_path / "out" / "checkpoint-2")[0], tokenizer), want)
    assert not torch.equal(logits(load(tmp_path / "out" / "checkpoint-1")[0], tokenizer), want)
    assert not list((tmp_path / "out").rglob("model.safetensors"))
    with pytest.raises(ValueError, match=WAY):
        transformers.AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-1")


def test_the_stock_trainer_resumes_and_takes_its_best_model(encoder, tmp_path):
    whole = trained(transformers.Trainer, encoder, tmp_path / "a", save_strategy="steps", save_steps=1, max_steps=3)
    model, _ = adapted(encoder)
    resumed = transformers.Trainer(
        model=model, args=tiny_training.arguments(tmp_path / "b", max_steps=3), train_dataset=whole.train_dataset,
        data_collator=whole.data_collator,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    best = trained(
        transformers.Trainer, encoder, tmp_path / "c", save_strategy="steps", eval_strategy="steps", eval_steps=1,
        save_steps=1, max_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert best.state.best_model_checkpoint.endswith("checkpoint-1")  # the highest loss is the first
    first, _ = load(tmp_path / "c" / "checkpoint-1")
    assert torch.equal(best.model.classifier.bias, first.classifier.bias)


class Hub:
    """Stands in for huggingface_hub.HfApi: it keeps what was uploaded."""

    calls = files = None
    card = False

    def __init__(self, **options):
        Hub.calls = {"client": options}

    def create_repo(self, name, **options):
        Hub.calls["repository"] = options
        return type("Url", (), {"repo_id": f"me/{name.split('/')[-1]}"})

    def create_branch(self, name, **options):
        Hub.calls["branch"] = options

    def file_exists(self, name, file, revision=None):
        return Hub.card

    def upload_folder(self, *, folder_path, **options):
        Hub.calls["upload"] = options
        Hub.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "card", False)
    return Hub


def test_push_to_hub_uploads_what_load_reads(encoder, tmp_path, hub):
    model, tokenizer = adapted(encoder)
    assert model.push_to_hub("me/mine", private=True, token="t", revision="v2", tags=["sst"]) == "https://hub/commit"
    assert hub.calls["client"] == {"token": "t"}
    assert hub.calls["repository"]["private"] is True
    assert (hub.calls["branch"]["branch"], hub.calls["upload"]["revision"]) == ("v2", "v2")
    assert "- sst" in hub.files["README.md"].decode()
    text = b"".join(v for n, v in hub.files.items() if n.endswith((".json", ".md"))).decode()
    assert str(tmp_path).strip("/") not in text
    assert tmp_path.name not in text
    (tmp_path / "down").mkdir()
    for name, value in hub.files.items():
        (tmp_path / "down" / name).write_bytes(value)
    again, _ = load(tmp_path / "down", model=str(encoder))
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    hub.card = True
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="m")
    assert hub.calls["upload"]["repo_id"] == "me/mine"
    assert hub.calls["upload"]["commit_message"] == "m"
    assert "README.md" not in hub.files  # the repository's own stays


def test_generation_settings_come_back(tmp_path):
    base = tmp_path / "gpt2"
    tiny.tiny_gpt2().save_pretrained(base)
    (base / "vocab.txt").write_text("\n".join([*tiny_text.VOCABULARY, *(f"w{n}" for n in range(40))]))
    options = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
    (base / "tokenizer_config.json").write_text(json.dumps(options))
    model, tokenizer = load_causal(resolve_model(str(base)))
    assert tokenizer.padding_side == "left"
    randomise(adapt(model, AdaMixConfig(method="lora", r=2))).eval()
    model.generation_config.max_new_tokens = 3
    model.generation_config.num_beams = 2
    for merged in (False, True):
        folder = tmp_path / f"out{merged}"
        (merge(model) if merged else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again, own = load(folder)
        assert (again.generation_config.max_new_tokens, again.generation_config.num_beams) == (3, 2)
        pairs = [(again, own), (model, tokenizer)]
        writers = [transformers.pipeline("text-generation", model=m, tokenizer=t) for m, t in pairs]
        calls = [
            writer("good film", do_sample=False, min_new_tokens=3, max_new_tokens=3, return_tensors=True)
            for writer in writers
        ]
        ids = [call[0]["generated_token_ids"] for call in calls]
        assert len(ids[0]) >= 5
        assert ids[0] == ids[1]
        ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(again.generate(**ids), model.generate(**ids))


def test_nothing_is_written_into_a_pack_and_no_export_into_a_whole_model(tmp_path):
    folder = save_adamix(adapt(tiny.tiny_bert(), AdaMixConfig(method="lora")), tmp_path / "one")
    out = save_pack(pack(tiny.tiny_bert(), {"a": folder}), tmp_path / "pack")
    tiny.tiny_bert().save_pretrained(tmp_path / "base")
    lora = adapt(tiny.tiny_bert(), AdaMixConfig(method="lora"))
    adapters = adapt(tiny.tiny_bert(), AdaMixConfig())

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    for write in (save_adamix, export_peft, lambda model, place: model.save_pretrained(place)):
        with pytest.raises(ValueError, match=r"directory: got '.*pack', which holds a pack, expected another folder"):
            write(lora, out)
    for write, model in ((export_peft, lora), (export_adapterhub, adapters)):
        with pytest.raises(ValueError, match=r"base', which holds a whole model \(model.safetensors\), exp"):
            write(model, tmp_path / "base")
    assert files() == before
    assert list(load_pack(tiny.tiny_bert(), out).adamix.pack.entries) == ["a"]


def test_a_pack_that_was_written_while_one_waited_stays(tmp_path, monkeypatch):
    lora = adapt(tiny.tiny_bert(), AdaMixConfig(method="lora"))
    made = save_pack(pack(tiny.tiny_bert(), {"a": save_adamix(lora, tmp_path / "one")}), tmp_path / "pack")
    one_writer = checkpoint.one_writer

    @contextlib.contextmanager
    def after_another(place):
        shutil.copytree(made, place, dirs_exist_ok=True)
        with one_writer(place):
            yield

    monkeypatch.setattr(checkpoint, "one_writer", after_another)
    with pytest.raises(ValueError, match="which holds a pack, expected another folder"):
        save_adamix(lora, tmp_path / "out")
    assert list(load_pack(tiny.tiny_bert(), tmp_path / "out").adamix.pack.entries) == ["a"]
