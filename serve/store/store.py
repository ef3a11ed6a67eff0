"""All that the service must remember, in one database."""

from serve.store import deliveries, idempotency, image_rows, jobs, keys, sweep, usage, votes


class Store(
    keys.Keys,
    usage.UsageBook,
    idempotency.Idempotency,
    jobs.Jobs,
    deliveries.Deliveries,
    image_rows.Images,
    votes.Votes,
    sweep.Sweep,
):
    """Keys, usage, idempotency, jobs, webhook deliveries, images and votes.

    Synchronous and safe to use from many threads; each method is one short transaction (`sweep`: several).
    All methods raise StoreUnavailable when the database does not answer.
    """
