"""What the service refuses, each with what HTTP and OpenAI's clients make of it.

ServiceError                 status  OpenAI's exception
├── InvalidField             400     BadRequestError           a field is malformed, out of range, or not the tier's
├── Unauthorized             401     AuthenticationError       no key, or one that is not known
├── Forbidden                403     PermissionDeniedError     the key lacks the scope
├── NotFound                 404     NotFoundError             no such model, job, image or key
├── Conflict                 409     ConflictError             an Idempotency-Key used for another body
├── RateLimited              429     RateLimitError            too many requests; after `retry_after_s`
├── BudgetSpent              429     RateLimitError            the month's budget is spent
├── Overloaded               503     InternalServerError       the queue is full, or the service closes
└── Internal                 500     InternalServerError       ours
"""

import math
from typing import Any, ClassVar

from diffusion_kd import errors


class ServiceError(errors.DiffusionKDError):
    """param: the field that is meant. retry_after_s: when to try again."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after_s = message, param, retry_after_s
        if code is not None:
            self.code = code

    def envelope(self, request_id: str | None = None) -> dict[str, Any]:
        """OpenAI's form. request_id: told where the fault is ours, to be found in the log."""
        message = self.message
        if self.status == 500 and request_id is not None:
            message = f"{message}; the request's id is {request_id}"
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class InvalidField(ServiceError):
    """A field is malformed, out of range, or not honoured by the tier."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ServiceError):
    """No key, or one that is not known."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ServiceError):
    """The key lacks the scope."""

    status, type, code = 403, "permission_error", "missing_scope"


class NotFound(ServiceError):
    """No such model, job, image or key, or not the caller's."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(ServiceError):
    """An Idempotency-Key was used for another body."""

    status, type, code = 409, "invalid_request_error", "idempotency_key_reused"


class RateLimited(ServiceError):
    """The key sends more requests than it may."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class BudgetSpent(ServiceError):
    """The key's budget of this month does not cover the request."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"


class Overloaded(ServiceError):
    """The tier's queue is full, or the service closes."""

    status, type, code = 503, "overloaded_error", "overloaded"


class Internal(ServiceError):
    """Ours: the log has the rest."""
