"""The exceptions of a request: InputError where it is at fault, Refusal where the service cannot now, and Departed."""

import math

STATUS_OF_CODE = {
    "empty": 400,
    "missing_image": 400,
    "several_images": 400,
    "truncated": 400,
    "invalid_body": 400,
    "unauthorized": 401,
    "url_input_off": 403,
    "control_off": 403,
    "unknown_model": 404,
    "not_acceptable": 406,
    "upload_too_slow": 408,
    "too_many_bytes": 413,
    "too_many_pixels": 413,
    "not_an_image": 415,
    "unsupported": 415,
    "unknown_option": 422,
    "invalid_option": 422,
    "contradicting_options": 422,
    "too_detailed": 422,
    "url_refused": 422,
    "url_failed": 422,
    "overloaded": 429,
    "not_implemented": 501,
    "starting": 503,
    "draining": 503,
    "unloaded": 503,
    "model_failed": 503,
    "device_failed": 503,
    "deadline_passed": 504,
}


class ServiceError(Exception):
    """`code` is a stable word for programs, `message` one sentence for people, `status` the HTTP status."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return STATUS_OF_CODE[self.code]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the error."""
        return {"WWW-Authenticate": "Bearer"} if self.code == "unauthorized" else {}


class InputError(ServiceError):
    """What the caller sent cannot be used; sending it again will not help."""


class Refusal(ServiceError):
    """The service cannot answer now; `retry_after` is when asking again may help, in seconds, None where unknown."""

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(code, message)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, at least one."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class Departed(Exception):
    """The caller has left: the work is dropped, and there is nobody to answer."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
