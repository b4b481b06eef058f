"""The server of fastapi_app.py over several processes or machines, by Ray Serve (the extra "ray").

    python examples/serving/ray_app.py --pack pack --shards 2 --port 8000

Every name is pinned to one shard, whose replicas alone hold it: name k of the pack to shard k modulo --shards, or where
--pin books=0 songs=1 says. Each replica is one process with the base, its own names and its own bounded queue; the
entrance is the same FastAPI application, and sends a text with a name to that name's shard. A text without a name goes
to all shards, and the most similar name of all answers. Answers also tell the "shard". A replica that dies is started
anew by Ray; until then its names, and texts without a name, answer 503, and the others go on.

--replicas starts so many of every shard; --address auto joins a cluster that runs, where the pack, this package and
these examples are at the same paths on every machine. `serve status` and Ray's dashboard show the deployments.

    python examples/serving/ray_app.py --pack pack --shards 2 --port 8000 --load 500

asks itself 500 times by 16 clients, prints what that took, and ends.
"""

import argparse
import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # examples/, where serve_pack lies
sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"{missing.name}: not installed, expected the extra: pip install 'adamix_kernels[ray]'")
from _server import Busy
from fastapi_app import application, open_server
from serve_pack import check_port, load_test

from adamix_kernels.packs.folder import read_pack

APP = "adamix"
HERE = Path(__file__).resolve().parent
# What a holder's answer may stand for, as an exception does not keep its class on its way through Ray.
ERRORS = {kind.__name__: kind for kind in (Busy, TimeoutError, FloatingPointError, ValueError)}


class Holder:
    """One replica of a shard: a pack of the names that are pinned here."""

    def __init__(self, folder, names, most, waiting):
        self.server = open_server(folder, most, waiting, names)
        self.threads = ThreadPoolExecutor(waiting + most + 1)

    async def ask(self, text, name, timeout):
        """(None, answer), or (one of ERRORS, its message)."""
        loop = asyncio.get_running_loop()
        try:
            return None, await loop.run_in_executor(self.threads, self.server.ask, text, name, timeout)
        except tuple(ERRORS.values()) as error:
            return next(name for name, kind in ERRORS.items() if isinstance(error, kind)), str(error)

    async def state(self):
        return {"labels": self.server.labels(), "waiting": self.server.waiting(), "process": os.getpid()}

    def check_health(self):
        if not self.server.alive():
            raise RuntimeError("the thread with the model has ended")


class Shards:
    """The methods of serve_pack.Server, over all shards. places: name -> number of its shard."""

    def __init__(self, places):
        self.names = places
        self.numbers = sorted(set(places.values()))

    def _all(self, numbers, method, *arguments, timeout):
        """What the shards answer, asked at the same time."""
        begun = [getattr(serve.get_deployment_handle(f"shard-{n}", APP), method).remote(*arguments) for n in numbers]
        try:
            return [one.result(timeout_s=timeout) for one in begun]
        except ray.exceptions.RayTaskError:
            raise  # an error of the forward itself
        except (ray.exceptions.RayError, RayServeException) as error:
            raise ConnectionError(f"a shard does not answer: {type(error).__name__}") from None

    def ask(self, text, name=None, timeout=60):
        numbers = self.numbers if name is None else [self.names[name]]
        found = []
        for n, (wrong, answer) in zip(numbers, self._all(numbers, "ask", text, name, timeout, timeout=timeout)):
            if wrong is not None:
                raise ERRORS[wrong](answer)
            found.append({**answer, "shard": n})
        return max(found, key=lambda one: one.get("similarity", 0))

    def labels(self):
        states = self._all(self.numbers, "state", timeout=30)
        labels = {name: mine for state in states for name, mine in state["labels"].items()}
        return {name: labels[name] for name in self.names}

    def waiting(self):
        return sum(state["waiting"] for state in self._all(self.numbers, "state", timeout=30))

    def alive(self):
        return True  # Ray starts again what has died

    def close(self):
        pass


def placed(names, shards, pins=()):
    """name -> shard. pins: NAME=SHARD. Raises ValueError for a name or a number that is none."""
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards: got {shards}, expected 1 to {len(names)}, the names of the pack")
    places = {name: k % shards for k, name in enumerate(names)}
    for word in pins:
        name, _, number = word.partition("=")
        if name not in places or not number.isdigit() or int(number) >= shards:
            raise ValueError(f"pin: got {word!r}, expected NAME=SHARD, one of {', '.join(names)} and 0 to {shards - 1}")
        places[name] = int(number)
    empty = sorted(set(range(shards)) - set(places.values()))
    if empty:
        raise ValueError(f"pin: got none for shard {empty[0]}, expected a name on every shard")
    return places


def deployments(folder, places, *, replicas=1, most=32, waiting=256, timeout=30.0, cpus=1.0, gpus=0.0):
    """What serve.run takes: the entrance, and a deployment for each shard."""
    shards = []
    for n in sorted(set(places.values())):
        mine = [name for name, place in places.items() if place == n]
        options = dict(name=f"shard-{n}", num_replicas=replicas, ray_actor_options={"num_cpus": cpus, "num_gpus": gpus})
        # More than its own queue takes, so that it is the queue that refuses.
        options["max_ongoing_requests"] = 2 * (waiting + most)
        shards.append(serve.deployment(Holder, **options).bind(str(folder), mine, most, waiting))
    entrance = serve.deployment(
        serve.ingress(lambda: application(Shards(places), timeout))(), name="entrance", max_ongoing_requests=1000
    )
    return entrance.options(ray_actor_options={"num_cpus": 0}).bind(*shards)


def started(address=None, port=8000, cpus=None):
    """Ray and its HTTP proxy on this machine, whose workers find these modules."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    more = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    ray.init(address=address, runtime_env={"env_vars": variables}, log_to_driver=False, **more)
    serve.start(http_options={"host": "127.0.0.1", "port": port})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", required=True, help="a folder of adamix pack or save_pack")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--pin", nargs="+", default=[], metavar="NAME=SHARD")
    parser.add_argument("--replicas", type=int, default=1, help="of every shard")
    parser.add_argument("--address", help="of a Ray cluster, or auto; without it one is started on this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--most", type=int, default=32, help="texts of one forward")
    parser.add_argument("--waiting", type=int, default=256, help="texts that may wait at a replica")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until 503")
    parser.add_argument("--cpus", type=float, default=1.0, help="of a replica")
    parser.add_argument("--gpus", type=float, default=0.0, help="of a replica")
    parser.add_argument("--load", type=int, help="ask itself so often, print what that took, and end")
    options = parser.parse_args(arguments)
    folder = Path(options.pack).resolve()
    try:
        for name in ("replicas", "most", "waiting", "timeout", "load"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        if options.address is None:
            check_port(options.port)
        places = placed(list(read_pack(folder)["names"]), options.shards, options.pin)
    except ValueError as error:
        parser.error(str(error))
    started(options.address, options.port)
    app = deployments(
        folder, places, replicas=options.replicas, most=options.most, waiting=options.waiting, timeout=options.timeout,
        cpus=options.cpus, gpus=options.gpus,
    )  # fmt: skip
    serve.run(app, name=APP, route_prefix="/")
    url = f"http://127.0.0.1:{options.port}"
    print(f"serving {', '.join(f'{name} (shard {n})' for name, n in places.items())} on {url}", flush=True)
    try:
        if options.load is None:
            while True:
                time.sleep(3600)
        names = list(places)
        asked = [{"text": f"text number {n}", "name": names[n % len(names)]} for n in range(options.load)]
        seconds, total, statuses = load_test(f"{url}/predict", asked)
        print(
            f"load: {len(statuses)} requests by 16 clients, {statuses.count(200)} answered, "
            f"{len(statuses) / total:.0f} a second, median {1e3 * seconds[len(seconds) // 2]:.1f} ms, 95% within "
            f"{1e3 * seconds[int(0.95 * len(seconds))]:.1f} ms"
        )
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
