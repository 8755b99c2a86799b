"""Every error that LServe raises on purpose.

LServeError
├── InvalidRequestError        the caller's input is wrong (HTTP 400)
│   └── PromptTooLongError     the prompt does not fit the model or the pool (HTTP 413)
├── AuthenticationError        missing or wrong API key (HTTP 401)
├── ModelNotFoundError         no such served model (HTTP 404)
├── CapacityError              full now, try again later (HTTP 429)
├── DeadlineExceededError      a stage took longer than its deadline (HTTP 504)
├── WorkerLostError            a worker went away and retries are used up (HTTP 503)
├── LeaseLostError             a lease expired or belongs to another generation; the pull does not count
├── TransferError              pages could not be moved between workers
├── FormatMismatchError        a page or a profile of another format_id; refused, never reinterpreted
├── UnsupportedModelError      the checkpoint has a feature that the model code does not implement
└── SettingsError              a wrong key or value in the settings
"""


class LServeError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line that names the offending value.

    `status_code` is the HTTP status that the router answers with; `param` names the request field, where there is one.
    """

    status_code = 500
    error_type = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(kind: type[LServeError], fields: dict[str, object]) -> LServeError:
    """An error as it was in another process, whatever its constructor takes."""
    error = kind.__new__(kind, fields["message"])
    error.args = (fields["message"],)
    error.__dict__.update(fields)
    return error


class InvalidRequestError(LServeError):
    """The caller's input is wrong."""

    status_code = 400
    error_type = "invalid_request_error"


class PromptTooLongError(InvalidRequestError):
    """The prompt, with the room asked for the answer, does not fit."""

    status_code = 413


class AuthenticationError(LServeError):
    """Missing or wrong API key."""

    status_code = 401
    error_type = "authentication_error"


class ModelNotFoundError(LServeError):
    """No such served model."""

    status_code = 404
    error_type = "not_found_error"


class CapacityError(LServeError):
    """Full now; `retry_after_s` says when to try again."""

    status_code = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(LServeError):
    """A stage took longer than its deadline."""

    status_code = 504
    error_type = "timeout_error"


class WorkerLostError(LServeError):
    """A worker went away and the retry budget is used up."""

    status_code = 503
    error_type = "service_unavailable_error"


class LeaseLostError(LServeError):
    """A lease expired or belongs to another generation: what was pulled under it does not count."""

    status_code = 503
    error_type = "service_unavailable_error"


class TransferError(LServeError):
    """Pages could not be moved between workers."""

    status_code = 503
    error_type = "service_unavailable_error"


class FormatMismatchError(LServeError):
    """A page, tail row or profile whose format differs from this worker's."""


class UnsupportedModelError(LServeError):
    """The checkpoint has a field or feature that the model code does not implement; the message names it."""


class SettingsError(LServeError):
    """A wrong key or value in the settings; the message names both."""
