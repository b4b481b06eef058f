"""AdaMix adapters in an encoder on a classification task, then merged into one and saved.

On tiny random weights and made-up data, in seconds:

    python examples/glue.py --smoke

On a GLUE task (with the paper's settings for RoBERTa-large), or a folder or file of your own:

    python examples/glue.py --model FacebookAI/roberta-large --data nyu-mll/glue:rte --bottleneck 16 \
        --learning_rate 3e-4 --num_train_epochs 20 --per_device_train_batch_size 64 --output_dir rte
    python examples/glue.py --model google-bert/bert-base-uncased --data my_folder --bottleneck 48 --output_dir mine
"""

from dataclasses import dataclass, field
from pathlib import Path

import _smoke
from accelerate import PartialState
from transformers import HfArgumentParser, TrainingArguments, set_seed

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, merge, save_adamix
from adamix_kernels.tasks import collator, load_classifier, load_task, resolve_model, tokenize


@dataclass
class Options:
    model: str = field(default="all-MiniLM-L6-v2", metadata={"help": "folder or hub id of an encoder"})
    data: str = field(default="remarks", metadata={"help": "folder or file of labelled texts, or hub data set"})
    num_experts: int = 4
    bottleneck: int = 16
    max_tokens: int = 128
    smoke: bool = field(default=False, metadata={"help": "tiny random model and made-up data"})


def parse(arguments=None):
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(output_dir="glue_out", weight_decay=0.1, learning_rate=3e-3, report_to="none")
    return parser.parse_args_into_dataclasses(arguments)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(options, args):
    set_seed(args.seed)
    task = load_task(options.data, task="classification")
    for note in task.notes:
        print(f"note: {note}")
    model, tokenizer = load_classifier(resolve_model(options.model), task.label_names)
    adapt(model, AdaMixConfig(num_experts=options.num_experts, bottleneck=options.bottleneck))
    trainer = AdaMixTrainer(
        model,
        args,
        train_dataset=tokenize(task.train, tokenizer, options.max_tokens),
        eval_dataset=tokenize(task.dev, tokenizer, options.max_tokens),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics = trainer.evaluate()  # of the merged experts
    print(f"dev accuracy {metrics['eval_accuracy']:.4f} on {len(task.dev)} texts")
    if trainer.is_world_process_zero():
        folder = save_adamix(merge(model), Path(args.output_dir) / "merged")
        print(f"one plain adapter a layer: {folder}")


if __name__ == "__main__":
    options, args = parse()
    if options.smoke:
        with _smoke.shared_folder() as folder:
            options.model, options.data = _smoke.encoder(Path(folder, "model")), _smoke.sentences(Path(folder, "data"))
            args.output_dir, args.max_steps, args.learning_rate = str(Path(folder, "out")), 150, 5e-3
            main(options, args)
    else:
        main(options, args)
    PartialState().destroy_process_group()  # under accelerate launch; nothing to do in one process
