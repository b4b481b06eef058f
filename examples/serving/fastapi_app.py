"""A pack behind FastAPI (the extra "serve"): whatever waits becomes one forward, whatever its names.

    python examples/serving/fastapi_app.py --pack pack --port 8000

with a folder of `adamix pack` or save_pack. POST /predict {"text": ..., "name": "books"}, or without a name by content,
answers {"name", "label", "probability"}, or {"name", "score"}; GET /names tells the names and their labels, GET /health
whether it lives (503 where not). 400: by content, where a name has no centroid; 404: no such name; 413: a body of over
512 KiB; 422: not such an object; 429: the queue is full, with Retry-After; 500: the forward failed; 503: it is closing,
or the answer took longer than --timeout. With --host 0.0.0.0 other machines may ask; nobody needs a password.

    python examples/serving/fastapi_app.py --pack pack --port 0 --load 500

asks itself 500 times by 16 clients, prints what that took, and ends.
"""

import argparse
import asyncio
import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # examples/, where serve_pack lies

try:
    import uvicorn
    from anyio import to_thread
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"{missing.name}: not installed, expected the extra: pip install 'adamix_kernels[serve]'")
import torch
from _server import Busy, Server, lengths
from serve_pack import MOST_BYTES, check_port, load_test

from adamix_kernels import load

THREADS = 2048  # requests at once: more than wait in a queue, which is to refuse first


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1, max_length=20_000)
    name: str | None = None


def plain(part):
    """A place in the body, as JSON can be written of it."""
    return part if isinstance(part, int) else part.encode("ascii", "backslashreplace").decode()


class Limited:
    """ASGI: 413 for a body of more than `most` bytes, of which no more is read."""

    def __init__(self, app, most):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"body: got more than {self.most} bytes, expected fewer")
            return message

        await self.app(scope, counted, send)


def application(server, timeout=30.0):
    """A FastAPI application over a _server.Server, which it closes at its end, or what has the same methods."""
    closing = threading.Event()

    @contextlib.asynccontextmanager
    async def life(_app):
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        closing.set()
        await asyncio.to_thread(server.close)

    app = FastAPI(title="adamix pack", lifespan=life)
    app.add_middleware(Limited, most=MOST_BYTES)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError):
        """Without what came, which may be long, and no JSON."""
        given = request.headers.get("content-type", "none")
        detail = [{"type": one["type"], "loc": [*map(plain, one["loc"])], "msg": one["msg"]} for one in error.errors()]
        if "json" not in given.lower():
            told = f"got {given!r}, expected application/json"
            detail.insert(0, {"type": "content_type", "loc": ["header", "content-type"], "msg": told})
        return JSONResponse({"detail": detail}, 422)

    @app.exception_handler(ConnectionError)
    @app.exception_handler(TimeoutError)
    def away(_request: Request, error: Exception):
        told = str(error) if isinstance(error, ConnectionError) else f"no answer within {timeout:g} s"
        return JSONResponse({"detail": told}, 503, {"Retry-After": "1"})

    @app.api_route("/health", methods=["GET", "HEAD"])
    def health():
        alive = server.alive() and not closing.is_set()
        return JSONResponse({"alive": alive, "waiting": server.waiting()}, 200 if alive else 503)

    @app.api_route("/names", methods=["GET", "HEAD"])
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
        except FloatingPointError as error:
            raise HTTPException(500, str(error)) from None
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


def open_server(folder, most, waiting, names=None):
    """A Server of a pack's folder, or of some of its names, on a GPU where there is one. Raises ValueError."""
    try:
        model, tokenizer = load(folder, names=names)
    except ValueError as error:
        raise ValueError(f"pack: {error}") from error
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    pack = getattr(getattr(model, "adamix", None), "pack", None)
    return Server(model, tokenizer, most, waiting, lengths(pack.entries if pack else {}))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", required=True, help="a folder of adamix pack or save_pack")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: other machines may ask")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--most", type=int, default=32, help="texts of one forward")
    parser.add_argument("--waiting", type=int, default=256, help="texts that may wait")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until 503")
    parser.add_argument("--load", type=int, help="ask itself so often, print what that took, and end")
    options = parser.parse_args(arguments)
    try:
        for name, value in (("timeout", options.timeout), ("load", options.load)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        check_port(options.port)
        server = open_server(options.pack, options.most, options.waiting)
    except ValueError as error:
        parser.error(str(error))
    app = application(server, options.timeout)
    if options.load is None:
        uvicorn.run(app, host=options.host, port=options.port)
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
