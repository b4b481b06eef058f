"""What the trainer's tests share: tasks, adapted models, ragged data, quick arguments."""

import copy

import torch
import transformers
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_gpt2_classifier, tiny_llama, tiny_t5
from transformers import TrainingArguments

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt


def arguments(folder, cls=TrainingArguments, **options):
    defaults = {
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
    }
    return cls(str(folder), **{**defaults, **options})


def rows_of(batch):
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]


def dataset_for(model, rows=8, tokens=6, seed=0):
    return rows_of(batch_for(model, rows, tokens, seed))


def adapted(model, **options):
    """A copy whose experts differ and whose up side is not zero."""
    model = adapt(copy.deepcopy(model), AdaMixConfig(**{"bottleneck": 4, "num_experts": 3, **options}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def multi_label(model):
    batch = batch_for(model, 8, 6)
    generator = torch.Generator().manual_seed(2)
    batch["labels"] = torch.randint(2, (8, model.config.num_labels), generator=generator).float()
    return batch


def ignoring(batch, seed=3):
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(batch["labels"].shape, generator=generator) < 0.4
    drop[:, -1] = False
    return {**batch, "labels": batch["labels"].masked_fill(drop, -100)}


def trainer_for(model, folder, data=None, cls=AdaMixTrainer, **options):
    collator = options.pop("data_collator", None)
    more = {"eval_dataset": options.pop("eval_dataset")} if "eval_dataset" in options else {}
    return cls(
        model, arguments(folder, **options), train_dataset=data or dataset_for(model), data_collator=collator, **more
    )


TASKS = {
    "classes": lambda: tiny_bert(3),
    "decoder classes": lambda: tiny_gpt2_classifier(3),
    "regression": lambda: tiny_bert(1),
    "multi label": lambda: tiny_bert(3, problem_type="multi_label_classification"),
    "tokens": lambda: tiny_bert(5, model_class=transformers.BertForTokenClassification),
    "masked": lambda: tiny_bert(model_class=transformers.BertForMaskedLM),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
}


def task_batch(task, model):
    if task == "multi label":
        return multi_label(model)
    batch = batch_for(model, 8, 6)
    return ignoring(batch) if batch["labels"].dim() == 2 else batch


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def pass_one_pass_two(self, num_experts, batch, tokens, device, training):
    """Expert 0 for pass 1, expert 1 for pass 2, whatever the batch size."""
    return None if num_experts == 1 else (torch.arange(batch, device=device) >= batch // 2).long()


def ragged(model, rows=8):
    generator = torch.Generator().manual_seed(11)
    data = []
    for length in [3, 9, 5, 7, 4, 8, 6, 10][:rows]:
        ids = torch.randint(3, 64, (length,), generator=generator)
        data.append({"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": ids.tolist()})
    return data


def pad(rows):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = max(len(r["input_ids"]) for r in rows)
    return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}
