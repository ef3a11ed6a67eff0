"""The service under load, beside two plain servers of the same models: `python -m benchmarks.serving`.

Requests arrive by a Poisson process whose schedule is drawn beforehand; each is sent when it is due, whatever became of
the others, and its latency counts from then: a server that stalls cannot slow its own load down. All servers are up at
once and loaded in turn, in rounds, so that a machine that slows down slows all of them. Client and servers share the
machine; the client does little but count.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import serving_baselines
from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from eval import sampling
from serve.engine import encoding

OURS, NAIVE, BATCHING = "ours", "naive", "batching"
SERVERS = (OURS, NAIVE, BATCHING)
LOADS = {"turbo": 1.0, "premium": 0.0, "mixed": 0.9}
"""Share of turbo among the requests."""

_START_S, _ANSWER_S = 180.0, 600.0
_PATH = b"/v1/images/generations"
_RESAMPLES, _WARM_CALLS = 1000, 5


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """due_s: since the load began. body: JSON."""

    due_s: float
    tier: str
    body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """latency_s: from when the request was due. late_s: how much later than due the client sent it. done_s: when the
    answer was complete, since the load began."""

    tier: str
    status: int
    latency_s: float
    late_s: float
    done_s: float


class Prompts:
    """Bodies, each with a prompt that no other has: a server that keeps embeddings gains nothing by it."""

    def __init__(self, seed: int) -> None:
        self._random, self._seed, self._count = random.Random(seed), seed, 0
        self._texts = self._drawn()

    def body(self, tier: str) -> bytes:
        return json.dumps({"model": tier, "prompt": next(self._texts), "seed": self._random.randrange(2**32)}).encode()

    def _drawn(self) -> Iterator[str]:
        while True:
            for prompt in scenes.draw_prompts(500, self._seed + self._count):
                self._count += 1
                yield f"{prompt.text} {self._count}"


def schedule(rate: float, seconds: float, turbo_share: float, seed: int, prompts: Prompts) -> list[Arrival]:
    """Poisson arrivals of `rate` a second. The same seed gives the same times and tiers."""
    rng = random.Random(seed)
    due_s, arrivals = rng.expovariate(rate), list[Arrival]()
    while due_s < seconds:
        tier = "turbo" if rng.random() < turbo_share else "premium"
        arrivals.append(Arrival(due_s, tier, prompts.body(tier)))
        due_s += rng.expovariate(rate)
    return arrivals


# --- client -----------------------------------------------------------------------------------------


class Client:
    """HTTP/1.1 over kept connections, as little of it as the servers need."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises DataError where it is no image and no refusal."""
        request = (
            b"POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (_PATH, self._port, len(body), body)
        )
        async with asyncio.timeout(_ANSWER_S):
            status, answer = await self._exchange(request)
        if status != 503 and (status != 200 or b'"b64_json"' not in answer):
            raise errors.DataError(f"a server answered {status}, not an image: {answer[:200]!r}")
        return status, answer

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        while self._idle:
            kept = self._idle.pop()
            try:
                return await self._answer(kept[0], kept[1], request)
            except (asyncio.IncompleteReadError, ConnectionError):  # closed by the server while it was idle
                kept[1].close()
        return await self._answer(*await asyncio.open_connection("127.0.0.1", self._port), request)

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> tuple[int, bytes]:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        self._idle.append((reader, writer))
        return int(head[9:12]), body

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *reason: object) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()


async def open_loop(port: int, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Send each request when it is due, and wait for all answers."""
    client, loop = Client(port), asyncio.get_running_loop()
    began_s = loop.time()

    async def send(arrival: Arrival) -> Answer:
        sent_s = loop.time() - began_s
        status, _ = await client.post(arrival.body)
        done_s = loop.time() - began_s
        return Answer(arrival.tier, status, done_s - arrival.due_s, sent_s - arrival.due_s, done_s)

    async with client:
        sending = []
        for arrival in arrivals:
            await asyncio.sleep(began_s + arrival.due_s - loop.time())
            sending.append(asyncio.create_task(send(arrival)))
        return await asyncio.gather(*sending)


async def closed_loop(port: int, turbo_share: float, clients: int, seconds: float, prompts: Prompts) -> float:
    """Images a second while so many clients ask again as soon as they are answered.

    The first fifth of the time warms up. A batch is answered all at once: the result comes in steps of a batch over the
    time counted, and a slow tier needs a long one.
    """
    client, loop, rng = Client(port), asyncio.get_running_loop(), random.Random(0)
    began_s = loop.time()
    done_s: list[float] = []

    async def ask() -> None:
        while loop.time() - began_s < seconds:
            status, _ = await client.post(prompts.body("turbo" if rng.random() < turbo_share else "premium"))
            if status == 200:
                done_s.append(loop.time() - began_s)
            else:
                await asyncio.sleep(0.05)

    async with client:
        await asyncio.gather(*[ask() for _ in range(clients)])
    counted = [one for one in done_s if seconds / 5 <= one <= seconds]
    return len(counted) / (0.8 * seconds)


# --- servers ----------------------------------------------------------------------------------------


class Server:
    """A server in a process of its own, until `close`. Raises DataError if it does not get ready."""

    def __init__(self, name: str, command: Sequence[str], environment: Sequence[str], folder: pathlib.Path) -> None:
        self.name, self.port = name, _free_port()
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["env", *environment, sys.executable, *command, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Until it is ready."""
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        tail = "\n".join(self._log.read_text(encoding="utf-8").splitlines()[-20:])
        raise errors.DataError(f"the server {self.name} did not get ready within {_START_S:g} s; its log ends:\n{tail}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(given: argparse.Namespace, folder: pathlib.Path) -> dict[str, Server]:
    """All servers, ready."""
    shared = ["--premium", given.premium, "--turbo", given.turbo, "--device", given.device]
    baseline = ["-m", "benchmarks.serving_baselines", *shared, "--guidance-scale", str(given.guidance_scale)]
    baseline += ["--max-batch", str(given.max_batch)]
    environment = [
        f"OMP_NUM_THREADS={given.threads}",
        f"DIFFUSION_KD_TURBO_TIER__MAX_BATCH={given.max_batch}",
        f"DIFFUSION_KD_PREMIUM_TIER__MAX_BATCH={given.max_batch}",
        f"DIFFUSION_KD_PREMIUM_TIER__DEFAULT_GUIDANCE_SCALE={given.guidance_scale}",
    ]
    commands = {
        OURS: ["-m", "serve", *shared, "--data-folder", str(folder / "service"), "--log-format", "json"],
        NAIVE: [*baseline, NAIVE],
        BATCHING: [*baseline, BATCHING],
    }
    servers: dict[str, Server] = {}
    try:
        for name in given.servers:
            servers[name] = Server(name, commands[name], environment, folder)
        for server in servers.values():
            server.wait()
    except BaseException:
        close(servers)
        raise
    return servers


def close(servers: dict[str, Server]) -> None:
    for server in servers.values():
        server.close()


# --- measurements -----------------------------------------------------------------------------------


def saturation(servers: dict[str, Server], tier: str, given: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Images a second of each server, by round, and how many times (a)'s and (b)'s ours are."""
    by_round: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(given.rounds):
        for name, server in servers.items():
            by_round[name].append(
                asyncio.run(closed_loop(server.port, LOADS[tier], given.clients, given.saturation_seconds, prompts))
            )
    ratios = {
        name: [ours / theirs for ours, theirs in zip(by_round[OURS], by_round[name], strict=True)]
        for name in by_round
        if name != OURS and OURS in by_round
    }
    return {"load": tier, "images_per_s": by_round, "ours_over": ratios}


def reference_rate(found: Sequence[dict[str, Any]], load: str) -> float:
    """Requests a second that the naive server, or else the first one measured, can serve of a load.

    Of the mixed load it follows from the tiers': clients that wait for their answers would soon all wait for premium.
    """
    by_tier = {one["load"]: one["images_per_s"] for one in found}
    rates = {tier: statistics.median(rates.get(NAIVE) or next(iter(rates.values()))) for tier, rates in by_tier.items()}
    turbo_share = LOADS[load]
    shares = {"turbo": turbo_share, "premium": 1 - turbo_share}
    return 1 / float(sum(share / rates[tier] for tier, share in shares.items() if share))


def loaded(
    servers: dict[str, Server], load: str, rate: float, given: argparse.Namespace, prompts: Prompts
) -> list[dict[str, Any]]:
    """One row for each server and tier under Poisson arrivals; all rounds together."""
    answers: dict[str, list[Answer]] = {name: [] for name in servers}
    achieved: dict[str, list[float]] = {name: [] for name in servers}
    for index in range(given.rounds):
        arrivals = schedule(rate, given.seconds, LOADS[load], given.seed + index, prompts)
        for name, server in servers.items():
            some = asyncio.run(open_loop(server.port, arrivals))
            answers[name] += some
            made = [one.done_s for one in some if one.status == 200]
            achieved[name].append(len(made) / max(made) if made else 0.0)
            # The same prompts again would be known to a server; the times and tiers stay.
            arrivals = [dataclasses.replace(one, body=prompts.body(one.tier)) for one in arrivals]
    rows = []
    for name, some in answers.items():
        about = {
            "load": load,
            "server": name,
            "offered_per_s": rate,
            "achieved_per_s": statistics.fmean(achieved[name]),
        }
        rows += [about | latencies([one for one in some if one.tier == tier], tier) for tier in _tiers(load)]
    return rows


def _tiers(load: str) -> list[str]:
    return [load] if load in ("turbo", "premium") else ["turbo", "premium"]


def latencies(answers: Sequence[Answer], tier: str) -> dict[str, Any]:
    """Of one tier, in milliseconds; of refused requests only their share."""
    made = [1000 * one.latency_s for one in answers if one.status == 200]
    late = [1000 * one.late_s for one in answers]
    row: dict[str, Any] = {"tier": tier, "requests": len(answers), "refused": 1 - len(made) / max(1, len(answers))}
    if made:
        p50, p99 = np.quantile(made, (0.5, 0.99))
        row |= {"p50_ms": float(p50), "p99_ms": float(p99), "p99_interval_ms": quantile_interval(made, 0.99)}
        row |= {"client_late_p99_ms": float(np.quantile(late, 0.99))}
    return row


def quantile_interval(values: Sequence[float], probability: float, seed: int = 0) -> tuple[float, float]:
    """95 % interval by a moving block bootstrap: a queue makes the latencies of neighbours alike (Künsch 1989).

    values: in the order of arrival.
    """
    series, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    block = max(1, round(2 * len(series) ** (1 / 3)))
    count = -(-len(series) // block)
    starts = rng.integers(0, len(series) - block + 1, (_RESAMPLES, count))
    index = (starts[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, : len(series)]
    low, high = np.quantile(np.quantile(series[index], probability, axis=1), (0.025, 0.975))
    return float(low), float(high)


async def overhead(server: Server, given: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Turbo, one request at a time: HTTP, and a bare pipeline call with its PNG, call by call in turn; medians in ms.

    stages: what the service itself says that text, denoise, decode and encode took.
    """
    torch.set_num_threads(given.threads)
    by_tier = serving_baselines.recipes(given.premium, given.turbo, given.guidance_scale)
    draw = serving_baselines.load_samplers(by_tier, torch.device(given.device))
    over_http, bare, stages = list[float](), list[float](), list[float]()

    async def http() -> None:
        began_s = time.perf_counter()
        _, answer = await client.post(prompts.body("turbo"))
        over_http.append(1000 * (time.perf_counter() - began_s))
        compute = json.loads(answer)["usage"]["compute_ms"]
        stages.append(sum(compute[stage] for stage in ("text", "denoise", "decode", "encode")))

    def pipeline_alone() -> None:
        asked = json.loads(prompts.body("turbo"))
        began_s = time.perf_counter()
        images = draw("turbo", [asked["prompt"]], [asked["seed"]])
        encoding.encode(sampling.to_uint8(images)[0], encoding.Encoding(), asked)
        bare.append(1000 * (time.perf_counter() - began_s))

    async with Client(server.port) as client:
        for _ in range(_WARM_CALLS + given.calls):
            await http()
            pipeline_alone()
    over_http, bare, stages = over_http[_WARM_CALLS:], bare[_WARM_CALLS:], stages[_WARM_CALLS:]
    pairs = [one - other for one, other in zip(over_http, bare, strict=True)]
    return {
        "calls": given.calls,
        "http_ms": statistics.median(over_http),
        "bare_ms": statistics.median(bare),
        "overhead_ms": statistics.median(over_http) - statistics.median(bare),
        "paired_overhead_ms": statistics.median(pairs),
        "outside_stages_ms": statistics.median([one - other for one, other in zip(over_http, stages, strict=True)]),
    }


# --- report -----------------------------------------------------------------------------------------


def show_saturation(found: dict[str, Any]) -> str:
    lines = [f"\n{found['load']}, saturated: images/s, median (least - most) of {_rounds(found)} rounds"]
    for name, values in found["images_per_s"].items():
        ratio = found["ours_over"].get(name)
        beside = f"   ours is {_spread(ratio)}x" if ratio else ""
        lines.append(f"  {name:10}{_spread(values):>24}{beside}")
    return "\n".join(lines) + "\n"


def _rounds(found: dict[str, Any]) -> int:
    return len(next(iter(found["images_per_s"].values())))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def show_rows(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"\n{'load':9}{'server':10}{'offered/s':>10}{'done/s':>8}  {'tier':8}{'requests':>9}{'refused':>9}{'p50 ms':>9}"
        f"{'p99 ms':>9}   95 % interval"
    ]
    for row in rows:
        line = (
            f"{row['load']:9}{row['server']:10}{row['offered_per_s']:>10.2f}{row['achieved_per_s']:>8.2f}  "
            f"{row['tier']:8}{row['requests']:>9}{row['refused']:>9.1%}"
        )
        if "p99_ms" in row:
            low, high = row["p99_interval_ms"]
            line += f"{row['p50_ms']:>9.0f}{row['p99_ms']:>9.0f}   {low:.0f} - {high:.0f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def show_overhead(found: dict[str, Any]) -> str:
    return (
        f"\nturbo, one request at a time, medians of {found['calls']} calls: {found['http_ms']:.1f} ms over HTTP, "
        f"{found['bare_ms']:.1f} ms bare: overhead {found['overhead_ms']:.1f} ms "
        f"({found['paired_overhead_ms']:.1f} ms pair by pair; {found['outside_stages_ms']:.1f} ms outside the stages "
        "that the service times)\n"
    )


def measure(given: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Everything, shown as it comes."""
    prompts, report = Prompts(given.seed), about(given)
    servers = start(given, folder)
    try:
        if OURS in servers:
            report["overhead"] = asyncio.run(overhead(servers[OURS], given, prompts))
            sys.stdout.write(show_overhead(report["overhead"]))
        for tier in ("turbo", "premium"):
            if tier in given.loads or "mixed" in given.loads:
                found = saturation(servers, tier, given, prompts)
                report["saturation"].append(found)
                sys.stdout.write(show_saturation(found))
        for load in given.loads:
            for share in given.rates:
                rows = loaded(servers, load, share * reference_rate(report["saturation"], load), given, prompts)
                report["rows"] += rows
                sys.stdout.write(show_rows(rows))
                sys.stdout.flush()
    finally:
        close(servers)
    report["load_average_after"] = os.getloadavg()
    return report


def about(given: argparse.Namespace) -> dict[str, Any]:
    """The machine and the settings, without which the numbers say nothing."""
    return {
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "load_average_before": os.getloadavg(),
        "settings": {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(given).items()
        },
        "saturation": [],
        "rows": [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Load the service, a naive server and a batching server of the same models in turn.",
    )
    add = parser.add_argument
    add("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    add("--loads", nargs="*", choices=tuple(LOADS), default=list(LOADS))
    add("--rates", nargs="*", type=float, default=[0.5, 0.8], help="shares of what the naive server achieves")
    add("--rounds", type=int, default=3, help="times that each server is loaded at each rate")
    add("--seconds", type=float, default=30.0, help="of arrivals, each time")
    add("--saturation-seconds", type=float, default=30.0, help="that a server is saturated, each time")
    add("--clients", type=int, default=24, help="that keep a server saturated")
    add("--calls", type=int, default=200, help="of the overhead, each way")
    add("--threads", type=int, default=1, help="of torch, in each server")
    add("--max-batch", type=int, default=8)
    add("--premium", default="shapes-teacher")
    add("--turbo", default="shapes-student")
    add("--guidance-scale", type=float, default=2.0, help="that the premium tier has by default")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="JSON of all that was measured")
    return parser


def main() -> None:
    given = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(given, pathlib.Path(folder))
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    errors.run(main)
