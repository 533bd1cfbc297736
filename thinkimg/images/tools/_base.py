"""What the tools share: argument types that explain themselves to a model, and the error that goes back to it."""

from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from thinkimg.images.decode import ImageLimits, ImageRefused

IMAGE_ARGUMENT = '"image": "current" (default), "original" or the index of an earlier image'
"""The argument that every tool takes, for the system prompt."""

_LARGEST = 10**9
_KINDS = {
    NoneType: "null",
    bool: "a boolean",
    str: "a string",
    list: "a list",
    dict: "an object",
}  # JSON's, but numbers


class ToolError(ValueError):
    """A call that can't be carried out; the text tells the model how to correct it."""


def _number(value: Any) -> int | float:
    if type(value) in _KINDS:
        raise ValueError(f"must be a number, not {_KINDS[type(value)]}")
    if not abs(value) <= _LARGEST:  # written so that NaN fails, too
        raise ValueError(f"must be a finite number of at most {_LARGEST:g}")
    return value


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("must be a whole number")
    return int(number)


def _image(value: Any) -> int | str:
    if value == "current" or value == "original":
        return value
    try:
        return _whole(value)
    except ValueError:
        raise ValueError('must be "current", "original" or the index of an earlier image') from None


Number = Annotated[float, BeforeValidator(_number)]
"""A finite JSON number. Strings and booleans are none."""
Whole = Annotated[int, BeforeValidator(_whole)]
"""A JSON number with an integer value: 3 or 3.0."""


class ToolArgs(BaseModel):
    """The arguments that every tool takes; each tool adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image: Annotated[int | Literal["current", "original"], BeforeValidator(_image)] = "current"
    """The image to work on: by name, or by index among the images so far."""


def require_acceptable(width: int, height: int, what: str) -> None:
    """Raises ToolError if the model can't take an image of width x height pixels; `what` names it in the text."""
    try:
        ImageLimits().check_size(max(width, 1), max(height, 1))
    except ImageRefused as refused:
        raise ToolError(f"{what} can't be shown, {refused.detail}") from refused
