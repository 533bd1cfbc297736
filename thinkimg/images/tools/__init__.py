"""The image tools: every module of this package is one tool, named like the tool, with `Args` and `apply`.

The module's docstring is the tool's description in the system prompt; `apply(image, args, frame)` is a pure function of
full-resolution pixels that returns a new image, or a text, and raises ToolError for what the model can correct.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import ValidationError

from thinkimg.images.coordinates import Frame
from thinkimg.images.tools._base import IMAGE_ARGUMENT, ToolArgs, ToolError, require_acceptable

__all__ = ["IMAGE_ARGUMENT", "TOOLS", "Tool", "ToolResult", "run"]


@dataclass(frozen=True)
class Tool:
    """A tool that the model can call; Args.model_json_schema() is the JSON schema of its arguments."""

    name: str
    description: str
    Args: type[ToolArgs]
    apply: Callable[[Image.Image, Any, Frame], Image.Image | str]

    def signature(self) -> str:
        """The call as shown to the model, e.g. 'apply_sharpen {"factor": number 0..16}'; IMAGE_ARGUMENT is left out."""
        schemas = self.Args.model_json_schema()["properties"].items()
        arguments = ", ".join(f'"{name}": {_describe(schema)}' for name, schema in schemas if name != "image")
        return f"{self.name} {{{arguments}}}"


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: exactly one of image (full resolution), text (not empty) and error (for the model) is there."""

    source: int
    """Index of the image operated on; of the current one where the call did not get as far as naming another."""
    image: Image.Image | None = None
    text: str = ""
    error: str | None = None


def run(
    name: object,
    args: object,
    images: Sequence[Image.Image],
    view_size_of: Callable[[Image.Image], tuple[int, int]],
    allowed: Collection[str] | None = None,
) -> ToolResult:
    """Carry out a tool call as the model wrote it.

    name, args: any JSON values. images: RGB at full resolution, [0] the original, [-1] the current one; left unchanged.
    view_size_of: (width, height) at which the model sees an image. allowed: names of the tools on offer, None for all.
    Never raises for what a model can write: a wrong call is a result with an error.
    """
    current = len(images) - 1
    offered = [known for known in TOOLS if allowed is None or known in allowed]
    if not isinstance(name, str) or name not in offered:
        return ToolResult(current, error=f"There is no tool{_quoted(name)}; on offer: {', '.join(offered) or 'none'}.")
    tool = TOOLS[name]
    if not isinstance(args, dict):
        return ToolResult(current, error=f"{name}: the arguments must be a JSON object; call it as {tool.signature()}.")
    try:
        call = tool.Args.model_validate(args)
    except ValidationError as error:
        return ToolResult(current, error=f"{name}: {_explain(error, tool)}.")
    source = {"original": 0, "current": current}.get(call.image, call.image)
    if not 0 <= source <= current:
        problem = f'"image" must be "current", "original" or an index from 0 to {current}'
        return ToolResult(current, error=f"{name}: {problem}.")
    try:
        output = tool.apply(images[source], call, Frame(images[source].size, view_size_of(images[source])))
        if isinstance(output, str):
            return ToolResult(source, text=output)
        require_acceptable(*output.size, what="the resulting image")
        # An engine may preprocess the view once more, and its aspect can exceed the image's (see view_size).
        require_acceptable(*view_size_of(output), what="the resulting image")
        return ToolResult(source, image=output)
    except ToolError as error:
        return ToolResult(source, error=f"{name}: {error}.")


def _explain(error: ValidationError, tool: Tool) -> str:
    """The most telling of a call's mistakes: an unknown name tells more than the argument that is missing for it."""
    details = error.errors(include_url=False, include_input=False)
    detail = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            names = sorted(tool.Args.model_fields, key="image".__eq__)  # the one that all tools share comes last
            return f"it takes no argument{_quoted(detail['loc'][0])}, only {', '.join(names)}"
        case "missing":
            problem = "is missing"
        case "greater_than_equal":
            problem = f"must be at least {context['ge']:g}"
        case "less_than_equal":
            problem = f"must be at most {context['le']:g}"
        case "literal_error":
            problem = f"must be {context['expected']}"
        case "bool_type":
            problem = "must be true or false"
        case "value_error":
            problem = str(context["error"])
        case _:
            problem = "is not valid"
    argument = detail["loc"][0]
    return f'"{argument}" {problem}' + ("" if argument == "image" else f"; call it as {tool.signature()}")


def _quoted(name: object) -> str:
    """The model's own word, if harmless: errors go back into the conversation, where <|…|> would be a special token."""
    return f' "{name}"' if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) else " of that name"


def _describe(schema: dict[str, Any]) -> str:
    kind = " | ".join(f'"{value}"' for value in schema["enum"]) if "enum" in schema else schema["type"]
    text = {"integer": "int", "boolean": "bool"}.get(kind, kind)
    if "maximum" in schema:
        text += f" {schema['minimum']:g}..{schema['maximum']:g}"
    elif "minimum" in schema:
        text += f" >= {schema['minimum']:g}"
    return text + (f" = {str(schema['default']).lower()}" if "default" in schema else "")


def _discover() -> dict[str, Tool]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: Tool(name, module.__doc__, module.Args, module.apply) for name, module in modules.items()}


TOOLS: dict[str, Tool] = _discover()
"""All tools by name, in alphabetical order."""
