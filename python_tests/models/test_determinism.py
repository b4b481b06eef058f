"""set_seed and full determinism, as transformers defines them: two training runs give the same bits."""

import os

import pytest
import tiny
import torch
import transformers
from transformers import TrainingArguments, enable_full_determinism, set_seed

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adamix_loss, adapt, double_batch

OPTIONS = {
    "adapter": dict(bottleneck=4, num_experts=3),
    "lora": dict(method="lora", num_experts=3, dropout=0.1, share=None, routing="sample"),
}


@pytest.fixture
def restored(monkeypatch):
    """What full determinism switches on, switched off again."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, ""))
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


def two_steps(method, seed, deterministic=False):
    """Every parameter and both losses after two steps, dropout on."""
    (enable_full_determinism if deterministic else set_seed)(seed)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, num_labels=2,
        )
    )  # fmt: skip
    adapt(model, AdaMixConfig(**OPTIONS[method])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(2):
        batch = tiny.batch_for(model, seed=step)
        labels = batch.pop("labels")
        out = adamix_loss(model(**double_batch(batch)).logits, labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.detach())
    return [*model.state_dict().values(), *losses]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", OPTIONS)
def test_set_seed_gives_the_same_bits(method):
    first = two_steps(method, 7)
    torch.rand(5)
    assert same(first, two_steps(method, 7))
    assert not same(first, two_steps(method, 8))


@pytest.mark.parametrize("method", OPTIONS)
def test_full_determinism_gives_the_same_bits(method, restored):
    first = two_steps(method, 7, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert same(first, two_steps(method, 7, deterministic=True))
    # No op of ours is refused, and none took another path than without the flag.
    torch.use_deterministic_algorithms(False)
    assert same(first, two_steps(method, 7))


class Remarks(torch.utils.data.Dataset):
    def __init__(self):
        batch = tiny.batch_for(tiny.tiny_bert(), batch=8)
        self.rows = [{name: value[n] for name, value in batch.items()} for n in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def trained(folder, seed):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=seed,
        full_determinism=True, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = adapt(tiny.tiny_bert(dropout=0.1), AdaMixConfig(**OPTIONS["lora"]))
    AdaMixTrainer(model=model, args=arguments, train_dataset=Remarks()).train()
    return list(model.state_dict().values())


def test_the_trainer_s_full_determinism(tmp_path, restored):
    first = trained(tmp_path, 7)
    assert same(first, trained(tmp_path, 7))
    assert not same(first, trained(tmp_path, 8))
