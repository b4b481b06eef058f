"""examples/serving: a pack behind FastAPI, asked over the loopback."""

import json
import sys
import threading
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
        held = threading.Event()
        server._answers, answers = (lambda *given: held.wait(30) and answers(*given)), server._answers
        late = app.application(server, timeout=0.05)
        with app.running(late) as other:  # closes the server at its end
            assert post(f"{other}/predict", {"text": "a", "name": "books"})[0] == 503
            found = [post(f"{other}/predict", {"text": "a", "name": "books"})[0] for _ in range(6)]
            assert found == [503, 503, 503, 503, 429, 429]
            held.set()
        assert post(ask, {"text": "a", "name": "books"})[0] == 503
    app.main(["--pack", app.folder, "--port", "0", "--load", "40"])
    assert "load: 40 requests by 16 clients, 40 answered" in capsys.readouterr().out
