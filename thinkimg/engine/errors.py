"""Errors of the engine."""

REFUSED = (400, 413, 422)
"""HTTP statuses that refuse this one request (too large, say); with any other a server would refuse all."""


class EngineError(RuntimeError):
    """Failure of a server: it did not start, died, refused a request or answered nonsense. `hint` says what to try."""

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(f"{message}\nHint: {hint}" if hint else message)
        self.message = message
        self.hint = hint
