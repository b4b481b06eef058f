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
import contextlib
import json
import queue
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import _smoke
import torch
from _server import LONGEST, Busy, Server
from transformers import TrainingArguments, set_seed

from adamix_kernels import (
    AdaMixConfig,
    AdaMixTrainer,
    adapt,
    load_pack,
    merge,
    pack,
    save_adamix,
    save_pack,
    store_centroid,
)
from adamix_kernels.commands.pack import named_folders
from adamix_kernels.tasks import collator, load_classifier, load_task, resolve_model, tokenize

MOST_BYTES = 1 << 19  # of a request's body
MOST_DRAINED = 1 << 23  # of a body that is refused


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
    try:
        options.domains = named_folders(options.data) if options.data else {}
    except ValueError as error:
        parser.error(str(error))
    return options


def train(name, task, options):
    """One domain by itself: AdaMix, merged and saved. Returns (folder, dev texts, dev labels by name)."""
    set_seed(options.seed)
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


def http_server(server, port, timeout=60):
    """POST {"text": ..., "name": ...} alone. `answering` holds the threads that are at it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 30  # seconds that a silent client keeps its thread

        def do_POST(self):
            self.server.answering.add(threading.current_thread())
            try:
                self._answer()
            finally:
                self.server.answering.discard(threading.current_thread())

        def do_GET(self):
            self._refuse(405, f"method: got {self.command}, expected POST", Allow="POST")

        do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

        def _answer(self):
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                return self._refuse(411, f"Content-Length: got {length!r}, expected the body's bytes")
            if len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
                return self._refuse(413, f"body: got {length} bytes, expected at most {MOST_BYTES}")
            try:
                body = self.rfile.read(int(length))
            except TimeoutError:
                told = f"body: got no more of it for {self.timeout:g} s, expected {length} bytes"
                return self._say(408, told, Connection="close")
            try:
                asked = json.loads(body)
                if not isinstance(asked, dict) or asked.keys() - {"text", "name"}:
                    raise ValueError('body: got another object, expected {"text": ..., "name": ...}')
                status, answer = 200, server.ask(asked.get("text"), asked.get("name"), timeout)
            except (ValueError, RecursionError) as error:
                status, answer = 400, str(error)
            except (Busy, ConnectionError, TimeoutError) as error:
                status, answer = 503, str(error)
            except Exception as error:  # of the forward
                status, answer = 500, f"{type(error).__name__}: {error}"
            self._say(status, answer, **({"Connection": "close"} if server.closed else {}))

        def _refuse(self, status, told, **headers):
            """Reads on for a while after the answer: a socket closed with bytes unread is reset, and the answer lost
            to a client that still sends."""
            self._say(status, told, Connection="close", **headers)
            self.server.answering.discard(threading.current_thread())
            left, end = MOST_DRAINED, time.monotonic() + self.timeout
            with contextlib.suppress(OSError):  # the client is gone, or silent
                self.connection.shutdown(socket.SHUT_WR)
                while left > 0 and time.monotonic() < end and (piece := self.rfile.read1(1 << 16)):
                    left -= len(piece)

        def _say(self, status, answer, **headers):
            body = json.dumps({"error": answer} if isinstance(answer, str) else answer).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Listening(ThreadingHTTPServer):
        request_queue_size = 128

        def __init__(self, *address):
            super().__init__(*address)
            self.answering = set()

        def handle_error(self, request, address):
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hung up
                super().handle_error(request, address)

    return Listening(("127.0.0.1", port), Handler)


def serve(http, server):
    """Until Ctrl-C or SIGTERM; what was asked by then is answered."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        http.serve_forever()
    http.server_close()
    server.close()
    while http.answering:
        time.sleep(0.01)


def check_port(port):
    """Raises ValueError where nothing can listen on it."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"port: got {port}, expected a free one, or 0 for any ({error})") from None


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


def accuracy(name, stream, found, routed):
    """A line on the (name, text, label) of a stream that are this name's, by the answers by name and by content."""
    mine = [i for i, (own, _, _) in enumerate(stream) if own == name]
    for i in mine:
        if isinstance(found[i], Exception):
            return str(found[i])
        if "label" not in found[i]:
            return f"{name}: got scores, expected labels: it was trained on fewer than two"
    heard = [one if isinstance(one, dict) else {} for one in routed]  # another name's outputs may be no numbers
    right, by_content = (sum(some[i].get("label") == stream[i][2] for i in mine) for some in (found, heard))
    sent = sum(heard[i].get("name") == name for i in mine)
    return (
        f"{name}: {len(mine)} texts, accuracy {right / len(mine):.3f} by name, {by_content / len(mine):.3f} by "
        f"content; {sent} routed right"
    )


def main(options):
    if options.port is not None:
        check_port(options.port)  # before the training
    domains = {name: load_task(source, task="classification") for name, source in options.domains.items()}
    apart = {name: train(name, task, options) for name, task in domains.items()}
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
        print(accuracy(name, stream, found, routed))
    if options.port is None:
        server.close()
        return
    http = http_server(server, options.port)
    url = f"http://127.0.0.1:{http.server_address[1]}/"
    print(f"serving {', '.join(domains)} on {url}", flush=True)
    if not options.smoke:
        serve(http, server)
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
            options.domains = {
                name: _smoke.sentences(Path(folder, name), 48, words, name == "songs", line)
                for name, words in things.items()
            }
            options.lr, options.epochs, options.port, options.batch_size = 1e-2, 16, 0, 8
            main(options)
    else:
        try:
            main(options)
        except (ValueError, OSError) as error:
            sys.exit(f"serve_pack.py: {error}")
