"""Tool that the model can call: its arguments, the signature in the prompt, and the error that the model reads."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from thinkimg.images.coordinates import Box, Frame
from thinkimg.images.decode import ImageLimits, ImageRefused

IMAGE_ARGUMENT = '"image": "current" (default), "original" or the index of an earlier image'
"""Description, for the system prompt, of the argument that every tool takes."""

_LARGEST = 10**9
_KINDS = {
    NoneType: "null",
    bool: "a boolean",
    str: "a string",
    list: "a list",
    dict: "an object",
}  # JSON's, but numbers

_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}  # JSON Schema's


class ToolError(ValueError):
    """Error of a call that can't be carried out; the text tells the model how to correct it."""


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
"""A finite JSON number, not a string or a boolean."""
Whole = Annotated[int, BeforeValidator(_whole)]
"""A JSON number with an integer value: 3 or 3.0."""


class ToolArgs(BaseModel):
    """Arguments that every tool takes; each tool adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image: Annotated[int | Literal["current", "original"], BeforeValidator(_image)] = "current"
    """The image to work on: by name, or by index among the images so far."""


def in_place(args: ToolArgs, view: tuple[int, int]) -> Box:
    """Return the box of the complete source: the `region` of a tool that moves no pixel and leaves none out."""
    return 0, 0, *view


@dataclass(frozen=True)
class Tool:
    """An entry of thinkimg/images/tools, or a user's own module of the same form (see that package's docstring)."""

    name: str
    """Name in the model's calls: the last part of the module's path."""
    description: str
    Args: type[ToolArgs]
    """Its model_json_schema() is the JSON schema of the arguments."""
    apply: Callable[[Image.Image, Any, Frame], Image.Image | str]
    region: Callable[[Any, tuple[int, int]], Box | None] | None = None

    def signature(self) -> str:
        """Return the call as the model reads it, such as 'apply_sharpen {"factor": number 0..16}'.

        It leaves IMAGE_ARGUMENT out.
        """
        schemas = self.Args.model_json_schema()["properties"].items()
        arguments = ", ".join(f'"{name}": {describe_argument(schema)}' for name, schema in schemas if name != "image")
        return f"{self.name} {{{arguments}}}"

    def cut(self, args: Mapping[str, Any], view: tuple[int, int]) -> Box | None:
        """Return the box of its source that a call has cut out, in the model's coordinates.

        args: of a call that gave an image. view: (width, height) of the source in them.
        None for a tool that cuts nothing out or has no box, and for arguments that the tool no longer takes.
        """
        if self.region is None or self.region is in_place:
            return None
        try:
            return self.region(self.Args.model_validate(args), view)
        except ValidationError:
            return None


def require_acceptable(width: int, height: int, what: str) -> None:
    """Check that the model can take an image of width x height pixels. Raises ToolError, in which `what` names it."""
    try:
        ImageLimits().check_size(max(width, 1), max(height, 1))
    except ImageRefused as refused:
        raise ToolError(f"{what} can't be shown, {refused.detail}") from refused


def describe_argument(schema: dict[str, Any]) -> str:
    """Return an argument's type, limits and default as the model reads them: 'number 0..16'. schema: JSON Schema."""
    kind = " | ".join(f'"{value}"' for value in schema["enum"]) if "enum" in schema else schema.get("type", "value")
    text = {"integer": "int", "boolean": "bool"}.get(kind, kind)
    if "minimum" in schema and "maximum" in schema:
        text += f" {schema['minimum']:g}..{schema['maximum']:g}"
    elif bounds := [f"{sign} {schema[limit]:g}" for limit, sign in _LIMITS.items() if limit in schema]:
        text += f" {' and '.join(bounds)}"
    return text + (f" = {json.dumps(schema['default'])}" if "default" in schema else "")
