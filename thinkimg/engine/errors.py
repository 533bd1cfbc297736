"""Errors of the engine."""


class EngineError(RuntimeError):
    """A server did not start, died, refused a request or answered nonsense; `hint` says what to try."""

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(f"{message}\nHint: {hint}" if hint else message)
        self.message = message
        self.hint = hint
