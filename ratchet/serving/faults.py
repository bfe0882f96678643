"""Turn errors into what OpenAI's clients read: an HTTP status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import msgspec

from ratchet.errors import BusyError, RatchetError, ServiceError, UserError

CANCELLED = 499  # nginx's status for a client that hung up; it is logged, and never sent
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(RatchetError):
    """An error that is sent as the answer to a request.

    `param` names the field of the body, `retry_after` is in whole seconds, and `hangs_up` closes the
    connection without reading the rest of the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        remedy: str = "",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        hangs_up: bool = False,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.status, self.param, self.code = status, param, code
        self.retry_after, self.hangs_up = retry_after, hangs_up

    @property
    def message(self) -> str:
        """Return the error's text in one line."""
        return " ".join(str(self).split())

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        retry = [(b"retry-after", b"%d" % self.retry_after)] if self.retry_after is not None else []
        return [*retry, (b"connection", b"close")] if self.hangs_up else retry


def to_fault(error: Exception) -> Fault:
    """Return the fault that the client gets; details of an unforeseen error stay in the log."""
    match error:
        case Fault():
            return error
        case BusyError():
            return Fault(429, str(error), code="busy", retry_after=1)
        case ServiceError():
            return Fault(502, str(error), code="engine_failed")
        case UserError():
            return Fault(400, str(error))
        case _:
            return Fault(
                500,
                "the gateway failed in a way that was not foreseen",
                remedy="its log (.ratchet/logs/gateway.log) has the traceback",
                code="internal",
            )
