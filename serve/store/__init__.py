"""What the service must remember: a database (SQLite or PostgreSQL) and a folder of pictures (local or S3)."""

from serve.store.errors import StoreError, StoreUnavailable, TooManyJobs, UnknownCursor
from serve.store.images import ImageFolder
from serve.store.records import (
    Cancelled,
    Choice,
    Delivery,
    FinalStatus,
    Idempotent,
    Image,
    Job,
    JobStatus,
    Key,
    Side,
    Swept,
    Usage,
    UsageDay,
    Vote,
    Winner,
)
from serve.store.store import Store

__all__ = [
    "Cancelled",
    "Choice",
    "Delivery",
    "FinalStatus",
    "Idempotent",
    "Image",
    "ImageFolder",
    "Job",
    "JobStatus",
    "Key",
    "Side",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Swept",
    "TooManyJobs",
    "UnknownCursor",
    "Usage",
    "UsageDay",
    "Vote",
    "Winner",
]
