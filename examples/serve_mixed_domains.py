"""One model, one expert a domain: mixed batches in training and in serving, each sample through its own expert.

On tiny random weights and made-up data, in seconds:

    python examples/serve_mixed_domains.py --smoke

With a folder of train.tsv and dev.tsv for each domain (the same labels in all):

    python examples/serve_mixed_domains.py --model google-bert/bert-base-uncased --data books kitchen music
"""

import argparse
import random
import tempfile
from pathlib import Path

import _smoke
import torch
from torch.nn.functional import cross_entropy
from transformers import set_seed

from adamix_kernels import AdaMixConfig, adapt, save_adamix, use_experts
from adamix_kernels.tasks import collator, load_classifier, load_task, resolve_model, tokenize


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="folder or hub id of an encoder")
    parser.add_argument("--data", nargs="+", default=[], help="one folder or hub data set a domain")
    parser.add_argument("--out", type=Path, default=Path("domains_out"))
    parser.add_argument("--bottleneck", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny random model and made-up data")
    options = parser.parse_args(arguments)
    if not options.smoke and len(options.data) < 2:
        parser.error("--data: give at least two domains")
    return options


def batches(rows, size):
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def forward(model, some, collate):
    """Logits of one batch, whose samples may be of any domains."""
    inputs = {k: v.to(model.device) for k, v in collate([row for _, row in some]).items()}
    labels = inputs.pop("labels")
    with use_experts(model, [domain for domain, _ in some]):
        return model(**inputs).logits, labels


@torch.inference_mode()
def serve(model, rows, collate, size):
    """Predicted labels in the rows' order."""
    return torch.cat([forward(model.eval(), some, collate)[0].argmax(-1) for some in batches(rows, size)]).cpu()


def main(options):
    set_seed(options.seed)
    tasks = [load_task(source, task="classification") for source in options.data]
    for note in [note for task in tasks for note in task.notes]:
        print(f"note: {note}")
    names = tasks[0].label_names
    if any(task.label_names != names for task in tasks):
        raise SystemExit(f"--data: the domains have different labels: {[task.label_names for task in tasks]}")
    model, tokenizer = load_classifier(resolve_model(options.model), names)
    config = AdaMixConfig(
        num_experts=len(tasks), bottleneck=options.bottleneck, share=None, consistency_weight=0.0, modules_to_save=None
    )
    adapt(model, config).to("cuda" if torch.cuda.is_available() else "cpu")
    train, dev = (
        [
            (domain, row)
            for domain, task in enumerate(tasks)
            for row in tokenize(getattr(task, split), tokenizer, options.max_tokens)
        ]
        for split in ("train", "dev")
    )
    collate = collator(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    for epoch in range(options.epochs):
        random.Random(epoch).shuffle(train)
        model.train()
        for some in batches(train, options.batch_size):
            loss = cross_entropy(*forward(model, some, collate))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")

    random.Random(options.seed).shuffle(dev)
    predicted = serve(model, dev, collate, options.batch_size)
    for domain, source in enumerate(options.data):
        mine = [i for i, (d, _) in enumerate(dev) if d == domain]
        alone = serve(model, [dev[i] for i in mine], collate, options.batch_size)
        right = (predicted[mine] == torch.tensor([dev[i][1]["labels"] for i in mine])).float().mean().item()
        same = (alone == predicted[mine]).sum().item()
        print(f"{Path(source).name}: accuracy {right:.4f}; {same} of {len(mine)} predictions as when served alone")
    print(f"all experts: {save_adamix(model, options.out)}")


if __name__ == "__main__":
    options = parse()
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            options.model, options.out = _smoke.encoder(Path(folder, "model")), Path(folder, "out")
            options.data = [
                _smoke.sentences(Path(folder, "plain"), things=_smoke.THINGS[:3]),
                _smoke.sentences(Path(folder, "ironic"), things=_smoke.THINGS[3:], turned=True),
            ]
            options.lr, options.epochs = 1e-2, 8
            main(options)
    else:
        main(options)
