"""Error class for mistakes that a user can correct."""


class UserError(ValueError):
    """A user's mistake, explained in one sentence.

    message: names the mistake. hint: a way to correct it, or "". `str()` joins the two.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message
