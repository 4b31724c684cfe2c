"""Every error that crosses a boundary.

    TandemError
    |- InvalidRequest            400  the request cannot be served as written
    |  |- UnsupportedField       400  a field that is known and refused, with the reason
    |  |- ContextLengthExceeded  400  prompt (and max_tokens) against the context length
    |  |- CapacityExceeded       400  needs more KV blocks than the worker has in all
    |  `- RequestTooLarge        413  the body against its limit
    |- NotAuthenticated          401
    |- PermissionDenied          403  the key does not allow it
    |- ModelNotFound             404
    |- NotFound                  404
    |- RequestTimeout            408  the request's own deadline
    |- Overloaded                429  queues are full; retry later
    |  `- RateLimited            429  the caller's own limits; says when to come again
    |     `- LargerThanLimit     429  one request alone is larger than a whole window; never again
    |- Cancelled                 499  the client went away
    |- InternalError             500  a defect of ours
    |- Unavailable               503  no worker can take this now
    |  |- WorkerLost             503  the worker died or was cut off
    |  |- WorkerDraining         503  the worker takes nothing new, and hands back what it has not finished
    |  |- StaleIncarnation       503  the call meant an earlier life of the process
    |  |- FingerprintMismatch    503  two processes whose KV is not interchangeable
    |  `- PeerNotAllowed         503  the caller's certificate does not give it that call
    `- ConfigurationError        ---  start-up only: settings, model files, ports

`code` is stable: it is what clients, metrics and the wire see. Servicers turn errors into gRPC status through
`shared/rpc`, the gateway into OpenAI's error shape.
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of the tree.

    Attributes:
        message: For the user: what, where, limits with both numbers.
        param: The request field at fault, if one is.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"  # name of a grpc.StatusCode
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(TandemError):
    """The request cannot be served as written."""

    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """A field that is known and refused; the message gives the reason."""

    code = "unsupported_field"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt plus max_tokens, is longer than the model's context."""

    code = "context_length_exceeded"


class CapacityExceeded(InvalidRequest):
    """The sequence could never fit into the worker's KV cache."""

    code = "capacity_exceeded"


class RequestTooLarge(InvalidRequest):
    """The HTTP body is larger than the gateway reads."""

    code = "request_too_large"
    http_status = 413


class NotAuthenticated(TandemError):
    """No valid API key."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "authentication_error"


class PermissionDenied(TandemError):
    """The API key is valid and does not allow this."""

    code = "permission_denied"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "permission_error"


class ModelNotFound(TandemError):
    """No such model is served here."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "invalid_request_error"


class NotFound(TandemError):
    """No such stored object."""

    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "invalid_request_error"


class RequestTimeout(TandemError):
    """The request's own deadline passed."""

    code = "request_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "timeout_error"


class Overloaded(TandemError):
    """Queues are full."""

    code = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "rate_limit_error"
    retryable = True


class RateLimited(Overloaded):
    """The caller has reached a limit of its own.

    Attributes:
        retry_after_s: When it makes sense to come again.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class LargerThanLimit(RateLimited):
    """One request wants more than the caller's limit allows in a whole window: it will never be served as it is."""

    code = "request_larger_than_rate_limit"
    retryable = False


class Cancelled(TandemError):
    """The caller went away."""

    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class InternalError(TandemError):
    """A defect of ours; the log has the traceback."""


class Unavailable(TandemError):
    """No worker can take the request now."""

    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    retryable = True


class WorkerLost(Unavailable):
    """The worker died or was cut off while it held the session."""

    code = "worker_lost"


class WorkerDraining(Unavailable):
    """The worker is about to end: it takes nothing new, and hands back what it could not finish."""

    code = "worker_draining"


class StaleIncarnation(Unavailable):
    """The call meant an earlier life of this process."""

    code = "stale_incarnation"
    grpc_status = "FAILED_PRECONDITION"


class FingerprintMismatch(Unavailable):
    """The two processes' KV is not interchangeable."""

    code = "fingerprint_mismatch"
    grpc_status = "FAILED_PRECONDITION"


class PeerNotAllowed(Unavailable):
    """The caller's certificate does not give it the right to this call."""

    code = "peer_not_allowed"
    grpc_status = "PERMISSION_DENIED"
    retryable = False


class ConfigurationError(TandemError):
    """The process cannot start as configured."""

    code = "configuration_error"


def error_from_code(code: str, message: str) -> TandemError:
    """Rebuilds an error that crossed the wire; an unknown code becomes `InternalError`."""
    pending: list[type[TandemError]] = [TandemError]
    while pending:
        cls = pending.pop()
        if cls.code == code and cls is not TandemError:
            return cls(message)
        pending.extend(cls.__subclasses__())
    return InternalError(f"{code}: {message}")
