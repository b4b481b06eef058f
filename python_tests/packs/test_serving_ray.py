"""examples/serving/ray_app.py: names pinned to two replicas on this machine, asked over HTTP."""

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny_text
import torch

from adamix_kernels import AdaMixConfig, adapt, load, merge, pack, save_adamix, save_pack, store_centroid
from adamix_kernels.tasks import load_classifier, resolve_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for module, extra in (("fastapi", "serve"), ("uvicorn", "serve"), ("ray.serve", "ray")):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'adamix_kernels[{extra}]'")
LABELS = {"books": ["bad", "good"], "songs": ["a", "b", "c"], "films": ["no", "yes"]}


@pytest.fixture
def folder(tmp_path):
    encoder = resolve_model(str(tiny_text.write_encoder(tmp_path / "encoder")))
    for number, (name, labels) in enumerate(LABELS.items()):
        model, tokenizer = load_classifier(encoder, labels)
        torch.manual_seed(number)
        adapt(model, AdaMixConfig(num_experts=2, bottleneck=4))
        texts = [f"{name} {word}" for word in ("fine", "lovely", "dull")]
        store_centroid(model, [tokenizer(texts, padding=True, return_tensors="pt")])
        save_adamix(merge(model), tmp_path / name)
    base, _ = load_classifier(encoder, ["", "_"])
    return save_pack(pack(base, {name: tmp_path / name for name in LABELS}), tmp_path / "pack")


@pytest.fixture
def ray_app(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "serving"), str(EXAMPLES), *sys.path])
    import ray
    import ray_app

    yield ray_app
    ray_app.serve.shutdown()
    ray.shutdown()


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_names_are_where_they_are_pinned(folder, ray_app):
    from serve_pack import Server, post

    places = ray_app.placed(list(LABELS), 2, ["films=1"])
    assert places == {"books": 0, "songs": 1, "films": 1}
    for shards, pins, told in (
        (4, [], "shards: got 4, expected 1 to 3"),
        (2, ["x=0"], "pin: got 'x=0'"),
        (2, ["songs=2"], "pin: got 'songs=2'"),
        (2, ["songs=0", "films=0"], "pin: got none for shard 1"),
    ):
        with pytest.raises(ValueError, match=told):
            ray_app.placed(list(LABELS), shards, pins)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray_app.started(port=port, cpus=2)
    app = ray_app.deployments(folder, places, most=8, waiting=16, timeout=20, cpus=0.5)
    ray_app.serve.run(app, name=ray_app.APP, route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    states = [ray_app.serve.get_deployment_handle(f"shard-{n}", ray_app.APP).state.remote().result() for n in (0, 1)]
    assert [list(state["labels"]) for state in states] == [["books"], ["songs", "films"]]
    assert len({os.getpid(), *(state["process"] for state in states)}) == 3
    assert get(f"{url}/names") == LABELS
    assert get(f"{url}/health") == {"alive": True, "waiting": 0}
    alone = Server(*load(folder), most=1)
    for name in (*LABELS, None):
        text = f"{name or 'songs'} fine"
        status, answer = post(f"{url}/predict", {"text": text, "name": name})
        want = alone.ask(text, name)
        assert status == 200
        assert answer.pop("shard") == places[want["name"]]
        assert answer == pytest.approx(want, abs=1e-5)
    alone.close()
    assert post(f"{url}/predict", {"text": "a", "name": "none"})[0] == 404
    assert post(f"{url}/predict", {"text": 3})[0] == 422
    _, _, statuses = ray_app.load_test(f"{url}/predict", [{"text": "a", "name": n} for n in LABELS] * 5, clients=3)
    assert statuses == [200] * 15

    os.kill(states[0]["process"], signal.SIGKILL)  # a process that this test had started
    assert post(f"{url}/predict", {"text": "songs fine", "name": "songs"})[0] == 200
    began = time.time()
    while (status := post(f"{url}/predict", {"text": "books fine", "name": "books"})[0]) != 200:
        assert status == 503
        assert time.time() - began < 120
        time.sleep(0.5)
