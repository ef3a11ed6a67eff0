"""Tiers as `/v1/models` shows them, prices, aliases, and settings that no model could keep."""

import asyncio
import datetime
import json
import pathlib
from typing import Any

import pytest

from diffusion_kd import artifact
from diffusion_kd.errors import ConfigError
from eval import report
from serve import budgets, catalogue, costs, errors, evaluation
from serve.settings import Settings
from serve.store import records
from tests.serve.conftest import Start
from tests.serve.live import Live, refused
from tests.serve.test_api import GENERATIONS, body, made, premium


@pytest.fixture(scope="module")
def priced(start: Start) -> Live:
    turbo = {"aliases": ["gpt-image-mini", "org/sdxl-turbo"], "sizes": ["64x64", "96x64"], "default_steps": 2}
    return start(price_per_gpu_hour_usd=36.0, turbo_tier=turbo, premium_tier={"default_steps": 4})


def model(live: Live, name: str) -> dict[str, Any]:
    answer = live.client().get(f"/v1/models/{name}")
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def test_a_tier_tells_what_it_can(priced: Live) -> None:
    turbo, of_premium = model(priced, "turbo"), model(priced, "premium")
    assert (turbo["steps"], turbo["steps_are_a_range"], turbo["default_steps"]) == ([1, 2, 3, 4], False, 2)
    assert (of_premium["steps"], of_premium["steps_are_a_range"]) == ([1, 100], True)
    assert turbo["sizes"] == ["64x64", "96x64"] and of_premium["sizes"] == ["64x64"]
    assert turbo["default_guidance_scale"] is None and of_premium["default_guidance_scale"] == 2.0
    assert turbo["version"].startswith("shapes-student@") and of_premium["version"].startswith("shapes-teacher@")
    assert turbo["evaluation"] is None or turbo["evaluation"]["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE")
    assert priced.client().get("/v1/models").json() == {"object": "list", "data": [of_premium, turbo]}


def test_an_alias_is_the_tier(priced: Live) -> None:
    assert model(priced, "gpt-image-mini")["id"] == "turbo"
    assert made(priced.client(), body(model="org/sdxl-turbo"))["model"] == "turbo"
    assert model(priced, "org%2Fsdxl-turbo")["id"] == "turbo"
    assert "gpt-image-mini" in refused(priced.client().post(GENERATIONS, json=body(model="x")), 404, "model")


def test_sizes_are_made_as_asked(priced: Live) -> None:
    answer = made(priced.client(), body(size="96x64"))
    assert answer["size"] == "96x64"
    assert made(priced.client(), body(size="auto"))["size"] == "64x64"
    refused(priced.client().post(GENERATIONS, json=premium(size="96x64")), 400, "size")


def test_the_price_is_that_of_the_settings(priced: Live) -> None:
    usage = made(priced.client(), body())["usage"]
    device_s = sum(usage["compute_ms"][stage] for stage in ("text", "denoise", "decode")) / 1000
    assert usage["cost_usd"] == pytest.approx(0.01 * device_s, abs=3e-8)
    shown = model(priced, "turbo")
    assert shown["price_per_gpu_hour_usd"] == 36 and 0.1 < shown["image_cost_usd"] / usage["cost_usd"] < 10


def test_latency_is_measured(priced: Live) -> None:
    user = priced.client()
    for _ in range(3):
        made(user, body())
    latency = model(priced, "turbo")["latency"]
    assert latency["requests"] >= 3 and 0 < latency["p50_ms"] <= latency["p99_ms"] < 60_000


@pytest.mark.parametrize(
    ("tier", "told"),
    [
        ({"turbo_tier": {"sizes": ["60x64"]}}, "cannot make 60x64"),
        ({"turbo_tier": {"default_steps": 7}}, "default_steps is 7"),
        ({"turbo_tier": {"aliases": ["premium"]}}, "two tiers"),
        ({"turbo_tier": {"aliases": ["a"]}, "premium_tier": {"aliases": ["a"]}}, "two tiers"),
    ],
)
def test_settings_that_the_models_cannot_keep(tier: dict[str, Any], told: str, live: Live) -> None:
    with pytest.raises(ConfigError, match=told):
        catalogue.Catalogue(live.built.service.engine.models, Settings(**tier))


# --- costs ------------------------------------------------------------------------------------------


def test_money_is_whole_nano_dollars() -> None:
    assert costs.Price(3.6).nanousd(1.0) == 1_000_000
    assert costs.Price(2.5).nanousd(0.0123) == 8542
    assert costs.to_usd(8542) == 0.000008542 and costs.to_nanousd(0.000008542) == 8542
    assert costs.to_nanousd(0.1) + costs.to_nanousd(0.2) == costs.to_nanousd(0.3)


class Books:
    """What a store has of a key's costs."""

    def __init__(self, spent: int) -> None:
        self.spent, self.since = spent, datetime.datetime.min

    def spent_nanousd(self, key_id: str, since: datetime.datetime) -> int:
        self.since = since
        return self.spent


def key(budget: int | None) -> records.Key:
    now = datetime.datetime.now(datetime.UTC)
    return records.Key("key_a", "a", "dkd_", frozenset({"generate"}), None, budget, now, None)


def holds(kept: budgets.Budgets, whose: records.Key, nanousd: int, *more: int) -> bool:
    """Whether a cost fits into what is left, and those after it while it is held."""

    async def hold(amounts: tuple[int, ...]) -> None:
        if amounts:
            async with kept.held(whose, amounts[0]):
                await hold(amounts[1:])

    try:
        asyncio.run(hold((nanousd, *more)))
    except errors.BudgetSpent:
        return False
    return True


@pytest.mark.parametrize(("budget", "fits"), [(None, True), (100, True), (99, False), (0, False)])
def test_a_budget_is_spent_to_its_end(budget: int | None, fits: bool) -> None:
    assert holds(budgets.Budgets(Books(60)), key(budget), 40) is fits


def test_what_runs_is_held_until_it_ends() -> None:
    kept = budgets.Budgets(Books(0))
    assert not holds(kept, key(100), 60, 60)
    assert holds(kept, key(100), 60, 40) and holds(kept, key(100), 100)


def test_a_budget_counts_from_the_first_of_the_month() -> None:
    books = Books(0)
    assert holds(budgets.Budgets(books), key(1), 1)
    now = datetime.datetime.now(datetime.UTC)
    assert books.since == datetime.datetime(now.year, now.month, 1, tzinfo=datetime.UTC)


# --- the student's evaluation -----------------------------------------------------------------------


def written(path: pathlib.Path, live: Live, **changes: Any) -> pathlib.Path:
    content = {
        "schema_version": report.SCHEMA_VERSION,
        "models": {"student": {"artifact_sha256": live.built.service.engine.models["turbo"].sha256}},
        "rows": [
            {"model": "student", "steps": 1, "verdict": {"outcome": "PASS"}},
            {"model": "teacher", "steps": 20, "verdict": {"outcome": "FAIL"}},
        ],
        "verdict": "PASS",
        "protocol": {"id": "shapes@1"},
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_a_report_of_the_student_is_shown(live: Live, tmp_path: pathlib.Path) -> None:
    turbo = live.built.service.engine.models["turbo"]
    found = evaluation.find(turbo, written(tmp_path / "report.json", live))
    assert found is not None
    assert (found.verdict, found.protocol, found.steps) == ("PASS", "shapes@1", {"1": "PASS"})


def test_the_report_of_make_evaluate_is_found(
    live: Live, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turbo = live.built.service.engine.models["turbo"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artifact, "resolve", lambda source: tmp_path / "elsewhere" / source)  # not where it is shipped
    assert evaluation.find(turbo, None) is None
    made_here = tmp_path / "runs" / "eval" / "report.json"
    made_here.parent.mkdir(parents=True)
    written(made_here, live)
    found = evaluation.find(turbo, None)
    assert found is not None and found.verdict == "PASS"
    written(made_here, live, models={"student": {"artifact_sha256": "0" * 64}})
    assert evaluation.find(turbo, None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"models": {"student": {"artifact_sha256": "0" * 64}}},
        {"schema_version": -1},
        {"rows": [{}]},
        {"verdict": None},
        {"protocol": None},
    ],
)
def test_another_report_is_refused_where_it_was_named(
    changes: dict[str, Any], live: Live, tmp_path: pathlib.Path
) -> None:
    path = written(tmp_path / "report.json", live, **changes)
    with pytest.raises(ConfigError, match=r"no evaluation of shapes-student@.*eval\.run"):
        evaluation.find(live.built.service.engine.models["turbo"], path)
