"""Tickets: the first outcome stands, previews come before it, what a request took is summed."""

import pytest

from serve.engine import errors
from serve.engine.requests import Compute, Ticket
from tests.serve.engine import doubles


def ticket(count: int = 1, **options: object) -> Ticket:
    shown: list[tuple[int, int, bytes]] = options.get("shown", [])  # type: ignore[assignment]
    cancelled: list[int] = options.get("cancelled", [])  # type: ignore[assignment]
    return Ticket(
        doubles.request(seeds=tuple(range(count))),
        lambda *preview: shown.append(preview),
        lambda: cancelled.append(1),
    )


def test_images_come_in_the_order_of_their_seeds() -> None:
    three = ticket(3)
    for index in (2, 0, 1):
        assert not three.over
        three.deliver(index, bytes([index]))
    assert three.over
    assert three.result(0).files == (b"\0", b"\1", b"\2")


def test_what_the_images_took_is_summed_and_the_longest_wait_counts() -> None:
    two = ticket(2)
    two.shares[0].add(Compute(text_s=1, denoise_s=2, decode_s=3, encode_s=4, queue_s=5))
    two.deliver(0, b"")
    assert two.taken.device_s == 6
    two.shares[1].add(Compute(text_s=10, denoise_s=20, decode_s=30, encode_s=40, queue_s=4))
    two.deliver(1, b"")
    assert two.result(0).compute == Compute(text_s=11, denoise_s=22, decode_s=33, encode_s=44, queue_s=5)
    assert two.result(0).compute.device_s == 66


def test_the_first_outcome_stands() -> None:
    done, failed = ticket(), ticket()
    done.deliver(0, b"file")
    done.fail(errors.Failed("late"))
    done.cancel()
    assert done.result(0).files == (b"file",)
    failed.fail(errors.NotFinite("early"))
    failed.deliver(0, b"file")
    failed.cancel()
    with pytest.raises(errors.NotFinite, match="early"):
        failed.result(0)


def test_a_ticket_that_is_cancelled_twice_is_cancelled() -> None:
    cancelled: list[int] = []
    twice = ticket(cancelled=cancelled)
    twice.cancel()
    twice.cancel()
    assert cancelled
    with pytest.raises(errors.Cancelled):
        twice.result(0)


def test_nobody_but_cancel_takes_a_request_back() -> None:
    """asyncio cancels the futures that it wraps; such a ticket must not look done to the engine."""
    one = ticket()
    assert not one.future.cancel()
    assert not one.over


def test_no_preview_after_the_result() -> None:
    shown: list[tuple[int, int, bytes]] = []
    one = ticket(shown=shown)
    one.preview(0, 0, b"early")
    one.deliver(0, b"file")
    one.preview(0, 1, b"late")
    assert shown == [(0, 0, b"early")]


def test_guidance_takes_a_second_row() -> None:
    assert [doubles.request(guidance_scale=scale).rows for scale in (0.0, 1.0, 1.5)] == [1, 1, 2]
