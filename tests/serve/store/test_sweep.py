"""What a sweep deletes, and above all what it does not."""

import datetime
import logging
from typing import Any

import pytest
import sqlalchemy

from serve import store as store_module
from serve.store import sweep, tables

HOUR = datetime.timedelta(hours=1)


def _ids(store: store_module.Store, table: Any, column: str = "id") -> list[str]:
    with store._reading() as session:
        return sorted(session.scalars(sqlalchemy.select(getattr(table, column))))


def _image(store: store_module.Store, key_id: str, name: str, expires_at: Any, job_id: str | None = None) -> None:
    created_at = expires_at - HOUR
    store.add_image(store_module.Image(name, key_id, job_id, f"{name}.png", "image/png", created_at, expires_at))


def _job(store: store_module.Store, key_id: str, name: str) -> None:
    store.add_job(name, key_id, {}, "https://example.com", most_queued=None)


def test_one_of_everything_on_each_side_of_the_line(store: store_module.Store, key_id: str, clock: Any) -> None:
    revoked, _ = store.create_key("revoked", [], None, None)
    store.revoke_key(revoked.id)
    store.record_usage(store_module.Usage(key_id, "turbo", 1, 1.0, 1, 1, clock.time - 10_000 * HOUR))
    for name in ("old_running", "old_queued", "old_succeeded", "old_failed", "young"):
        _job(store, key_id, name)
        clock.forward(1)
    _job(store, key_id, "old_cancelled")
    store.cancel_job("old_cancelled", None)
    store.claim_jobs("a", 1, 1e9)  # old_running
    store.begin_idempotent(key_id, "old_answered", "h", "a", 1, 3600)
    store.complete_idempotent(key_id, "old_answered", "a", {})
    store.begin_idempotent(key_id, "old_running", "h", "a", 1e9, 3600)
    store.begin_idempotent(key_id, "young", "h", "a", 1, 3601)
    jobs = {job.id: job for job in store.claim_jobs("b", 4, 1e9)}
    assert jobs.keys() == {"old_queued", "old_succeeded", "old_failed", "young"}
    store.finish_job("old_succeeded", "b", "succeeded", {}, None, None, [])
    store.finish_job("old_failed", "b", "failed", None, {}, None, [])
    sent, *_ = store.claim_deliveries("a", 1, 1)
    store.delivery_done(sent.id)
    start = clock.time
    clock.forward(0.001)
    store.finish_job("young", "b", "succeeded", {}, None, None, [])
    store.release_jobs("b")  # old_queued
    now = clock.forward((start + HOUR - clock.time).total_seconds())
    _image(store, key_id, "expired", now)
    _image(store, key_id, "expired_of_young", now - 1000 * HOUR, "young")
    _image(store, key_id, "kept", now + datetime.timedelta(microseconds=1))
    _image(store, key_id, "kept_of_old", now + HOUR, "old_succeeded")

    files: list[str] = []
    swept = store.sweep(jobs_older_than=HOUR, delete_file=files.append)
    assert swept == store_module.Swept(images=2, jobs=3, idempotency=2, deliveries=3)
    assert sorted(files) == ["expired.png", "expired_of_young.png"]
    assert _ids(store, tables.ImageRow) == ["kept", "kept_of_old"]
    assert _ids(store, tables.JobRow) == ["old_queued", "old_running", "young"]
    assert _ids(store, tables.DeliveryRow, "job_id") == ["young"]
    assert _ids(store, tables.IdempotencyRow, "idempotency_key") == ["young"]
    assert _ids(store, tables.KeyRow) == sorted([key_id, revoked.id])
    assert _ids(store, tables.UsageRow, "key_id") == [key_id]
    orphan = store.get_image("kept_of_old")
    assert orphan is not None and orphan.job_id is None
    assert store.sweep(jobs_older_than=HOUR, delete_file=files.append) == store_module.Swept(0, 0, 0, 0)


def test_without_an_age_jobs_stay(store: store_module.Store, key_id: str, clock: Any) -> None:
    _job(store, key_id, "job")
    store.cancel_job("job", None)
    clock.forward(1e9)
    assert store.sweep(jobs_older_than=None, delete_file=print) == store_module.Swept(0, 0, 0, 0)
    assert _ids(store, tables.JobRow) == ["job"] and len(_ids(store, tables.DeliveryRow)) == 1


def test_the_file_goes_before_the_row(store: store_module.Store, key_id: str, clock: Any) -> None:
    _image(store, key_id, "img", clock.time)
    seen: list[list[str]] = []
    store.sweep(jobs_older_than=None, delete_file=lambda _: seen.append(_ids(store, tables.ImageRow)))
    assert seen == [["img"]]


def test_a_file_that_stays_keeps_its_row_and_holds_nothing_up(
    store: store_module.Store, key_id: str, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        _image(store, key_id, name, clock.time)

    def delete(path: str) -> None:
        if path == "b.png":
            raise PermissionError("read-only")
        raise FileNotFoundError(path)

    with caplog.at_level(logging.WARNING):
        assert store.sweep(jobs_older_than=None, delete_file=delete).images == 2
    assert _ids(store, tables.ImageRow) == ["b"] and store.get_image("b") is None
    assert "b.png cannot be deleted yet: read-only" in caplog.text and "a.png" not in caplog.text
    assert store.sweep(jobs_older_than=None, delete_file=lambda _: None).images == 1


def test_a_defect_of_the_caller_is_not_swallowed(store: store_module.Store, key_id: str, clock: Any) -> None:
    _image(store, key_id, "img", clock.time)

    def delete(path: str) -> None:
        raise ValueError(path)

    with pytest.raises(ValueError, match=r"img\.png"):
        store.sweep(jobs_older_than=None, delete_file=delete)
    assert _ids(store, tables.ImageRow) == ["img"]


def test_an_image_that_was_renewed_meanwhile_stays(store: store_module.Store, key_id: str, clock: Any) -> None:
    _image(store, key_id, "img", clock.time)
    swept = store.sweep(jobs_older_than=None, delete_file=lambda _: _image(store, key_id, "img", clock.time + HOUR))
    assert swept.images == 0 and store.get_image("img") is not None


def test_batches_do_not_change_the_outcome(
    store: store_module.Store, key_id: str, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_BATCH", 2)
    for index in range(5):
        _job(store, key_id, f"job{index}")
        store.cancel_job(f"job{index}", None)
        _image(store, key_id, f"img{index}", clock.time, f"job{index}")
        store.begin_idempotent(key_id, f"n{index}", "h", "a", 1, 60)
    clock.forward(60)
    swept = store.sweep(jobs_older_than=datetime.timedelta(seconds=60), delete_file=lambda _: None)
    assert swept == store_module.Swept(5, 5, 5, 5)


def test_two_sweeps_at_once_delete_everything_once(
    store: store_module.Store, other_store: store_module.Store, key_id: str, clock: Any, race: Any
) -> None:
    for index in range(10):
        _job(store, key_id, f"job{index}")
        store.cancel_job(f"job{index}", None)
        _image(store, key_id, f"img{index}", clock.time)
        store.begin_idempotent(key_id, f"n{index}", "h", "a", 1, 60)
    clock.forward(60)
    found = race(
        lambda index: (store, other_store)[index].sweep(
            jobs_older_than=datetime.timedelta(0), delete_file=lambda _: None
        ),
        2,
    )
    for name in ("images", "jobs", "idempotency", "deliveries"):
        assert sum(getattr(swept, name) for swept in found) == 10
