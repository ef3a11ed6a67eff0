"""What the store refuses, beside ConfigError for a URL that cannot be used.

StoreError (a DiffusionKDError)
├── TooManyJobs            as many jobs are queued as may be
├── UnknownCursor          a page was asked for after a job that is not there
└── StoreUnavailable       the database does not answer, or is locked for too long; a later try may succeed
"""

from diffusion_kd import errors


class StoreError(errors.DiffusionKDError):
    """Root of what the store refuses."""


class TooManyJobs(StoreError):
    """As many jobs are queued as may be."""


class UnknownCursor(StoreError):
    """A page was asked for after a job that is not there: never was, is another key's, or was swept."""


class StoreUnavailable(StoreError):
    """The database does not answer, or is locked for too long; a later try may succeed."""
