"""examples/serving: a pack behind FastAPI, asked over the loopback."""

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny_text
import torch

from adamix_kernels import AdaMixConfig, adapt, load, merge, pack, save_adamix, save_pack
from adamix_kernels.tasks import load_classifier, resolve_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'adamix_kernels[serve]'")


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "serving"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import fastapi_app

    encoder = resolve_model(str(tiny_text.write_encoder(tmp_path / "encoder")))
    for number, (name, labels) in enumerate({"books": ["bad", "good"], "songs": ["a", "b", "c"]}.items()):
        model, _ = load_classifier(encoder, labels)
        torch.manual_seed(number)
        adapt(model, AdaMixConfig(num_experts=2, bottleneck=4))
        save_adamix(merge(model), tmp_path / name)
    base, _ = load_classifier(encoder, ["", "_"])
    save_pack(pack(base, {name: tmp_path / name for name in ("books", "songs")}), tmp_path / "pack")
    fastapi_app.folder = str(tmp_path / "pack")
    return fastapi_app


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def raw(url, body, content_type="application/json", method="POST"):
    """(status, answer) of a body as it is."""
    request = urllib.request.Request(url, body, {"Content-Type": content_type}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def refused(url, body):
    """As raw, or "broken": the rest of a body may meet a closed socket, before the answer is read."""
    try:
        return raw(url, body)
    except OSError as error:
        if not isinstance(getattr(error, "reason", error), ConnectionError):
            raise
        return "broken"


def test_where_it_listens(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "serving"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import fastapi_app

    seen = []
    monkeypatch.setattr(fastapi_app, "open_server", lambda *_: None)
    monkeypatch.setattr(fastapi_app.uvicorn, "run", lambda _app, **where: seen.append(where))
    fastapi_app.main(["--pack", "pack"])
    fastapi_app.main(["--pack", "pack", "--host", "0.0.0.0", "--port", "80"])
    assert seen == [{"host": "127.0.0.1", "port": 8000}, {"host": "0.0.0.0", "port": 80}]


def test_whatever_comes_is_answered(app):
    from serve_pack import post

    server = app.open_server(app.folder, 8, 4)
    with app.running(app.application(server)) as url:
        ask = f"{url}/predict"
        for body in (b'{"text": NaN}', b'{"text": "a", "name": Infinity}', b'{"text": "a", "\\ud800": 1}', b"[1]", b""):
            assert raw(ask, body)[0] == 422, body
        assert raw(ask, b'{"text": "a \\ud800", "name": "books"}')[0] in (400, 422)  # by pydantic's version
        status, told = raw(ask, json.dumps({"text": "a" * 30_000}).encode())
        assert (status, "20000 characters" in told, len(told) < 300) == (422, True, True)  # not what came
        status, told = raw(ask, b'{"text": "a"}', "text/plain")
        assert (status, "got 'text/plain', expected application/json" in told) == (422, True)
        long = (413, '{"detail":"body: got more than 524288 bytes, expected fewer"}')
        assert raw(ask, b"a" * 524_289) == long  # all of it is read
        for body in (b"a" * 600_000, iter([b"a" * 100_000] * 6)):
            assert refused(ask, body) in (long, "broken")
        assert raw(f"{url}/health", None, method="GET")[0] == 200
        for path in ("names", "health"):
            assert raw(f"{url}/{path}", None, method="HEAD") == (200, "")
        assert post(ask, {"text": "good " * 200, "name": "books"})[0] == 200  # of a model of 32 positions
        with torch.no_grad():
            server.model.classifier.bias.fill_(torch.nan)
        status, told = post(ask, {"text": "a", "name": "books"})
        assert (status, told["detail"][:10]) == (500, "books: got")
        server.waiting = server.labels = lambda: (_ for _ in ()).throw(ConnectionError("a shard does not answer"))
        for path in ("names", "health"):
            assert raw(f"{url}/{path}", None, method="GET") == (503, '{"detail":"a shard does not answer"}')
        del server.waiting
        server.close()
        assert raw(f"{url}/health", None, method="GET") == (503, '{"alive":false,"waiting":0}')


def test_more_than_forty_may_wait(app):
    """AnyIO has 40 threads; the queue is what refuses, and /health is answered meanwhile."""
    from serve_pack import post

    server = app.open_server(app.folder, 1, 60)
    held, answers = threading.Event(), server._answers
    server._answers = lambda *given: held.wait(60) and answers(*given)
    found = []
    with app.running(app.application(server)) as url:
        asked = {"text": "a", "name": "books"}

        def ask():
            found.append(post(f"{url}/predict", asked)[0])

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(70)]
        try:
            for thread in threads:
                thread.start()
            end = time.monotonic() + 60
            while len(found) < 9:
                assert time.monotonic() < end, "nobody was refused within 60 s"
                time.sleep(0.01)
            assert get(f"{url}/health") == {"alive": True, "waiting": 60}
        finally:
            held.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert sorted(found) == [200] * 61 + [429] * 9


def test_wrong_words_are_a_line(app, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, told in (
            (["--pack", str(tmp_path / "no")], "pack: source: got"),
            (["--pack", str(tmp_path / "books")], "pack: got a BertForSequenceClassification that is no pack"),
            (["--pack", app.folder, "--port", str(port)], f"port: got {port}, expected a free one, or 0 for any"),
            (["--pack", app.folder, "--port", "70000"], "port: got 70000, expected a free one, or 0 for any"),
            (["--pack", app.folder, "--port", "0", "--load", "0"], "load: got 0, expected more than 0"),
            (["--pack", app.folder, "--port", "0", "--waiting", "0"], "waiting: got 0, expected at least 1"),
        ):
            with pytest.raises(SystemExit) as ended:
                app.main(words)
            assert ended.value.code == 2
            assert told in capsys.readouterr().err


def test_the_server_answers_and_says_what_is_wrong(app, capsys):
    from serve_pack import Server, load_test, post

    server = Server(*load(app.folder), most=8, waiting=4)
    with app.running(app.application(server, timeout=5)) as url:
        assert get(f"{url}/names") == {"books": ["bad", "good"], "songs": ["a", "b", "c"]}
        assert get(f"{url}/health") == {"alive": True, "waiting": 0}
        ask = f"{url}/predict"
        status, answer = post(ask, {"text": "a fine book", "name": "songs"})
        assert (status, answer["name"]) == (200, "songs")
        assert answer["label"] in ("a", "b", "c")
        assert 1 / 3 <= answer["probability"] <= 1
        assert post(ask, {"text": "a", "name": "none"})[0] == 404
        assert post(ask, {"text": 3})[0] == 422
        assert post(ask, {"text": "a", "nam": "books"})[0] == 422
        status, answer = post(ask, {"text": "a"})  # these folders hold no centroid
        assert status == 400
        assert "without a centroid" in answer["detail"]
        _, _, statuses = load_test(ask, [{"text": "a fine book", "name": "books"}] * 20, clients=3)
        assert statuses == [200] * 20
        held, inside, answers = threading.Event(), threading.Event(), server._answers
        server._answers = lambda *given: inside.set() or (held.wait(60) and answers(*given))
        late = app.application(server, timeout=0.05)
        with app.running(late) as other:  # closes the server at its end
            try:
                threading.Thread(target=server.ask, args=("a", "books"), daemon=True).start()
                assert inside.wait(60)
                found = [post(f"{other}/predict", {"text": "a", "name": "books"})[0] for _ in range(6)]
                assert found == [503, 503, 503, 503, 429, 429]
            finally:
                held.set()
        assert post(ask, {"text": "a", "name": "books"})[0] == 503
    app.main(["--pack", app.folder, "--port", "0", "--load", "40"])
    assert "load: 40 requests by 16 clients, 40 answered" in capsys.readouterr().out
