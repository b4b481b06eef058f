"""What test_trainer_launch starts: the same training in one process, and by `accelerate launch` under DDP and FSDP2."""

import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tiny import tiny_bert, tiny_gpt2, tiny_t5
from tiny_training import adapted, dataset_for, pad, parameters, pass_one_pass_two, ragged
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from adamix_kernels import AdaMixTrainer, AdaMixTrainerMixin
from adamix_kernels.models.sharding import whole
from adamix_kernels.routing import Router

ROWS, STEPS = 8, 4
LAYERS = {"bert": "BertLayer", "gpt2": "GPT2Block"}
OPTIONS = dict(
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    max_steps=STEPS,
    logging_steps=1,
    learning_rate=1.0,
    optim="sgd",
    lr_scheduler_type="constant",
    save_strategy="no",
)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


class Seq2Seq(AdaMixTrainerMixin, Seq2SeqTrainer):
    pass


def model_and_data(name, **method):
    if name == "bert":
        base = tiny_bert(3)
        return adapted(base, **method), dataset_for(base, 16), None
    if name == "t5":
        return adapted(tiny_t5(), **method), ragged(None), pad
    return adapted(tiny_gpt2(), method="lora", **method), ragged(None), pad


def run(mode, name, folder, resume=None, method=None, **options):
    """One training of ROWS rows an update. Its trained parameters, the log, and what the model was wrapped in."""
    model, data, collator = model_and_data(name, **(method or {}))
    processes = 1 if mode == "single" else 2
    rows = ROWS // processes // options.get("gradient_accumulation_steps", 1)
    if mode == "fsdp":
        config = {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS[name]]}
        options.update(fsdp="full_shard auto_wrap", fsdp_config=config)
    trainer_class, arguments = AdaMixTrainer, TrainingArguments
    if name == "t5":
        trainer_class, arguments = Seq2Seq, Seq2SeqTrainingArguments
    args = arguments(str(folder), per_device_train_batch_size=rows, **{**OPTIONS, **options})
    assert args.world_size == processes
    if mode == "fsdp":
        # accelerate's state makes FSDP of several kinds of distributed run, and MULTI_CPU is not among them.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = trainer_class(model, args, train_dataset=data, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_fsdp_enabled == (mode == "fsdp")
    return {
        "parameters": torch.cat([whole(p).detach().flatten() for p in parameters(trainer.model)]),
        "log": [entry for entry in trainer.state.log_history if "cross_entropy" in entry],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def curves(mode, out):
    """Runs whose routing does not depend on how the rows are split."""
    draw, Router.draw = Router.draw, pass_one_pass_two
    results = {name: run(mode, name, out) for name in LAYERS}
    results["gpt2 checkpointed"] = run(mode, "gpt2", out, **CHECKPOINTING)
    if mode == "ddp":
        results["gpt2 accumulated"] = run(mode, "gpt2", out, gradient_accumulation_steps=2)
    if mode != "fsdp":
        results |= with_gates(mode, out / "gates")
    if mode == "fsdp":
        options = {"optim": "adamw_torch", "learning_rate": 0.1}
        results["saved"] = run(mode, "gpt2", out, save_strategy="steps", save_steps=2, **options)
        results["resumed"] = run(mode, "gpt2", out / "again", resume=str(out / "checkpoint-2"), **options)
    Router.draw = draw
    return results


def with_gates(mode, out):
    """Routers of the two best of three, and of all; on two processes every parameter is to have its gradient."""
    gates = {"routing": "learned", "share": None, "balance_weight": 0.0, "z_weight": 0.1, "top_k": 2}
    dense = {**gates, "balance_weight": 1.0, "top_k": None}
    unused = {} if mode == "single" else {"ddp_find_unused_parameters": False}
    results = {
        "gates": run(mode, "bert", out, method=gates, save_strategy="steps", save_steps=2, **unused),
        "balanced": run(mode, "bert", out, method=dense, **unused),
    }
    results["gates resumed"] = run(mode, "bert", out, resume=str(out / "checkpoint-2"), method=gates, **unused)
    return results


def random_routing(mode, out):
    drawn, draw = [], Router.draw

    def spy(self, *args):
        index = draw(self, *args)
        if index is not None:
            drawn.append(index.tolist())
        return index

    Router.draw = spy
    results = {"drawn": run(mode, "bert", out), "indices": drawn}
    Router.draw = draw
    results["t5"] = run(mode, "t5", out, ddp_find_unused_parameters=False)
    method = {"dropout": 0.1, "routing": "token"}
    results["token"] = run(mode, "gpt2", out, method=method, gradient_accumulation_steps=2, **CHECKPOINTING)
    return results


def main(mode, folder):
    torch.set_num_threads(1)
    out = folder / mode
    results = curves(mode, out)
    rank = 0
    if mode != "single":
        rank = torch.distributed.get_rank()
        results |= random_routing(mode, out) if mode == "ddp" else {}
    torch.save(results, folder / f"{mode}{rank}.pt")
    if mode != "single":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
