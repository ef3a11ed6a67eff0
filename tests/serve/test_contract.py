"""The service against its own reference: thousands of requests that /openapi.json allows, or forbids, by schemathesis.

Examples, boundaries of each field, random bodies and chains of calls, from a fixed seed. Each answer must have a status
and a form that the reference names; what the reference forbids must be refused; no answer may be a 500.
DIFFUSION_KD_TEST_EXAMPLES: random requests for each operation, instead of a few.
"""

import collections
import dataclasses
import itertools
import os
import re
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from tests.serve.conftest import Start
from tests.serve.live import ADMIN, Live

# Random requests for each operation; boundaries and chains come on top. 100 make more than two thousand in all.
EXAMPLES = int(os.environ.get("DIFFUSION_KD_TEST_EXAMPLES", "15"))
CASES = 700 if EXAMPLES < 100 else 2000
MOST_STEPS, MOST_IMAGES = 3, 2
NUMBERS = itertools.count()

# A schema knows no fields that exclude each other, such as `guidance_scale` and the turbo tier.
COMBINED = ["/v1/images/generations", "/v1/jobs", "/v1/usage"]


@dataclasses.dataclass
class Seen:
    """requests: by operation. statuses: (operation, status) -> how many. failures: what was found, once each."""

    requests: collections.Counter[str]
    statuses: collections.Counter[tuple[str, int]]
    failures: dict[str, str]
    key_still_works: bool


@pytest.fixture(scope="module")
def checked(start: Start) -> Live:
    return start(max_queued_jobs=1_000_000)


@pytest.fixture(scope="module")
def reference(checked: Live) -> dict[str, Any]:
    document: dict[str, Any] = checked.client(None).get("/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def seen(checked: Live) -> Seen:
    schema = schemathesis.openapi.from_url(f"{checked.url}/openapi.json", config=config())
    schemathesis.hook(before_call)  # for the whole process
    seen = Seen(collections.Counter(), collections.Counter(), {}, False)
    for event in engine.from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            note(event, seen)
        elif isinstance(event, events.NonFatalError | events.FatalError):
            seen.failures[f"error {len(seen.failures)}"] = str(event)
    schemathesis.hooks.unregister(before_call)
    seen.key_still_works = checked.client().get("/v1/models").status_code == 200
    return seen


def config() -> SchemathesisConfig:
    # The key is sent with requests that are to be without one as well; the tests of keys have those.
    excepted = ("positive_data_acceptance", "missing_required_header")
    combined: list[dict[str, Any]] = [
        {"include-path": path, "checks": {check: {"enabled": False} for check in excepted}} for path in COMBINED
    ]
    # GET of that path asks for the image named "generations", so its Allow has GET.
    combined[0]["checks"]["allow_header_conformance"] = {"enabled": False}
    return SchemathesisConfig.from_dict(
        {
            "seed": 20260101,
            "headers": {"Authorization": f"Bearer {ADMIN}"},
            "continue-on-failure": True,
            "generation": {"max-examples": EXAMPLES, "database": "none", "no-shrink": True},
            "operations": combined,
        }
    )


def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Leaves a request valid or invalid as it is, and makes a valid one cheap: few steps, few images, a tier that is.

    Idempotency keys are made different, since most requests would be conflicts else; and a chain of calls must not
    revoke the key that all are sent with.
    """
    number = next(NUMBERS)
    if isinstance(case.body, dict) and "prompt" in case.body:
        shorten(case.body, number)
    headers = case.headers or {}
    if re.fullmatch(r"[\x21-\x7e]{1,200}", str(headers.get("Idempotency-Key", ""))):
        headers["Idempotency-Key"] += str(number)
    if case.path_parameters.get("key_id") in ("admin", "anonymous"):
        case.path_parameters["key_id"] = "key_0"


def shorten(body: dict[str, Any], number: int) -> None:
    if isinstance(body.get("model"), str) and 1 <= len(body["model"]) <= 200 and number % 10:
        body["model"] = "premium" if number % 2 else "turbo"
    steps = body.get("num_inference_steps")
    if in_range(steps, 100) or (steps is None and body.get("model") == "premium"):
        body["num_inference_steps"] = min(steps or MOST_STEPS, MOST_STEPS)
    if in_range(body.get("n"), 10):
        body["n"] = min(body["n"], MOST_IMAGES)


def in_range(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def note(event: events.ScenarioFinished, seen: Seen) -> None:
    for interaction in event.recorder.interactions.values():
        if interaction.response is not None:
            operation = f"{interaction.request.method} {interaction.request.uri.partition('?')[0]}"
            label = event.recorder.label if event.recorder.label != "Stateful tests" else operation
            seen.requests[label] += 1
            seen.statuses[label, interaction.response.status_code] += 1
    for checks in event.recorder.checks.values():
        for check in checks:
            if (found := check.failure_info) is not None:
                title = f"{event.recorder.label}: {check.name}: {found.failure.title}"
                seen.failures.setdefault(title, f"{found.failure.message}\n{found.code_sample}")


def test_it_does_what_its_reference_says(seen: Seen) -> None:
    assert not seen.failures, "\n\n".join(f"{title}\n{told}" for title, told in seen.failures.items())


def test_many_requests_were_sent_and_none_failed(seen: Seen) -> None:
    assert sum(seen.requests.values()) >= CASES
    assert [place for place, _ in seen.statuses.items() if place[1] >= 500] == []


def test_they_reached_what_they_should(seen: Seen) -> None:
    """Else it would prove little: both answers and refusals of every kind of body."""
    assert seen.key_still_works
    for operation, accepted in (
        ("POST /v1/images/generations", 200),
        ("POST /v1/jobs", 202),
        ("POST /v1/admin/keys", 201),
        ("GET /v1/jobs", 200),
        ("GET /v1/usage", 200),
    ):
        assert seen.statuses[operation, accepted] >= 5, (operation, seen.statuses)
        assert seen.statuses[operation, 400] >= 10, (operation, seen.statuses)


# --- the reference itself ---------------------------------------------------------------------------


def operations(reference: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in reference["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_route_is_described_with_its_answers_and_refusals(reference: dict[str, Any]) -> None:
    for path, method, operation in operations(reference):
        assert operation["description"].endswith(".") or ":" in operation["description"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        assert "422" not in operation["responses"], path
        if not path.startswith("/v1"):
            continue
        for status, answer in operation["responses"].items():
            assert answer["description"], (path, status)
            if status >= "400":
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorOut"), (path, status)
        wanted = {"500", "503"} | ({"401", "403"} if operation.get("security") else set())
        wanted |= {"400", "408", "413"} if "requestBody" in operation else set()
        assert wanted <= operation["responses"].keys(), (path, method)


def test_the_refusals_of_a_generation_are_all_there(reference: dict[str, Any]) -> None:
    found = reference["paths"]["/v1/images/generations"]["post"]
    assert set(found["responses"]) == {
        *("200", "202", "400", "401", "403", "404", "408", "409", "413", "429", "500", "503"),
    }
    assert {"application/json", "text/event-stream"} <= found["responses"]["200"]["content"].keys()
    assert {parameter["name"] for parameter in found["parameters"]} == {"Idempotency-Key", "Prefer"}


def test_extensions_are_visible_with_their_ranges(reference: dict[str, Any]) -> None:
    fields = reference["components"]["schemas"]["GenerationBody"]["properties"]
    for name in ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "allow_downgrade"):
        assert fields[name]["description"]
    assert fields["seed"]["anyOf"][0]["maximum"] == 2**32 - 1
    assert reference["components"]["schemas"]["GenerationBody"]["additionalProperties"] is False
    assert reference["components"]["schemas"]["ImagesOut"]["properties"].keys() >= {
        "usage",
        "warnings",
        "model_version",
    }


def test_the_contracts_routes_are_there_and_no_others(reference: dict[str, Any]) -> None:
    assert {(method, path) for path, method, _ in operations(reference)} == {
        ("post", "/v1/images/generations"),
        ("get", "/v1/images/{image_id}"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model}"),
        ("post", "/v1/jobs"),
        ("get", "/v1/jobs"),
        ("get", "/v1/jobs/{job_id}"),
        ("post", "/v1/jobs/{job_id}/cancel"),
        ("get", "/v1/usage"),
        ("post", "/v1/admin/keys"),
        ("get", "/v1/admin/keys"),
        ("delete", "/v1/admin/keys/{key_id}"),
        *(("get", path) for path in ("/healthz", "/readyz", "/metrics")),
    }


def test_the_page_of_the_reference_opens(checked: Live) -> None:
    answer = httpx.get(f"{checked.url}/docs", trust_env=False)
    assert answer.status_code == 200 and "/openapi.json" in answer.text
