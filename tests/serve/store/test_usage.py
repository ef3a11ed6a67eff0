"""Sums of what was used."""

import datetime

from serve import store as store_module

UTC = datetime.UTC


def _usage(key_id: str, at: datetime.datetime, cost_nanousd: int, tier: str = "turbo") -> store_module.Usage:
    return store_module.Usage(key_id, tier, 2, 12.5, cost_nanousd, 10 * cost_nanousd, at)


def test_sums_go_by_utc_day_and_tier(store: store_module.Store, key_id: str) -> None:
    other, _ = store.create_key("other", [], None, None)
    west = datetime.timezone(datetime.timedelta(hours=-8))
    for at, cost, tier in [
        (datetime.datetime(2026, 5, 30, 23, 59, tzinfo=UTC), 1, "turbo"),
        (datetime.datetime(2026, 5, 30, 16, 0, tzinfo=west), 2, "turbo"),  # midnight of the 31st in UTC
        (datetime.datetime(2026, 5, 31, 12, 0, tzinfo=UTC), 3, "turbo"),
        (datetime.datetime(2026, 5, 31, 12, 0, tzinfo=UTC), 5, "premium"),
        (datetime.datetime(2026, 6, 1, 0, 0, tzinfo=UTC), 7, "turbo"),
    ]:
        store.record_usage(_usage(key_id, at, cost, tier))
    store.record_usage(_usage(other.id, datetime.datetime(2026, 5, 31, tzinfo=UTC), 100))
    last_of_may = datetime.date(2026, 5, 31)
    assert store.usage_days(key_id, last_of_may, last_of_may) == [
        store_module.UsageDay(last_of_may, "premium", 1, 2, 12.5, 5, 50),
        store_module.UsageDay(last_of_may, "turbo", 2, 4, 25.0, 5, 50),
    ]
    whole = store.usage_days(key_id, datetime.date(2026, 5, 1), datetime.date(2026, 6, 1))
    assert [(day.day.day, day.cost_nanousd) for day in whole] == [(30, 1), (31, 5), (31, 5), (1, 7)]


def test_what_was_spent_is_exact_and_counts_from_a_time_on(store: store_module.Store, key_id: str) -> None:
    start = datetime.datetime(2026, 6, 1, tzinfo=UTC)
    store.record_usage(_usage(key_id, start - datetime.timedelta(microseconds=1), 1_000))
    store.record_usage(_usage(key_id, start, 2**59 + 1))  # as a float this would lose the 1
    store.record_usage(_usage(key_id, start, 2))
    spent = store.spent_nanousd(key_id, start)
    assert spent == 2**59 + 3 and type(spent) is int
    assert store.spent_nanousd(key_id, start - datetime.timedelta(seconds=1)) == 2**59 + 1_003
    assert store.spent_nanousd("nobody", start) == 0
