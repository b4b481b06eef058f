"""Domains trained apart with AdaMix, merged, packed into one model, and a mixed stream served by name and by content.

On tiny random weights and made-up data, in seconds, with a load test of the server on this machine:

    python examples/serve_pack.py --smoke

With a folder, file or hub data set for each domain, whose labels need not be the same:

    python examples/serve_pack.py --model google-bert/bert-base-uncased --data books=books.csv kitchen=kitchen.csv

and then, until Ctrl-C, an HTTP server that answers POST {"text": ..., "name": "books"}, or without a name by content:

    python examples/serve_pack.py --model google-bert/bert-base-uncased --data books=books.csv kitchen=kitchen.csv \
        --port 8000
"""

import argparse
import json
import queue
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import _smoke
import torch
from transformers import TrainingArguments, set_seed

from adamix_kernels import (
    AdaMixConfig,
    AdaMixTrainer,
    adapt,
    load_pack,
    merge,
    nearest,
    pack,
    save_adamix,
    save_pack,
    store_centroid,
    use_experts,
)
from adamix_kernels.tasks import collator, load_classifier, load_task, resolve_model, tokenize

LONGEST = 128  # tokens


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="folder or hub id of an encoder")
    parser.add_argument("--data", nargs="+", default=[], help="NAME=SOURCE of each domain")
    parser.add_argument("--out", type=Path, default=Path("pack_out"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32, help="of the training, and most of one answer's forward")
    parser.add_argument("--port", type=int, help="serve on it; 0: any free one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny random model and made-up data")
    options = parser.parse_args(arguments)
    if not options.smoke and len(options.data) < 2:
        parser.error("--data: give at least two domains")
    return options


def train(name, source, options):
    """One domain by itself: AdaMix, merged and saved. Returns (folder, dev texts, dev labels by name)."""
    set_seed(options.seed)
    task = load_task(source, task="classification")
    model, tokenizer = load_classifier(resolve_model(options.model), task.label_names)
    adapt(model, AdaMixConfig(num_experts=2, bottleneck=16))
    rows, collate = tokenize(task.train, tokenizer, LONGEST), collator(tokenizer)
    arguments = TrainingArguments(
        str(options.out / "trainer" / name),
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        disable_tqdm=True,
        logging_strategy="no",
    )
    AdaMixTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    some = rows[:512]
    store_centroid(model, (collate(some[i : i + 32]) for i in range(0, len(some), 32)))
    folder = save_adamix(merge(model.cpu()), options.out / "apart" / name)
    return folder, task.dev.texts, [task.label_names[label] for label in task.dev.labels]


class Busy(RuntimeError):
    """The queue is full: try again later."""


class Server:
    """One thread with the model; batches of whatever is waiting, of any names.

    Args:
        model: a pack. most: texts of one forward. waiting: texts that may wait; one more raises Busy.
    """

    def __init__(self, model, tokenizer, most=32, waiting=256):
        self.model, self.tokenizer, self.most = model.eval(), tokenizer, most
        self.names, self.batches, self.answered = model.adamix.pack.entries, 0, 0
        self.queue = queue.Queue(waiting)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def ask(self, text, name=None, timeout=60):
        """{"name", "label", "probability"}, and the similarity where there was no name. Raises ValueError, Busy."""
        if not isinstance(text, str):
            raise ValueError(f"text: got {type(text).__name__}, expected a string")
        if name is not None and name not in self.names:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(self.names)}, or none")
        answer = queue.Queue(1)
        try:
            self.queue.put_nowait((text, name, answer))
        except queue.Full:
            raise Busy(f"{self.queue.maxsize} texts are waiting") from None
        found = answer.get(timeout=timeout)
        if isinstance(found, Exception):
            raise found
        return found

    def labels(self):
        """Of each name, in id order."""
        return {name: entry.labels for name, entry in self.names.items()}

    def alive(self):
        return self.thread.is_alive()

    def waiting(self):
        """How many texts wait."""
        return self.queue.qsize()

    def close(self):
        self.queue.put(None)
        self.thread.join()

    def _run(self):
        while (first := self.queue.get()) is not None:
            some = [first]
            while len(some) < self.most and not self.queue.empty():
                following = self.queue.get()
                if following is None:
                    self.queue.put(None)
                    break
                some.append(following)
            try:
                answers = self._answers([text for text, _, _ in some], [name for _, name, _ in some])
            except Exception as error:  # whoever asked shall know, and the thread goes on
                answers = [error] * len(some)
            for (_, _, waiting), found in zip(some, answers, strict=True):
                waiting.put(found)
            self.batches, self.answered = self.batches + 1, self.answered + len(some)

    @torch.inference_mode()
    def _answers(self, texts, names):
        inputs = self.tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
        inputs = inputs.to(next(self.model.parameters()).device)
        routed = nearest(self.model, **inputs) if None in names else None
        chosen = [routed.nearest[i] if name is None else name for i, name in enumerate(names)]
        with use_experts(self.model, chosen):
            chances = self.model(**inputs).logits.softmax(-1).cpu()
        found = []
        for i, (name, row) in enumerate(zip(chosen, chances, strict=True)):
            probability, label = row.max(-1)
            labels = self.names[name].labels
            one = {"name": name, "label": labels[label] if labels else int(label), "probability": probability.item()}
            found.append(one if names[i] else {**one, "similarity": routed.similarity[i]})
        return found


def http_server(server, port):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            try:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                if not isinstance(asked, dict):
                    raise ValueError('got no object, expected {"text": ..., "name": ...}')
                status, answer = 200, server.ask(asked.get("text"), asked.get("name"))
            except ValueError as error:
                status, answer = 400, {"error": str(error)}
            except Busy as error:
                status, answer = 503, {"error": str(error)}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Listening(ThreadingHTTPServer):
        request_queue_size = 128

    return Listening(("127.0.0.1", port), Handler)


def post(url, asked):
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def load_test(url, asked, clients=16):
    """(seconds of each request, in order of time; seconds of all; statuses)."""
    work, seconds, statuses = queue.Queue(), [], []
    for one in asked:
        work.put(one)

    def client():
        while True:
            try:
                one = work.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            status, _ = post(url, one)
            seconds.append(time.perf_counter() - start)
            statuses.append(status)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(seconds), time.perf_counter() - start, statuses


def main(options):
    domains = dict(word.split("=", 1) for word in options.data)
    apart = {name: train(name, source, options) for name, source in domains.items()}
    model, tokenizer = load_classifier(resolve_model(options.model), ["", "_"])
    pack(model, {name: folder for name, (folder, _, _) in apart.items()})
    folder = save_pack(model, options.out / "pack")
    again, _ = load_classifier(resolve_model(options.model), ["", "_"])
    load_pack(again, folder).to("cuda" if torch.cuda.is_available() else "cpu")
    server = Server(again, tokenizer, options.batch_size)

    stream = [(n, text, label) for n, (_, texts, labels) in apart.items() for text, label in zip(texts, labels)]
    random.Random(options.seed).shuffle(stream)
    found = server._answers([text for _, text, _ in stream], [name for name, _, _ in stream])
    routed = server._answers([text for _, text, _ in stream], [None] * len(stream))
    for name in domains:
        mine = [i for i, (own, _, _) in enumerate(stream) if own == name]
        right, by_content = (sum(answers[i]["label"] == stream[i][2] for i in mine) for answers in (found, routed))
        sent = sum(routed[i]["name"] == name for i in mine)
        print(
            f"{name}: {len(mine)} texts, accuracy {right / len(mine):.3f} by name, {by_content / len(mine):.3f} by "
            f"content; {sent} routed right"
        )
    if options.port is None:
        server.close()
        return
    http = http_server(server, options.port)
    url = f"http://127.0.0.1:{http.server_address[1]}/"
    print(f"serving {', '.join(domains)} on {url}")
    if not options.smoke:
        http.serve_forever()
        return
    threading.Thread(target=http.serve_forever, daemon=True).start()
    print(f"a wrong name: {post(url, {'text': 'a', 'name': 'none'})}")
    asked = [{"text": text, "name": name if i % 2 else None} for i, (name, text, _) in enumerate(stream)]
    server.batches = server.answered = 0
    seconds, total, statuses = load_test(url, asked)
    middle, late = seconds[len(seconds) // 2], seconds[int(0.95 * len(seconds))]
    print(
        f"load: {len(statuses)} requests by 16 clients, {statuses.count(200)} answered, {len(statuses) / total:.0f} a "
        f"second, median {1e3 * middle:.1f} ms, 95% within {1e3 * late:.1f} ms, {server.answered / server.batches:.1f} "
        "texts a forward"
    )
    http.shutdown()
    server.close()


if __name__ == "__main__":
    options = parse()
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            options.model, options.out = _smoke.encoder(Path(folder, "model")), Path(folder, "out")
            things = {"films": ("film",), "hotels": ("hotel",), "songs": ("song",)}
            line = "{thing} {thing} was {word} {word} {word} ."
            options.data = [
                f"{name}={_smoke.sentences(Path(folder, name), 48, words, name == 'songs', line)}"
                for name, words in things.items()
            ]
            options.lr, options.epochs, options.port, options.batch_size = 1e-2, 16, 0, 8
            main(options)
    else:
        main(options)
