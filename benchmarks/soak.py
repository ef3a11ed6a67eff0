"""Does the service leak? Hours of mixed work, minute by minute: `python -m benchmarks.soak --minutes 10 --load 0.8`.

Starts a service, finds how many requests a second it can do, and sends a share of that: turbo and premium, streams,
jobs, clients that leave, requests that are wrong. Arrivals are Poisson and do not wait for answers, as real clients'
do not. Exits with 1 when memory grows by more than 5 % after it has warmed up, or when handles, connections, threads
or tasks are more at rest after the work than before it.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import pathlib
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx2

from diffusion_kd import errors

MOST_GROWTH = 0.05
"""Of memory, from the end of the warm-up to the end."""
WARM_MINUTES = 2.0
SLACK = {"handles": 2, "connections": 0, "threads": 2, "tasks": 0}
"""How many more there may be at rest after the work: pools of threads and database connections fill up in time."""
_SAMPLE_S, _CALIBRATION_S, _CLIENTS, _PATIENCE_S = 1.0, 10.0, 16, 120.0
_BODY = {"model": "turbo", "prompt": "a small red circle on a blue background"}
_PREMIUM = {"model": "premium", "num_inference_steps": 10}


# --- what is sent -----------------------------------------------------------------------------------

Send = Callable[[httpx2.AsyncClient, random.Random], Awaitable[str]]
"""Sends one request; the outcome in a word."""


async def turbo(client: httpx2.AsyncClient, chance: random.Random) -> str:
    return await _images(client, {"n": chance.randint(1, 3)})


async def premium(client: httpx2.AsyncClient, chance: random.Random) -> str:
    return await _images(client, _PREMIUM | {"n": chance.randint(1, 2)})


async def url(client: httpx2.AsyncClient, chance: random.Random) -> str:
    return await _images(client, {"response_format": "url"}, key=f"{chance.getrandbits(128):x}")


async def stream(client: httpx2.AsyncClient, chance: random.Random) -> str:
    return await _images(client, _PREMIUM | {"stream": True, "partial_images": chance.randint(0, 3)})


async def leave(client: httpx2.AsyncClient, chance: random.Random) -> str:
    """At some moment of the work, or before it."""
    body = _PREMIUM | {"stream": chance.random() < 0.5, "n": chance.randint(1, 3)}
    try:
        async with asyncio.timeout(chance.expovariate(20)):
            return await _images(client, body)
    except TimeoutError:
        return "left"


async def wrong(client: httpx2.AsyncClient, chance: random.Random) -> str:
    return await _images(client, {"n": chance.randint(11, 99)})


async def job(client: httpx2.AsyncClient, chance: random.Random) -> str:
    """Accepted, asked for until it is done, or taken back."""
    body = _BODY | ({} if chance.random() < 0.5 else _PREMIUM)
    accepted = await client.post("/v1/jobs", json=body)
    if accepted.status_code != 202:
        return str(accepted.status_code)
    path = f"/v1/jobs/{accepted.json()['id']}"
    if chance.random() < 0.2:
        await client.post(f"{path}/cancel")
    while (status := (await client.get(path)).json()["status"]) in ("queued", "running"):
        await asyncio.sleep(0.2)
    return str(status)


MIX: dict[Send, float] = {turbo: 0.4, premium: 0.12, url: 0.1, stream: 0.1, leave: 0.1, wrong: 0.08, job: 0.1}


async def _images(client: httpx2.AsyncClient, body: dict[str, object], key: str | None = None) -> str:
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = await client.post("/v1/images/generations", json=_BODY | body, headers=headers)
    return str(answer.status_code)


class Load:
    """Sends the mix and counts the outcomes, by what was sent."""

    def __init__(self, client: httpx2.AsyncClient, seed: int) -> None:
        self._client, self._chance = client, random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()

    async def one(self) -> None:
        (send,) = self._chance.choices(list(MIX), list(MIX.values()))
        try:
            outcome = await send(self._client, self._chance)
        except httpx2.TransportError as error:
            outcome = type(error).__name__
        self.outcomes[f"{send.__name__} {outcome}"] += 1

    async def saturate(self, seconds: float) -> float:
        """Requests a second when somebody always waits."""
        began_s = time.monotonic()

        async def client() -> int:
            done = 0
            while time.monotonic() < began_s + seconds:
                await self.one()
                done += 1
            return done

        done = sum(await asyncio.gather(*(client() for _ in range(_CLIENTS))))
        return done / (time.monotonic() - began_s)

    async def send(self, rate: float, seconds: float) -> None:
        """`rate` requests a second on average, whatever becomes of them; returns when all are answered."""
        next_s = began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (next_s := next_s + self._chance.expovariate(rate)) < began_s + seconds:
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                group.create_task(self.one())


# --- what is watched --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Of the service's process, at a moment. handles: open files, sockets included."""

    at_s: float
    memory_mb: float
    handles: int
    connections: int
    threads: int
    tasks: int


NAMES = ("memory_mb", "handles", "connections", "threads", "tasks")


async def take(client: httpx2.AsyncClient, pid: int) -> Sample:
    """Linux alone tells all of this."""
    process = pathlib.Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    handles = list(_handles(process))
    metrics = (await client.get("/metrics")).text.splitlines()
    tasks = next(line for line in metrics if line.startswith("diffusion_kd_event_loop_tasks "))
    return Sample(
        time.monotonic(),
        int(status["VmRSS"].split()[0]) / 1024,
        len(handles),
        sum(handle.startswith("socket:") for handle in handles),
        int(status["Threads"]),
        int(float(tasks.split()[1])),
    )


def _handles(process: pathlib.Path) -> Iterator[str]:
    """But for those of the database, whose pool opens and closes connections up to a bound of its own."""
    for handle in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str(handle.readlink())
            if not target.removesuffix("-wal").removesuffix("-shm").endswith(".db"):
                yield target


async def fill_pools(client: httpx2.AsyncClient, pid: int) -> None:
    """Work for many threads at once, until they grow no more: a pool that fills later would look like a leak."""
    threads = 0
    while (now := (await take(client, pid)).threads) > threads:
        threads = now
        for _ in range(5):
            await asyncio.gather(*(client.get("/v1/usage") for _ in range(100)))


async def rest(client: httpx2.AsyncClient, pid: int) -> Sample:
    """The least of each number that is seen in some seconds: what is there when nothing is done."""
    samples = []
    for _ in range(10):
        samples.append(await take(client, pid))
        await asyncio.sleep(_SAMPLE_S)
    return Sample(time.monotonic(), *(min(getattr(sample, name) for sample in samples) for name in NAMES))


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """samples: taken under load, in order. before, after: at rest. window_s: over which first and last are averaged."""

    samples: list[Sample]
    before: Sample
    after: Sample
    warm_s: float
    window_s: float

    def mean(self, name: str, from_s: float) -> float:
        """Over a window that begins so long after the first sample."""
        began_s = self.samples[0].at_s + from_s
        values = [getattr(one, name) for one in self.samples if began_s <= one.at_s <= began_s + self.window_s]
        return statistics.fmean(values or [getattr(self.samples[-1], name)])

    def first(self, name: str) -> float:
        return self.mean(name, self.warm_s)

    def last(self, name: str) -> float:
        return self.mean(name, self.samples[-1].at_s - self.samples[0].at_s - self.window_s)

    def slope(self, name: str) -> float:
        """Growth a minute, by least squares, from the end of the warm-up on."""
        warm = [one for one in self.samples if one.at_s >= self.samples[0].at_s + self.warm_s]
        if len(warm) < 2:
            return 0.0
        return 60 * statistics.linear_regression([o.at_s for o in warm], [getattr(o, name) for o in warm]).slope

    @property
    def grown(self) -> list[str]:
        """What there is too much of."""
        grown = [name for name, more in SLACK.items() if getattr(self.after, name) > getattr(self.before, name) + more]
        return ["memory_mb", *grown] if self.last("memory_mb") > self.first("memory_mb") * (1 + MOST_GROWTH) else grown

    def table(self) -> Iterator[str]:
        yield f"{'':14}{'first':>10}{'last':>10}{'a minute':>11}{'rest before':>13}{'after':>10}"
        for name in NAMES:
            rests = f"{getattr(self.before, name):>13.0f}{getattr(self.after, name):>10.0f}"
            mark = "  GROWS" if name in self.grown else ""
            yield f"{name:14}{self.first(name):>10.1f}{self.last(name):>10.1f}{self.slope(name):>+11.3f}{rests}{mark}"


# --- the service ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def service(folder: pathlib.Path) -> AsyncIterator[tuple[httpx2.AsyncClient, int]]:
    """A service of its own, as a process: a client of it, and its id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--port", str(port), "--data-folder", str(folder)]
    with (folder / "service.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stderr=log)
    most = httpx2.Limits(max_connections=None, max_keepalive_connections=_CLIENTS, keepalive_expiry=1)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S, limits=most) as client:
            await _ready(client, process, folder / "service.log")
            yield client, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _ready(client: httpx2.AsyncClient, process: asyncio.subprocess.Process, log: pathlib.Path) -> None:
    until_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until_s and process.returncode is None:
        with contextlib.suppress(httpx2.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise errors.DiffusionKDError(f"the service did not start: {log.read_text()[-500:]}")


async def soak(minutes: float, share: float, rate: float | None) -> Verdict:
    warm_s = 60 * min(WARM_MINUTES, minutes / 2)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        async with service(pathlib.Path(folder)) as (client, pid):
            most = rate or await Load(client, 0).saturate(_CALIBRATION_S)
            _say(f"{'given' if rate else 'found'}: {most:.1f} requests/s at most; sending {share * most:.1f}/s")
            await fill_pools(client, pid)
            before = await rest(client, pid)

            async def watch() -> None:
                while True:
                    samples.append(await take(client, pid))
                    if len(samples) % 60 == 1:
                        _say(str(samples[-1]))
                    await asyncio.sleep(_SAMPLE_S)

            watching = asyncio.create_task(watch())
            load = Load(client, 1)
            await load.send(share * most, 60 * minutes)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            _say("  ".join(f"{name}: {count}" for name, count in sorted(load.outcomes.items())))
            after = await rest(client, pid)
    return Verdict(samples, before, after, warm_s, min(60.0, 60 * minutes - warm_s))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.8, help="share of the most requests a second; 0.8 unless given")
    parser.add_argument("--rate", type=float, help="the most requests a second; measured unless given")
    given = parser.parse_args()
    verdict = asyncio.run(soak(given.minutes, given.load, given.rate))
    for line in verdict.table():
        _say(line)
    sys.exit(1 if verdict.grown else 0)


if __name__ == "__main__":
    errors.run(main)
