"""The image and the compose file: that they name what exists, keep what is secret secret, and agree with each other.

That they build and start can be seen only with a container engine: `docker compose up --build`.
"""

import fnmatch
import http.server
import json
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from serve import build, command, settings

ROOT = pathlib.Path(__file__).parent.parent
PREFIX = "DIFFUSION_KD_"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|(ADMIN|ACCESS)_KEY|AUTH$")
SECRETS = {
    "DIFFUSION_KD_ADMIN_KEY": "a" * 48,
    "DIFFUSION_KD_WEBHOOK_SECRET": "whsec_" + "b" * 48,
    "POSTGRES_PASSWORD": "c" * 48,
    "REDIS_PASSWORD": "d" * 48,
    "S3_ACCESS_KEY": "e" * 48,
    "S3_SECRET_KEY": "f" * 48,
}
INNERMOST = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<text>[^{}]*))?\}")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """`text` as Compose reads it, from the inside out. Raises LookupError for a required variable without a value."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"], match["kind"], match["text"]
        if values.get(name):
            return values[name]
        if kind == ":?":
            raise LookupError(f"{name}: {rest}")
        assert kind == ":-", f"{match[0]} is empty where {name} is not set"
        return rest or ""

    while INNERMOST.search(text):
        text = INNERMOST.sub(value, text)
    return text.replace("$$", "$")


def environment(service: str, values: Mapping[str, str]) -> dict[str, str]:
    given = compose()["services"][service].get("environment", {})
    return {name: interpolated(str(text), values) for name, text in given.items()}


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments on one line) of the Dockerfile, in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def image_environment() -> dict[str, str]:
    """What the last stage of the Dockerfile sets."""
    pairs = [pair for name, rest in instructions() if name == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml"])
def test_every_variable_is_a_setting_of_the_service(file: str) -> None:
    named = set(re.findall(PREFIX + r"[A-Z0-9_]*[A-Z0-9]", (ROOT / file).read_text()))
    assert named
    fields = {PREFIX + field.upper() for field in settings.Settings.model_fields}
    stems = {PREFIX + "S3"}  # "DIFFUSION_KD_S3_..." in a comment
    assert named - stems <= fields


def test_the_service_accepts_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = image_environment() | environment("service", SECRETS)
    for name, value in given.items():
        if name.startswith(PREFIX):
            monkeypatch.setenv(name, value)
    made = settings.Settings()
    assert (made.host, made.port, made.auth) == ("0.0.0.0", 8000, "keys")
    assert made.database == f"postgresql+psycopg://diffusion_kd:{'c' * 48}@postgres:5432/diffusion_kd"
    assert made.limits_url == f"redis://:{'d' * 48}@redis:6379/0"
    assert made.images.startswith("s3://")
    options = {"endpoint_url": "http://s3:8333", "public_endpoint_url": "http://localhost:8333"}
    assert made.images_options == options | {"key": "e" * 48, "secret": "f" * 48}
    assert made.public_url == "http://localhost:8000"
    assert made.admin_key is not None and made.admin_key.get_secret_value() == "a" * 48


def test_a_set_port_is_the_one_in_links() -> None:
    given = environment("service", SECRETS | {"SERVICE_PORT": "81", "S3_PORT": "82"})
    assert given["DIFFUSION_KD_PUBLIC_URL"] == "http://localhost:81"
    assert given["DIFFUSION_KD_S3_PUBLIC_ENDPOINT_URL"] == "http://localhost:82"


def test_both_sides_of_a_connection_agree() -> None:
    given = environment("service", SECRETS)
    postgres, s3 = environment("postgres", SECRETS), environment("s3", SECRETS)
    account = f"{postgres['POSTGRES_USER']}:{postgres['POSTGRES_PASSWORD']}@postgres:5432/{postgres['POSTGRES_DB']}"
    assert given["DIFFUSION_KD_DATABASE_URL"].endswith(f"//{account}")
    assert given["DIFFUSION_KD_S3_ACCESS_KEY"] == s3["AWS_ACCESS_KEY_ID"]
    assert given["DIFFUSION_KD_S3_SECRET_KEY"] == s3["AWS_SECRET_ACCESS_KEY"]
    bucket = given["DIFFUSION_KD_IMAGES_URL"].removeprefix("s3://").split("/")[0]
    assert f"s3.bucket.create -name {bucket}'" in compose()["services"]["bucket"]["command"][0]
    redis = [interpolated(word, SECRETS) for word in compose()["services"]["redis"]["command"]]
    password = redis[redis.index("--requirepass") + 1]
    assert password == SECRETS["REDIS_PASSWORD"] == environment("redis", SECRETS)["REDISCLI_AUTH"]
    assert f":{password}@redis:6379" in given["DIFFUSION_KD_LIMITS_URL"]


# --- secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", SECRETS)
def test_nothing_starts_without_a_secret(missing: str) -> None:
    values = {name: value for name, value in SECRETS.items() if name != missing}
    with pytest.raises(LookupError, match=rf"{missing}: set it in \.env"):
        interpolated((ROOT / "compose.yaml").read_text(), values)


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "compose.yaml").read_text()
    defaults = [match["name"] for match in re.finditer(r"\$\{(?P<name>\w+)(?!:\?)[^\w]", text)]
    assert defaults, "the pattern finds none at all"
    assert [name for name in defaults if SECRET_NAME.search(name)] == []


def test_no_secret_is_written_out() -> None:
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable) and variable != "DIFFUSION_KD_AUTH":  # which is a mode, not a password
                assert re.fullmatch(r"\$\{\w+:\?[^{}]+\}", str(value)), f"{variable} of {name}"


def test_the_image_holds_no_secret() -> None:
    kept = [rest for name, rest in instructions() if name in ("ENV", "ARG")]
    names = {word.split("=")[0] for rest in kept for word in rest.split()} - {"DIFFUSION_KD_AUTH"}
    assert "DIFFUSION_KD_PORT" in names
    assert [name for name in names if SECRET_NAME.search(name)] == []


def test_ports_are_published_on_this_machine_only() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(interpolated(port, SECRETS).startswith("127.0.0.1:") for port in published)


def test_the_service_has_no_rights() -> None:
    service = compose()["services"]["service"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["10001:10001"]


# --- order ------------------------------------------------------------------------------------------


def test_what_is_waited_for_can_be_waited_for() -> None:
    services = compose()["services"]
    seen = set()
    for service in services.values():
        for name, wait in service.get("depends_on", {}).items():
            seen.add((name, wait["condition"]))
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services[name], name
            else:
                assert services[name]["restart"] == "on-failure", f"{name} must end to be waited for"
    assert seen == {
        ("postgres", "service_healthy"),
        ("redis", "service_healthy"),
        ("s3", "service_healthy"),
        ("bucket", "service_completed_successfully"),
    }


def test_every_volume_is_declared() -> None:
    loaded = compose()
    mounts = [mount for service in loaded["services"].values() for mount in service.get("volumes", [])]
    assert {interpolated(mount, {}).split(":")[0] for mount in mounts} == loaded["volumes"].keys()


def test_the_service_may_finish_before_it_is_killed() -> None:
    grace = compose()["services"]["service"]["stop_grace_period"]
    after_drain_s = command.AFTER_DRAIN_S + 2 * build.SETTLE_S
    assert float(grace.removesuffix("s")) > settings.Settings.model_fields["drain_s"].default + after_drain_s


def test_the_tests_and_compose_use_one_s3_server() -> None:
    backends = re.search(r"^SEAWEEDFS=(\S+)$", (ROOT / ".ci/backends").read_text(), re.MULTILINE)
    assert backends
    images = {compose()["services"][name]["image"] for name in ("s3", "bucket")}
    assert images == {f"chrislusf/seaweedfs:{backends[1]}"}


# --- the image --------------------------------------------------------------------------------------


def test_what_is_copied_exists_and_is_let_through() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = {source for line in copied for source in line}
    assert {"diffusion_kd", "eval", "serve"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(pathlib.Path(source).parts[0], pattern) for pattern in allowed), source


def test_nothing_else_reaches_the_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    copied = {part for name, rest in instructions() if name == "COPY" for part in rest.split()}
    assert {line[1:] for line in lines if line.startswith("!")} <= copied


class Readiness(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status: int = getattr(self.server, "status")  # noqa: B009 - the test sets it
        self.send_response(status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Readiness) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_healthy_is_what_readyz_says(served: http.server.HTTPServer, status: int, healthy: bool) -> None:
    served.status = status  # type: ignore[attr-defined]
    (rest,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    program, *arguments = json.loads(rest.partition("CMD ")[2])
    assert program == "python"
    environ = {"DIFFUSION_KD_PORT": str(served.server_port)}
    ended = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, timeout=30, check=False)
    assert (ended.returncode == 0) is healthy


# --- backends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["begin"], ["stop", "now"], ["start", "--some"]])
def test_backends_refuses_what_it_does_not_know(arguments: list[str], tmp_path: pathlib.Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "DIFFUSION_KD_TEST_BACKENDS": str(tmp_path / "state")}
    ended = subprocess.run(
        [ROOT / ".ci/backends", *arguments], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "start [--all] | stop" in ended.stderr
    assert not (tmp_path / "state").exists()
