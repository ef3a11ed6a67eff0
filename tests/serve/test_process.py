"""The service as a process: killed again and again, drained, stopped, started wrongly.

DIFFUSION_KD_TEST_KILLS: how often the service is killed; 3 unless given.
DIFFUSION_KD_TEST_POSTGRES, DIFFUSION_KD_TEST_S3: as in tests/serve/store/conftest.py; the killed processes share these.
"""

import base64
import concurrent.futures
import datetime
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
import sqlalchemy
import standardwebhooks

from serve import webhooks
from serve.store import Store
from tests.serve import processes
from tests.serve.processes import eventually

KILLS = int(os.environ.get("DIFFUSION_KD_TEST_KILLS", "3"))
ROOT = pathlib.Path(__file__).parents[2]
SECRET = webhooks.new_secret()
PER_ROUND = 6


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    yield
    processes.stop_forkserver()


# --- kill -9 ----------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "cluster"])
def shared(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings of what the processes share: the data folder alone, or PostgreSQL and S3."""
    if request.param == "local":
        yield {}
        return
    url, bucket = (os.environ.get(f"DIFFUSION_KD_TEST_{name}") for name in ("POSTGRES", "S3"))
    if not url or not bucket:
        pytest.skip("DIFFUSION_KD_TEST_POSTGRES and DIFFUSION_KD_TEST_S3 name no backends")
    endpoint, access_key, secret_key, name = bucket.split("|")
    schema = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        yield {
            "database_url": f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}",
            "images_url": f"s3://{name}/{schema}",
            "s3_endpoint_url": endpoint,
            "s3_access_key": access_key,
            "s3_secret_key": secret_key,
        }
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


class Crowd:
    """Clients that submit jobs to either of two processes, and again to the other when one dies on them."""

    def __init__(self, receiver: str) -> None:
        self._receiver, self._random = receiver, random.Random(0)
        self.urls: list[str] = []
        self.bodies: dict[str, dict[str, Any]] = {}
        self.job_ids: dict[str, str] = {}
        self.retried = 0

    def body(self, number: int) -> dict[str, Any]:
        """A few kinds, so that there are few pictures to compare with."""
        kind = number % 6
        body: dict[str, Any] = {"prompt": "a red circle", "user": f"user-{number}", "seed": kind, "n": 1 + kind % 3}
        # The first kill aims at a job that runs: those of its round are long enough to be hit.
        steps = 60 if number < PER_ROUND else 10
        body |= {"model": "premium", "num_inference_steps": steps} if kind < 4 else {"model": "turbo"}
        body["response_format"] = "url" if kind % 2 else "b64_json"
        return body | ({"webhook_url": self._receiver} if number % 2 else {})

    def submit(self, number: int) -> None:
        """Until a 202 is received; each attempt has the same Idempotency-Key."""
        body = self.bodies[f"user-{number}"] = self.body(number)
        until_s = time.monotonic() + processes.PATIENCE_S
        while time.monotonic() < until_s:
            try:
                answer = httpx2.post(
                    f"{self._random.choice(self.urls)}/v1/jobs",
                    json=body,
                    headers={"Idempotency-Key": f"submission-{number}"},
                    timeout=10,
                )
            except httpx2.TransportError:
                self.retried += 1
                time.sleep(0.05)
                continue
            assert answer.status_code == 202, answer.text
            self.job_ids[body["user"]] = answer.json()["id"]
            return
        raise AssertionError(f"submission {number} got no answer")


def all_jobs(url: str) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    after = None
    while True:
        query = {"limit": 100} | ({"after": after} if after else {})
        page = httpx2.get(f"{url}/v1/jobs", params=query, timeout=60).json()
        jobs += page["data"]
        if not page["has_more"]:
            return jobs
        after = page["after"]


def kill_and_restart(folder: pathlib.Path, crowd: Crowd, settings: dict[str, Any]) -> processes.Process:
    """KILLS rounds of jobs, in each of which one of two processes dies; every fourth time both. Returns a survivor.

    The first to die is one that denoises; the others die at any moment.
    """
    alive = [processes.Process(folder, f"process-{index}", **settings).wait_ready() for index in range(2)]
    crowd.urls = [process.url for process in alive]
    chance, kills = random.Random(1), 0
    try:
        with concurrent.futures.ThreadPoolExecutor(PER_ROUND) as clients:
            sent: list[concurrent.futures.Future[None]] = []
            while kills < KILLS:
                numbers = range(len(sent), len(sent) + PER_ROUND)
                sent += [clients.submit(crowd.submit, number) for number in numbers]
                if kills == 0:
                    victims = eventually(lambda: _at_work(alive), what="a process that denoises")[:1]
                else:
                    # The only wait for nothing in particular: the moment of death is to be any.
                    time.sleep(chance.uniform(0.05, 0.6))
                    victims = [0, 1] if kills % 4 == 3 else [kills % 2]
                for victim in victims:
                    alive[victim].kill()
                    kills += 1
                for victim in victims:
                    alive[victim] = processes.Process(folder, f"process-{victim}", **settings)
                    crowd.urls[victim] = alive[victim].url
                for victim in victims:
                    alive[victim].wait_ready()
            for one in sent:
                one.result(processes.PATIENCE_S)
    except BaseException:
        for process in alive:
            process.kill()
        raise
    alive[1].kill()
    return alive[0]


def _at_work(alive: list[processes.Process]) -> list[int]:
    return [index for index, process in enumerate(alive) if active(process.url)]


def files_of(job: dict[str, Any], url: str) -> list[bytes]:
    """A job's images, fetched from a process that may not have made them."""
    files = []
    for image in httpx2.get(f"{url}/v1/jobs/{job['id']}", timeout=60).json()["result"]["data"]:
        if image.get("b64_json"):
            files.append(base64.b64decode(image["b64_json"]))
        else:
            path = image["url"]
            files.append(httpx2.get(path, timeout=60).raise_for_status().content)
    return files


def check_books(url: str, jobs: list[dict[str, Any]]) -> None:
    """What is recorded as used is what the jobs' answers say, to the nanodollar: each job once."""
    total = httpx2.get(f"{url}/v1/usage", timeout=60).json()["total"]
    assert total["requests"] == len(jobs)
    assert total["images"] == sum(len(job["result"]["data"]) for job in jobs)
    assert round(1e9 * total["cost_usd"]) == sum(round(1e9 * job["result"]["usage"]["cost_usd"]) for job in jobs)


def check_pictures(url: str, jobs: list[dict[str, Any]]) -> None:
    """Every job's pictures are those that its request and seed make now."""
    known: dict[str, list[Any]] = {}
    for job in jobs:
        request = job["request"]
        asked = {name: request[name] for name in ("model", "prompt", "seed", "n", "num_inference_steps")}
        if str(asked) not in known:
            sent = {name: value for name, value in asked.items() if value is not None}
            answer = httpx2.post(f"{url}/v1/images/generations", json=sent, timeout=60).raise_for_status().json()
            known[str(asked)] = [processes.pixels(base64.b64decode(image["b64_json"])) for image in answer["data"]]
        made = [processes.pixels(file) for file in files_of(job, url)]
        assert len(made) == request["n"]
        for one, other in zip(made, known[str(asked)], strict=True):
            assert np.abs(one - other).max() <= 1, job["id"]


def check_messages(messages: list[processes.Message], jobs: list[dict[str, Any]]) -> None:
    """Each job with a webhook was told of, always under one id, and nobody else was."""
    wanted = {job["id"] for job in jobs if job["webhook_url"]}
    assert {message.job_id for message in messages} == wanted
    assert len({(message.job_id, message.id) for message in messages}) == len(wanted)
    for message in messages:
        standardwebhooks.Webhook(SECRET).verify(message.body, message.headers)


def test_what_was_accepted_is_done_once_whoever_is_killed(tmp_path: pathlib.Path, shared: dict[str, str]) -> None:
    with processes.Receiver() as receiver:
        settings = {
            "lease_s": 1,
            "webhook_secret": SECRET,
            "webhook_allow_private": "true",
            "webhook_timeout_s": 1,
            **shared,
        }
        crowd = Crowd(receiver.url)
        survivor = kill_and_restart(tmp_path, crowd, settings)
        try:
            jobs = eventually(lambda: _when_over(survivor.url), what="the end of all jobs")
            assert {job["request"]["user"]: job["id"] for job in jobs} == crowd.job_ids
            assert len(jobs) == len(crowd.bodies), "each submission is one job"
            assert {job["status"] for job in jobs} == {"succeeded"}
            check_books(survivor.url, jobs)
            check_pictures(survivor.url, jobs)
            wanted = sum(job["webhook_url"] is not None for job in jobs)
            eventually(lambda: len({message.job_id for message in receiver.messages}) == wanted, what="all webhooks")
            check_messages(receiver.messages, jobs)
        finally:
            survivor.kill()
    again = sum(job["attempts"] > 1 for job in jobs)
    figures = {"kills": KILLS, "jobs": len(jobs), "run more than once": again, "webhooks": len(receiver.messages)}
    figures |= {"repeated submissions": crowd.retried}
    sys.stdout.write(f"{figures}\n")
    assert again, f"no kill struck a running job, which proves nothing: {figures}"


def _when_over(url: str) -> list[dict[str, Any]]:
    for status in ("queued", "running"):
        if httpx2.get(f"{url}/v1/jobs", params={"limit": 1, "status": status}, timeout=60).json()["data"]:
            return []
    return all_jobs(url)


# --- SIGTERM, SIGINT --------------------------------------------------------------------------------

DIRECT = {"model": "premium", "prompt": "a red circle", "seed": 1}


def generate(url: str, **changes: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/images/generations", json=DIRECT | changes, timeout=processes.PATIENCE_S)


def accept_job(url: str, **changes: Any) -> str:
    answer = httpx2.post(f"{url}/v1/jobs", json=DIRECT | changes, timeout=processes.PATIENCE_S)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def active(url: str, tier: str = "premium") -> int:
    """Images that are being denoised."""
    text = httpx2.get(f"{url}/metrics", timeout=processes.PATIENCE_S).text
    line = next(line for line in text.splitlines() if line.startswith(f'diffusion_kd_active_images{{tier="{tier}"}}'))
    return int(float(line.split()[-1]))


def is_draining(url: str) -> bool:
    answer = httpx2.get(f"{url}/readyz", timeout=processes.PATIENCE_S)
    assert answer.status_code in (200, 503)
    return answer.status_code == 503 and answer.json()["checks"]["drain"] == "closing"


def records_of(folder: pathlib.Path) -> Store:
    return Store(f"sqlite:///{folder}/data/service.db")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_keeps_what_waits(tmp_path: pathlib.Path, number: int) -> None:
    long = {"num_inference_steps": 60}
    # A lease that outlasts the test: what is done after the restart was handed back.
    settings = {"lease_s": 600, "drain_s": 50, "job_concurrency": 1}
    with processes.running(tmp_path, **settings) as service, concurrent.futures.ThreadPoolExecutor() as clients:
        plain = clients.submit(generate, service.url, **long, n=2)
        stream = clients.submit(generate, service.url, **long, stream=True, partial_images=1)
        jobs = [accept_job(service.url, num_inference_steps=20) for _ in range(3)]
        eventually(lambda: active(service.url) == 4, what="work for the device")
        service.signal(number)
        eventually(lambda: is_draining(service.url), what="a 503 of /readyz")
        for refused in (
            generate(service.url, model="turbo"),
            generate(service.url, model="turbo", stream=True),
            httpx2.post(f"{service.url}/v1/jobs", json=DIRECT, timeout=60),
        ):
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
        assert len(plain.result().json()["data"]) == 2
        assert stream.result().text.count("event: image_generation.completed") == 1
        assert service.exit_code(within_s=50) == 0
        assert "Traceback" not in service.log
    store = records_of(tmp_path)
    assert sorted(job.status for job in store.list_jobs(None, 10)[0]) == ["queued", "queued", "succeeded"]
    store.close()
    with processes.running(tmp_path, **settings) as service:
        done = eventually(lambda: _when_over(service.url), what="the end of all jobs")
        assert {job["id"] for job in done} == set(jobs)
        assert {(job["status"], job["attempts"]) for job in done} == {("succeeded", 1)}


def test_when_the_grace_period_ends_the_rest_is_told_and_jobs_are_handed_back(tmp_path: pathlib.Path) -> None:
    long = {"num_inference_steps": 100, "n": 10}
    with processes.running(tmp_path, drain_s=1, lease_s=600) as service:
        with concurrent.futures.ThreadPoolExecutor() as clients:
            plain = clients.submit(generate, service.url, **long)
            stream = clients.submit(generate, service.url, **long, stream=True)
            job = accept_job(service.url, **long)
            eventually(lambda: active(service.url) == 8, what="work for the device")
            began_s = time.monotonic()
            service.signal(signal.SIGTERM)
            assert service.exit_code(within_s=20) == 0
            taken_s = time.monotonic() - began_s
        assert plain.result().status_code == 503 and plain.result().json()["error"]["code"] == "draining"
        assert "event: error" in stream.result().text and "draining" in stream.result().text
        assert 1 <= taken_s < 5
        assert "Traceback" not in service.log
    store = records_of(tmp_path)
    found = store.get_job(job, None)
    store.close()
    assert found is not None and (found.status, found.attempts) == ("queued", 0)


def test_a_second_signal_ends_it_at_once(tmp_path: pathlib.Path) -> None:
    with processes.running(tmp_path, drain_s=600) as service, concurrent.futures.ThreadPoolExecutor() as clients:
        cut_off = [clients.submit(generate, service.url, num_inference_steps=100, n=10) for _ in range(4)]
        eventually(lambda: active(service.url) == 8, what="work for the device")
        began_s = time.monotonic()
        while service.process.is_alive() and time.monotonic() < began_s + 20:
            service.signal(signal.SIGTERM)
            service.process.join(0.4)
        assert service.exit_code(within_s=0) == 0
        assert time.monotonic() - began_s < 5
        assert all(one.exception() or one.result().status_code >= 500 for one in cut_off)


def test_a_second_signal_takes_no_job_for_cancelled(tmp_path: pathlib.Path) -> None:
    settings = {"drain_s": 600, "lease_s": 600}
    with processes.running(tmp_path, **settings) as service:
        job = accept_job(service.url, num_inference_steps=100, n=10)
        eventually(lambda: active(service.url) == 8, what="work for the device")
        while service.process.is_alive():
            service.signal(signal.SIGTERM)
            service.process.join(0.4)
        assert service.exit_code(within_s=0) == 0
    store = records_of(tmp_path)
    found = store.get_job(job, None)
    assert found is not None and (found.status, found.attempts) == ("queued", 0)
    assert store.usage_days(found.key_id, datetime.date.min, datetime.date.max) == []
    store.close()


def test_one_signal_that_comes_twice_at_once_is_one(tmp_path: pathlib.Path) -> None:
    """As when a terminal sends it to a group and its leader passes it on."""
    with processes.running(tmp_path) as service, concurrent.futures.ThreadPoolExecutor() as clients:
        plain = clients.submit(generate, service.url, num_inference_steps=60)
        eventually(lambda: active(service.url) == 1, what="work for the device")
        service.signal(signal.SIGINT)
        service.signal(signal.SIGINT)
        assert plain.result().status_code == 200
        assert service.exit_code() == 0


def test_webhooks_that_hang_at_the_end_go_out_again_after_the_restart(tmp_path: pathlib.Path) -> None:
    """Well before their lease, of minutes, lapses."""
    let_go = threading.Event()

    def hang(_: processes.Message) -> tuple[int, str | None]:
        let_go.wait(processes.PATIENCE_S)
        return 200, None

    settings = {"webhook_secret": SECRET, "webhook_allow_private": True, "webhook_timeout_s": 60}
    with processes.Receiver(hang) as receiver:
        with processes.running(tmp_path, **settings) as service:
            accept_job(service.url, model="turbo", webhook_url=receiver.url)
            eventually(lambda: receiver.messages, what="the first attempt")
            service.signal(signal.SIGTERM)
            assert service.exit_code(within_s=20) == 0
        let_go.set()
        with processes.running(tmp_path, **settings):
            eventually(lambda: len(receiver.messages) == 2, within_s=20, what="a second attempt")
        assert len({message.id for message in receiver.messages}) == 1


# --- starting wrongly -------------------------------------------------------------------------------


def test_python_m_serve_starts_answers_and_ends(tmp_path: pathlib.Path) -> None:
    port = processes.free_port()
    command = [sys.executable, "-m", "serve", "--port", str(port), "--data-folder", str(tmp_path), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as service:

        def ready() -> bool:
            assert service.poll() is None, "it ended at once"
            try:
                return httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(ready, what="readiness")
        service.terminate()
        _, log = service.communicate(timeout=30)
    assert service.returncode == 0 and "Traceback" not in log


def test_a_port_in_use_is_told_in_one_line(tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with processes.started(tmp_path, port=taken.getsockname()[1]) as service:
            assert service.exit_code(within_s=20) == 2
    assert "Address already in use" in service.log
    assert len(service.log.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ([], {"lease_s": "soon"}, "lease_s"),
        ([], {"turbo_tier__max_batch": 0}, "max_batch"),
        ([], {"host": "0.0.0.0"}, "--auth keys"),
        (["--auth", "keys"], {}, "keys create"),
        (["--turbo", "no/such/model"], {}, "no/such/model"),
        (["--turbo", "shapes-teacher"], {}, "shapes-teacher"),
        ([], {"database_url": "mysql://x"}, "sqlite:"),
        ([], {"webhook_secret": "plain"}, "whsec_"),
        ([], {"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    tmp_path: pathlib.Path, arguments: list[str], settings: dict[str, Any], told: str
) -> None:
    with processes.started(tmp_path, arguments=arguments, **settings) as service:
        assert service.exit_code(within_s=20) == 2
    lines = [line for line in service.log.splitlines() if "[info" not in line]
    assert len(lines) == 1 and told in lines[0], service.log
