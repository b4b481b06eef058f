"""examples/_server.py and the server of examples/serve_pack.py: what comes over a socket, and who hears of an error."""

import contextlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest
import tiny_text
import torch

from adamix_kernels import AdaMixConfig, adapt, load, merge, pack, remove_expert, save_adamix, save_pack, store_centroid
from adamix_kernels.packs.state import Entry
from adamix_kernels.tasks import load_base, load_classifier, resolve_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_SECONDS = 60  # of any wait
LABELS = {"books": ["bad", "good"], "songs": ["a", "b", "c"], "stars": ["score"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pack of two classifiers and a regression, of a model of 32 positions."""
    folder = tmp_path_factory.mktemp("serving")
    encoder = resolve_model(str(tiny_text.write_encoder(folder / "encoder")))
    for number, (name, labels) in enumerate(LABELS.items()):
        model, tokenizer = load_classifier(encoder, labels)
        torch.manual_seed(number)
        adapt(model, AdaMixConfig(num_experts=2, bottleneck=4))
        if name != "songs":
            store_centroid(model, [tokenizer(["a fine book", "the good film"], padding=True, return_tensors="pt")])
        save_adamix(merge(model), folder / name)
    base, _ = load_classifier(encoder, ["", "_"])
    return save_pack(pack(base, {name: folder / name for name in LABELS}), folder / "pack")


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _server
    import serve_pack

    return _server, serve_pack


@pytest.fixture
def server(folder, examples):
    server = examples[0].Server(*load(folder), most=4)
    yield server
    server.close()


def until(there):
    """Waits for it, and fails where it does not come."""
    end = time.monotonic() + MOST_SECONDS
    while not there():
        assert time.monotonic() < end, f"it did not come within {MOST_SECONDS} s"
        time.sleep(0.005)


def ended(*threads):
    for thread in threads:
        thread.join(MOST_SECONDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def held(server):
    """Stops the forwards within the context; gives what is set once one is stopped."""
    inside, go_on, answers = threading.Event(), threading.Event(), server._answers

    def holding(*given):
        inside.set()
        go_on.wait(MOST_SECONDS)
        return answers(*given)

    server._answers = holding
    try:
        yield inside
    finally:
        go_on.set()


def asked(server, texts_and_names):
    """What each of several, who ask at once, is told: an answer or an error."""
    found = {}

    def ask(number, text, name):
        try:
            found[number] = server.ask(text, name, 30)
        except Exception as error:
            found[number] = error

    threads = []
    with held(server) as inside:
        for number, (text, name) in enumerate(texts_and_names):
            threads.append(threading.Thread(target=ask, args=(number, text, name), daemon=True))
            threads[-1].start()
            assert inside.wait(MOST_SECONDS)
            until(lambda: server.waiting() == len(threads) - 1)  # the first is in the forward, the others wait
    ended(*threads)
    return [found[number] for number in range(len(threads))]


def test_an_error_is_told_to_whoever_made_it_alone(server, folder):
    answers = server._answers

    def failing(texts, names):
        if "bad" in texts:
            raise RuntimeError("out of something")
        return answers(texts, names)

    server._answers = failing
    first, wrong, right = asked(server, [("a", "books"), ("bad", "books"), ("fine", "songs")])
    assert (first["name"], right["name"]) == ("books", "songs")
    assert str(wrong) == "out of something"
    with pytest.raises(ValueError, match=r"text: got '.ud800', half a character"):
        server.ask("a \ud800", "books")
    with pytest.raises(ValueError, match="name: got none, and 'songs' is without a centroid"):
        server.ask("a")
    with torch.no_grad():
        server.model.classifier.bias[server.names["books"].slot] = torch.nan
    with pytest.raises(FloatingPointError, match="books: got outputs that are no finite numbers"):
        server.ask("a", "books")
    assert server.ask("a", "songs")["name"] == "songs"


def test_long_texts_are_cut_as_in_the_training_and_numbers_are_scores(server, folder):
    text = "good " * 200  # of a model of 32 positions
    assert server.ask(text, "books") == pytest.approx(server.ask("good " * 30, "books"))
    assert server.ask(text, "stars").keys() == {"name", "score"}
    assert server.labels() == LABELS
    server.longest["books"] = 5
    assert server.ask(text, "books") == pytest.approx(server.ask("good good good", "books"))
    remove_expert(server.model, "songs")
    assert server.ask(text)["similarity"] <= 1
    with pytest.raises(ValueError, match="name: got 'songs', expected one of books, stars, or none"):
        server.ask(text, "songs")


def test_a_text_without_a_name_is_cut_as_in_the_training_of_the_name_that_it_gets(server):
    remove_expert(server.model, "songs")
    text = "a fine book was very poor"  # of 5 tokens it is what the centroids are of
    chosen = []
    for books, stars in ((3, 5), (5, 3), (9, 9)):
        server.longest.update(books=books, stars=stars)
        found = server.ask(text)
        found.pop("similarity")
        assert found == pytest.approx(server.ask(text, found["name"]))
        chosen.append(server.longest[found["name"]])
    assert chosen == [5, 5, 9]


def test_what_nobody_waits_for_is_not_computed_and_close_answers_the_rest(server):
    found = []
    first = threading.Thread(target=lambda: found.append(server.ask("a", "books")), daemon=True)
    rest = threading.Thread(target=lambda: found.append(server.ask("a", "songs")), daemon=True)
    closing = threading.Thread(target=server.close, daemon=True)
    with held(server) as inside:
        first.start()
        assert inside.wait(MOST_SECONDS)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
            server.ask("bad", "books", 0.01)
        rest.start()
        until(lambda: server.waiting() == 2)
        closing.start()
        until(lambda: server.closed)
        with pytest.raises(ConnectionError, match="closing"):
            server.ask("a", "books")
    ended(first, rest, closing)
    assert sorted(one["name"] for one in found) == ["books", "songs"]
    assert server.answered == 2


def test_answers_that_are_none_or_too_few_do_not_end_the_thread(server):
    answers = server._answers
    server._answers = lambda *given: False
    with pytest.raises(TypeError, match="bool"):
        server.ask("a", "books", MOST_SECONDS)
    server._answers = lambda *given: answers(*given)[:1]  # of several one
    found = asked(server, [("a", "books"), ("a", "songs"), ("b", "books")])
    assert [one["name"] for one in found] == ["books", "songs", "books"]
    assert server.alive()


def test_what_is_no_pack_of_labels_is_refused(folder, examples):
    base, tokenizer = load_base(folder.parent / "books")
    model, _ = load(folder)
    for given, told in (
        ((base, tokenizer), "pack: got a BertForSequenceClassification that is no pack, expected a folder"),
        ((model, None), "pack: got no tokenizer"),
        ((model, tokenizer, 0), "most: got 0, expected at least 1"),
        ((model, tokenizer, 1, 0), "waiting: got 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            examples[0].Server(*given)


def test_what_a_name_was_trained_on_comes_of_its_run_file(examples):
    entries = {"books": Entry(0, {}, (), run={"max_tokens": 24}), "songs": Entry(1, {}, ())}
    assert examples[0].lengths(entries) == {"books": 24}
    entries["pairs"] = Entry(2, {}, (), run={"max_tokens": 24, "text_pair_column": "second"})
    with pytest.raises(ValueError, match="got 'pairs', which was trained on pairs of texts, expected names of single"):
        examples[0].lengths(entries)


@pytest.fixture
def listening(server, examples):
    listening = examples[1].http_server(server, 0)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def connection(listening):
    connection = http.client.HTTPConnection(*listening.server_address, timeout=30)
    yield connection
    connection.close()


def said(connection, body=None, method="POST", headers=None):
    connection.request(method, "/", body, headers or {})
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text else None


def test_whatever_comes_is_answered_and_the_connection_goes_on(connection, capfd):
    good = b'{"text": "a fine book", "name": "books"}'
    for body, status, told in (
        (b"{", 400, "Expecting property name"),
        (b"[1]", 400, "body: got another object"),
        (b'{"text": "a", "nam": "books"}', 400, "body: got another object"),
        (b'{"text": NaN, "name": "books"}', 400, "text: got float, expected a string"),
        (b'{"text": "\\ud800", "name": "books"}', 400, "half a character"),
        (b"\xff", 400, "utf-8"),
        (b'{"text": "a", "name": ["books"]}', 400, "name: got ['books'], expected one of"),
        (b'{"text": "a", "name": "../books"}', 400, "name: got '../books', expected one of"),
        (b"[" * 100_000, 400, "recursion"),
    ):
        found = said(connection, body)
        assert (found[0], told in found[1]["error"]) == (status, True), found
        assert said(connection, good)[0] == 200
    for method in ("GET", "PUT", "DELETE"):
        assert said(connection, None, method) == (405, {"error": f"method: got {method}, expected POST"})
    assert said(connection, None, "HEAD") == (405, None)
    for length in ("-1", "x", ""):
        assert said(connection, good, headers={"Content-Length": length})[0] == 411
    for length in ("600000", "9" * 5000):
        found = said(connection, headers={"Content-Length": length})
        assert found == (413, {"error": f"body: got {length} bytes, expected at most 524288"})
    assert said(connection, iter([good]), headers={"Transfer-Encoding": "chunked"})[0] == 411
    connection.request("POST", "/", good)
    connection.close()  # a client that hangs up
    assert said(connection, good)[1]["name"] == "books"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("size", [600_000, 5_000_000])
def test_who_sends_a_body_that_is_too_long_hears_of_it(connection, listening, examples, size):
    asked = {"text": "a" * size, "name": "books"}
    found = examples[1].post(f"http://127.0.0.1:{listening.server_address[1]}/", asked)
    told = f"body: got {len(json.dumps(asked))} bytes, expected at most 524288"
    assert found == (413, {"error": told})
    assert said(connection, b"a" * size, "PUT")[0] == 405
    assert said(connection, iter([b"a" * size]), headers={"Transfer-Encoding": "chunked"})[0] == 411
    until(lambda: not listening.answering)


def test_a_body_that_stops_coming_is_a_408_and_the_end(listening, capfd):
    listening.RequestHandlerClass.timeout = 1
    with socket.create_connection(listening.server_address, timeout=MOST_SECONDS) as client:
        client.sendall(b'POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"text"')
        with client.makefile("rb") as reading:
            head, _, body = reading.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close" in head
    assert json.loads(body) == {"error": "body: got no more of it for 1 s, expected 100 bytes"}
    assert "Traceback" not in capfd.readouterr().err


def test_a_name_that_cannot_be_counted_is_named(examples):
    stream = [("books", "a", "good"), ("books", "b", "bad"), ("songs", "c", "a"), ("stars", "d", "0")]
    lost = FloatingPointError("songs: got outputs that are no finite numbers")
    good = {"name": "books", "label": "good"}
    found = [good, good, lost, {"name": "stars", "score": 0.5}]
    routed = [good, lost, good, {"name": "stars", "score": 0.5}]
    lines = [examples[1].accuracy(name, stream, found, routed) for name in LABELS]
    assert lines == [
        "books: 2 texts, accuracy 0.500 by name, 0.500 by content; 1 routed right",
        str(lost),
        "stars: got scores, expected labels: it was trained on fewer than two",
    ]


def test_wrong_words_of_the_program_are_a_line(folder, examples, capsys, monkeypatch):
    program = examples[1]
    for words, told in (
        (["books", "songs=b"], "got 'books', expected NAME=FOLDER"),
        (["books=a", "books=b"], "name: got 'books' twice"),
        (["../x=a", "books=b"], "name: got '../x'"),
    ):
        with pytest.raises(SystemExit):
            program.parse(["--data", *words])
        assert told in capsys.readouterr().err
    monkeypatch.setattr(program, "train", None)  # nothing is trained before these are known
    options = program.parse(["--data", "books=nowhere.csv", "songs=b.csv", "--port", "70000"])
    with pytest.raises(ValueError, match="port: got 70000, expected a free one, or 0 for any"):
        program.main(options)
    options.port = None
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        program.main(options)
