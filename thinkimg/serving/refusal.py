"""Errors of the endpoint in OpenAI's form."""

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error"}


class Refusal(Exception):
    """Request that gets an error. status: of HTTP. param: name in the body. code: OpenAI's, where it has one."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """Return the error's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable() -> Refusal:
    """Return the error for an engine that does not answer now."""
    return Refusal("The engine does not answer; it is asked again by itself.", status=503, code="engine_unavailable")
