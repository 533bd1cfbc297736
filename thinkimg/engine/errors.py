"""Errors of the engine."""

from thinkimg.redaction import without_password

REFUSED = (400, 413, 422)
"""HTTP statuses that refuse this one request (too large, say); with any other a server would refuse all."""


class EngineError(RuntimeError):
    """Failure of a server: it did not start, died, refused a request or answered nonsense. `hint` says what to try.

    Passwords in addresses are left out: messages go to logs, and into rows that failed.
    """

    def __init__(self, message: str, *, hint: str = ""):
        self.message, self.hint = without_password(message), without_password(hint)
        super().__init__(f"{self.message}\nHint: {self.hint}" if hint else self.message)
