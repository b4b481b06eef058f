"""load: a folder or a repository to (model, tokenizer), or one sentence that says why not and what to pass."""

import shutil
from unittest import mock

import huggingface_hub
import pytest
import tiny
import tiny_recipes
import torch
import transformers
from checkpoint_cases import edit_sealed
from huggingface_hub import errors
from tiny_saved import TEXTS, adapted, logits, randomise

from adamix_kernels import AdaMixConfig, adapt, load, load_adamix, merge, save_adamix
from adamix_kernels.models import hub
from adamix_kernels.models.checkpoint import CHECKPOINT_NAME
from adamix_kernels.models.hub import hub_answers, resolve_folder
from adamix_kernels.models.pooling import pooling_of
from adamix_kernels.tasks import Run, load_causal, load_classifier, resolve_model, write_run
from adamix_kernels.tasks._bases import base_of


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_folder_of_save_adamix_alone(method, merged, encoder, tmp_path):
    model, tokenizer = adapted(encoder, method)
    want = logits(model, tokenizer)
    want = logits(merge(model), tokenizer) if merged else want
    save_adamix(model, tmp_path / "out")
    again, own = load(tmp_path / "out")
    assert torch.equal(logits(again, own), want)
    assert pooling_of(again) == "mean"
    classify = transformers.pipeline("text-classification", model=again, tokenizer=own)
    labels = [["bad", "good"][int(row.argmax())] for row in want]
    assert [found["label"] for found in classify(TEXTS)] == labels


def test_both_folders_may_move_together(encoder, tmp_path):
    model, tokenizer = adapted(encoder)
    save_adamix(model, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    for name in ("encoder", "out"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    again, _ = load(tmp_path / "elsewhere" / "out")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    shutil.move(tmp_path / "elsewhere" / "encoder", tmp_path / "far")
    with pytest.raises(ValueError, match=r"elsewhere.encoder' as the base of .*: --model, in Python model=\.\.\.$"):
        load(tmp_path / "elsewhere" / "out")
    again, _ = load(tmp_path / "elsewhere" / "out", model=str(tmp_path / "far"))
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


def test_a_repository_s_run_names_its_base(tmp_path):
    write_run(tmp_path, Run("/gone/away/some-base", "d", ["a", "b"], 8))
    assert base_of(tmp_path, {}, None, local=False).name == "some-base"
    with pytest.raises(ValueError, match="model: got '/gone/away/some-base' as the base of"):
        base_of(tmp_path, {}, None, local=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_and_a_regression_come_back(dtype, encoder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(encoder, num_labels=1, problem_type="regression")
    model = transformers.BertForSequenceClassification.from_pretrained(encoder, config=config).to(dtype)
    randomise(adapt(model, AdaMixConfig())).eval()
    save_adamix(model, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert (again.dtype, again.config.num_labels, again.config.problem_type) == (dtype, 1, "regression")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("make", [tiny.tiny_t5, tiny.tiny_llama, tiny.tiny_gpt2_classifier, tiny.tiny_roberta])
def test_other_families_and_heads(make, tmp_path, caplog):
    make().save_pretrained(tmp_path / "base")
    base = make()
    model = type(base).from_pretrained(tmp_path / "base", config=base.config)
    randomise(adapt(model, AdaMixConfig(method="lora", r=2))).eval()
    model.save_pretrained(tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert tokenizer is None  # rather than one that knows no word
    assert "No tokenizer in" in caplog.text
    batch = tiny.batch_for(model)
    assert type(again) is type(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_run_s_base_counts_and_an_older_format_needs_it(encoder, tmp_path):
    model, tokenizer = adapted(encoder)
    out = tmp_path / "out"
    save_adamix(model, out)
    edit_sealed(
        out / CHECKPOINT_NAME, lambda header: header["base_model"].update(name_or_path="gone/away", folder=None)
    )
    write_run(out, Run(str(encoder), "remarks", ["bad", "good"], 32, "mean"))
    assert torch.equal(logits(load(out)[0], tokenizer), logits(model, tokenizer))

    def older(header):
        header["version"] = 2
        for name in ("config", "folder", "pooling", "dtype", "generation"):
            del header["base_model"][name]

    edit_sealed(out / CHECKPOINT_NAME, older)
    assert torch.equal(logits(load(out)[0], tokenizer), logits(model, tokenizer))
    (out / "adamix_run.json").unlink()
    with pytest.raises(ValueError, match=r"older release.*expected load_adamix\(base, folder\)"):
        load(out, model=str(encoder))


def test_loading_says_nothing_of_a_head_that_is_filled(encoder, tmp_path, caplog):
    model, _ = adapted(encoder)
    model.save_pretrained(tmp_path / "out")
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        load(tmp_path / "out")
        assert "classifier" not in caplog.text
        whole = transformers.BertModel.from_pretrained(encoder)
        state = {name: value for name, value in whole.state_dict().items() if "layer.1." not in name}
        whole.save_pretrained(encoder, state_dict=state)
        load(tmp_path / "out")
    finally:
        transformers.logging.disable_propagation()
    assert "drawn at random: bert.encoder.layer.1." in caplog.text


def test_the_head_of_a_language_model_is_not_meant_to_be_new(encoder, caplog):
    """An encoder has none, and what draws one at random writes at random."""
    load_causal(resolve_model(str(encoder)))
    assert "drawn at random: cls.predictions." in caplog.text
    caplog.clear()
    load_causal(resolve_model(str(tiny_recipes.write_causal(encoder.parent / "gpt"))))
    assert "drawn at random" not in caplog.text


def _no_class(header):
    header["base_model"]["class"] = "Trainer"


def _no_name(header):
    header["base_model"].update(name_or_path=None, folder=None)


REFUSED = {
    "no model": (_no_class, "got a checkpoint of a Trainer"),
    "no name": (_no_name, r"got no name of its base model, .*expected model=\"...\""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_says_what_to_pass(case, encoder, tmp_path):
    model, _ = adapted(encoder)
    save_adamix(model, tmp_path / "out")
    change, message = REFUSED[case]
    edit_sealed(tmp_path / "out" / CHECKPOINT_NAME, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "out")


def test_a_lora_merged_on_a_quantised_base_says_so(encoder, tmp_path):
    quantised = torch.ao.quantization.quantize_dynamic(
        transformers.BertForSequenceClassification.from_pretrained(encoder), {torch.nn.Linear}, dtype=torch.qint8
    )
    quantised.classifier = torch.nn.Linear(16, 2)
    merge(randomise(adapt(quantised, AdaMixConfig(method="lora"))))
    quantised.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / CHECKPOINT_NAME).exists()
    with pytest.raises(ValueError, match="its base was quantised: load and quantise it as then"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", [CHECKPOINT_NAME, "adamix-*.safetensors"])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_damaged_files_are_refused_by_name(method, cut, name, encoder, tmp_path):
    model, _ = adapted(encoder, method)
    merge(model).save_pretrained(tmp_path / "out")
    (file,) = (tmp_path / "out").glob(name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[:-9] if cut else data)
    with pytest.raises(ValueError, match=file.name):
        load(tmp_path / "out")


def test_folders_that_are_no_checkpoint(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adamix_checkpoint\.json and no whole model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds no adamix_checkpoint\.json and no whole model"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"source: got '.*none', no such folder, expected one, or 'user/repo'"):
        load(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"source: got .*, a file, expected its folder"):
        load(encoder / "config.json")
    with pytest.raises(TypeError, match="source: got int"):
        load(3)
    with pytest.raises(TypeError, match="model: got list"):
        load(tmp_path, model=["a"])
    with pytest.raises(ValueError, match=r"revision: got 'v1' for .*, a folder of this disk"):
        load(tmp_path, revision="v1")


@pytest.fixture
def repository(encoder, tmp_path, monkeypatch):
    """huggingface_hub.snapshot_download of "me/run": what the patterns let through, copied as into the cache."""
    model, tokenizer = adapted(encoder)
    model.save_pretrained(tmp_path / "remote")
    tokenizer.save_pretrained(tmp_path / "remote")
    (tmp_path / "remote" / "training_args.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "remote" / "evil.py").write_text("raise SystemExit")
    calls = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        calls.append((name, revision))
        if name != "me/run":
            raise errors.RepositoryNotFoundError("404 Client Error", response=mock.Mock())
        target = tmp_path / "cache" / str(revision)
        target.mkdir(parents=True, exist_ok=True)
        files = [path.name for path in (tmp_path / "remote").iterdir()]
        for file in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            shutil.copy(tmp_path / "remote" / file, target / file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return model, tokenizer, calls


def test_a_repository_and_a_revision(repository, encoder, tmp_path):
    model, tokenizer, calls = repository
    again, own = load("me/run", revision="v2", model=str(encoder))
    assert calls == [("me/run", "v2")]
    assert torch.equal(logits(again, own), logits(model, tokenizer))
    assert {p.suffix for p in (tmp_path / "cache" / "v2").iterdir()} <= {".json", ".md", ".safetensors", ".txt"}
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    load_adamix(bare, "me/run", revision="v3")
    assert calls[-1] == ("me/run", "v3")
    assert torch.equal(logits(bare.eval(), tokenizer), logits(model, tokenizer))
    with pytest.raises(ValueError, match=r"cannot load the base model 'encoder'.*expected model"):
        load("me/run")  # a path of the machine that saved it means nothing here
    with pytest.raises(ValueError, match=r"^source: got 'me/other', which is no folder here, and the Hub has no such"):
        load("me/other")


NOT_CACHED = errors.LocalEntryNotFoundError("not in the cache")
# HF_HUB_OFFLINE, what the Hub's client raises, and the answer.
FAILURES = {
    "no network": (False, NOT_CACHED, "in the cache of this machine, and the Hub cannot be reached$"),
    "offline": (True, NOT_CACHED, "in the cache of this machine, and HF_HUB_OFFLINE keeps the Hub away$"),
    "wire": (False, ConnectionError("no route\nmore"), r"the Hub did not give it \(ConnectionError: no route\)$"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_the_hub_does_not_give_is_one_sentence(case, monkeypatch):
    offline, error, message = FAILURES[case]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as found:
        resolve_folder("some/run")
    assert "\n" not in str(found.value)


GATED = errors.GatedRepoError("403", response=mock.Mock())
# What the one question gives; whether the Hub is then asked for files, or the message.
ANSWERS = {
    "there": (None, True),
    "gated": (GATED, True),
    "busy": (errors.HfHubHTTPError("503", response=mock.Mock()), True),
    "no name": (errors.HFValidationError("a name"), True),
    "no network": (ConnectionError("no route"), False),
    "missing": (errors.RepositoryNotFoundError("404", response=mock.Mock()), "^model: got 'my/base'.*no such reposit"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_hub_is_asked_once_before_a_library_asks_for_every_file(case, monkeypatch, caplog):
    given, wanted = ANSWERS[case]
    asked, now = [], [5.0]  # a machine just started

    def repo_info(_self, name, repo_type, timeout):
        asked.append((name, repo_type, timeout <= 10))
        if given is not None:
            raise given

    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "time", mock.Mock(monotonic=lambda: now[0]))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    assert not hub_answers("my/base", "model")
    assert not asked  # HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            hub_answers("my/base", "model")
    else:
        assert hub_answers("my/base", "model") == wanted
        # The tokenizer, the config and the model of one load: one question, one warning.
        now[0] += 59
        assert hub_answers("my/base", "model") == wanted
        said = caplog.text.count("'my/base' is looked for in the cache of this machine alone")
        assert said == (0 if wanted else 1)
    question = ("my/base", "model", True)
    assert asked == [question]
    if not isinstance(wanted, str):
        now[0] += 1
        assert hub_answers("my/base", "model") == wanted
        assert asked == [question, question]
        assert hub_answers("my/base", "data", "dataset") == hub_answers("my/other", "model") == wanted
        monkeypatch.setattr(huggingface_hub.HfApi, "__init__", lambda self: setattr(self, "endpoint", "https://b.c"))
        assert hub_answers("my/base", "model") == wanted
        assert asked[2:] == [("my/base", "dataset", True), ("my/other", "model", True), question]


def test_a_model_without_a_network_is_looked_for_in_the_cache_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = mock.Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", asked)
    message = r"^model: cannot load 'my/base': my/base: no such folder here, no file .*, and the Hub cannot be reached$"
    monkeypatch.setattr("socket.socket.connect", mock.Mock(side_effect=AssertionError("asked")))
    with pytest.raises(ValueError, match=message):
        load_classifier(resolve_model("my/base"), ["a", "b"])
    assert asked.call_count == 1


def test_the_cache_of_huggingface_hub_itself(encoder, tmp_path, monkeypatch):
    """Offline, as after a download: the cache's own layout, and no stand-in."""
    model, tokenizer = adapted(encoder)
    commit = "a" * 40
    place = tmp_path / "hub" / "models--me--run"
    model.save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_folder("me/run") == place / "snapshots" / commit
    again, _ = load("me/run", model=str(encoder))
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    with pytest.raises(ValueError, match="got 'me/none', which is no folder here, and it is not in the cache"):
        resolve_folder("me/none")


def test_files_of_every_tokenizer_come_from_the_hub():
    names = ["bpe.codes", "prophetnet.tokenizer", "source.spm", "spm_char.model", "word_shape.json", "vocab.txt"]
    assert list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=list(hub.ALLOWED))) == names
