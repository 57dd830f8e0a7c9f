"""What a client is told that went wrong: OpenAI's error object. What is the server's own affair is told by an id only.

What storage, a start or a fault of the program says may hold places, accounts and names that are nobody else's business. It
goes into the log under an id, and the client gets the id.
"""

import logging
import uuid
from typing import Any

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error object. `retry_after_s` becomes the header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def hidden(what: str, error: BaseException, status: int, code: str, retry_after_s: int | None = None) -> ApiError:
    """Logs an error under an id, and gives what a client is told of it: what failed, and the id."""
    error_id = uuid.uuid4().hex[:12]
    log.warning("%s, error %s: %s: %s", what, error_id, type(error).__name__, error)
    return ApiError(status, f"{what}: the server's log says why, under {error_id}", code=code, retry_after_s=retry_after_s)
