"""A pack behind FastAPI (the extra "serve"): whatever waits becomes one forward, whatever its names.

    python examples/serving/fastapi_app.py --pack pack --port 8000

with a folder of `adamix pack` or save_pack. POST /predict {"text": ..., "name": "books"}, or without a name by content,
answers {"name", "label", "probability"}; GET /names tells the names and their labels, GET /health whether it lives.
404: no such name; 422: not such an object; 429: the queue is full, with Retry-After; 503: it is closing, or the answer
took longer than --timeout.

    python examples/serving/fastapi_app.py --pack pack --port 0 --load 500

asks itself 500 times by 16 clients, prints what that took, and ends.
"""

import argparse
import asyncio
import contextlib
import queue
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # examples/, where serve_pack lies

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from pydantic import BaseModel, ConfigDict, Field
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"{missing.name}: not installed, expected the extra: pip install 'adamix_kernels[serve]'")
from serve_pack import Busy, Server, load_test

from adamix_kernels import load


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1, max_length=20_000)
    name: str | None = None


def application(server, timeout=30.0):
    """A FastAPI application over a serve_pack.Server, which it closes at its end, or what has the same methods."""
    closing = threading.Event()

    @contextlib.asynccontextmanager
    async def life(_app):
        yield
        closing.set()
        await asyncio.to_thread(server.close)

    app = FastAPI(title="adamix pack", lifespan=life)

    @app.get("/health")
    def health():
        return {"alive": server.alive(), "waiting": server.waiting()}

    @app.get("/names")
    def names():
        return server.labels()

    @app.post("/predict")
    def predict(asked: Asked):
        if closing.is_set() or not server.alive():
            raise HTTPException(503, "closing")
        if asked.name is not None and asked.name not in server.names:
            raise HTTPException(404, f"name: got {asked.name!r}, expected one of {', '.join(server.names)}, or none")
        try:
            return server.ask(asked.text, asked.name, timeout)
        except Busy as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        except (queue.Empty, TimeoutError):
            raise HTTPException(503, f"no answer within {timeout:g} s") from None
        except ConnectionError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except ValueError as error:  # by content, of a name without a centroid
            raise HTTPException(400, str(error)) from None

    return app


@contextlib.contextmanager
def running(app, port=0):
    """Serves `app` on this machine within the context; gives its address."""
    listening = socket.create_server(("127.0.0.1", port), backlog=128)
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=http.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not http.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", required=True, help="a folder of adamix pack or save_pack")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--most", type=int, default=32, help="texts of one forward")
    parser.add_argument("--waiting", type=int, default=256, help="texts that may wait")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until 503")
    parser.add_argument("--load", type=int, help="ask itself so often, print what that took, and end")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.pack)
    server = Server(model, tokenizer, options.most, options.waiting)
    app = application(server, options.timeout)
    if options.load is None:
        uvicorn.run(app, port=options.port)
        return
    names = list(server.names)
    asked = [{"text": f"text number {n}", "name": names[n % len(names)]} for n in range(options.load)]
    with running(app, options.port) as url:
        seconds, total, statuses = load_test(f"{url}/predict", asked)
    print(
        f"load: {len(statuses)} requests by 16 clients, {statuses.count(200)} answered, {len(statuses) / total:.0f} a "
        f"second, median {1e3 * seconds[len(seconds) // 2]:.1f} ms, 95% within "
        f"{1e3 * seconds[int(0.95 * len(seconds))]:.1f} ms, {server.answered / server.batches:.1f} texts a forward"
    )


if __name__ == "__main__":
    main()
