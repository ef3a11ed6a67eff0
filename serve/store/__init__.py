"""What the service must remember: a database (SQLite or PostgreSQL) and a folder of pictures (local or S3)."""

from serve.store.errors import StoreError, StoreUnavailable, TooManyJobs, UnknownCursor
from serve.store.images import ImageFolder
from serve.store.records import (
    Cancelled,
    Delivery,
    FinalStatus,
    Idempotent,
    Image,
    Job,
    JobStatus,
    Key,
    Swept,
    Usage,
    UsageDay,
)
from serve.store.store import Store

__all__ = [
    "Cancelled",
    "Delivery",
    "FinalStatus",
    "Idempotent",
    "Image",
    "ImageFolder",
    "Job",
    "JobStatus",
    "Key",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Swept",
    "TooManyJobs",
    "UnknownCursor",
    "Usage",
    "UsageDay",
]
