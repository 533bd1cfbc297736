"""Tools on offer in a conversation, by the names in the model's calls; and the execution of a call."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from PIL import Image
from pydantic import ValidationError

from thinkimg.errors import UserError
from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Tool, ToolArgs, ToolError, require_acceptable
from thinkimg.records import Coordinates
from thinkimg.registry import Registry, short_name

TOOLS = Registry("tools", "thinkimg.images.tools")
PROBLEMS = {
    "missing": "is missing",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "value_error": "{error}",
}
"""Type of a pydantic error -> its text for the model."""


@cache
def load_tools(names: tuple[str, ...] | None = None) -> Mapping[str, Tool]:
    """Return the tools that `conversation.tools` names, by the names in the model's calls, in that order.

    names: names of shipped tools and of entry points, import paths of a user's own modules; None for all shipped tools.
    Raises UserError for an unknown name, for two tools of one name, and for a module that is no tool.
    """
    tools: dict[str, Tool] = {}
    for path in TOOLS.shipped if names is None else names:
        tool = _tool(path)
        if tool.name in tools or (tool.name != path and tool.name in TOOLS.shipped):
            raise UserError(
                f"The name '{tool.name}' of the tool {path} is taken.",
                hint="List each tool once, and give a module of your own another name than thinkimg's tools have.",
            )
        tools[tool.name] = tool
    return MappingProxyType(tools)


def user_sources(names: tuple[str, ...] | None) -> dict[str, str]:
    """Return name -> sha256 of the module's file for each of a user's own tools, for a stage's fingerprint."""
    return TOOLS.sources(names or ())


def _tool(path: str) -> Tool:
    module = TOOLS[path]
    name, arguments, apply = short_name(path), getattr(module, "Args", None), getattr(module, "apply", None)
    parts = {
        "a docstring": bool(module.__doc__),
        "Args (a ToolArgs)": isinstance(arguments, type) and issubclass(arguments, ToolArgs),
        "apply": callable(apply),
    }
    if missing := [part for part, is_defined in parts.items() if not is_defined]:
        raise UserError(
            f"The module {module.__name__} is no tool: it lacks {' and '.join(missing)}.",
            hint="Take thinkimg/images/tools/crop_image.py as an example.",
        )
    return Tool(name, module.__doc__, arguments, apply, getattr(module, "region", None))


@dataclass(frozen=True)
class ToolResult:
    """Outcome of a call: exactly one of image (full resolution), text (not empty) and error (for the model) is set."""

    source: int
    """Index of the image that the tool worked on; the current one where the call names none."""
    image: Image.Image | None = None
    text: str = ""
    error: str | None = None


def run_tool(
    name: object,
    args: object,
    images: Sequence[Image.Image],
    view_size_of: Callable[[Image.Image], tuple[int, int]],
    tools: Mapping[str, Tool] | None = None,
    coordinates: Coordinates = Coordinates.PIXELS,
) -> ToolResult:
    """Carry out a tool call as the model wrote it.

    name, args: any JSON values. images: RGB at full resolution, [0] the original, [-1] the current one; not changed.
    view_size_of: (width, height) in pixels at which the model sees an image. tools: on offer; None for all shipped
    tools. coordinates: unit of positions in the arguments.
    A wrong call is a result with an error; no text of the model raises. Raises TypeError for a broken tool.
    """
    current = len(images) - 1
    tools = load_tools() if tools is None else tools
    if not isinstance(name, str) or name not in tools:
        offered = ", ".join(sorted(tools)) or "none"
        return ToolResult(current, error=f"There is no tool{_quoted(name)}; on offer: {offered}.")
    tool = tools[name]
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
        frame = Frame(images[source].size, view_size_of(images[source]), coordinates)
        output = tool.apply(images[source], call, frame)
        if isinstance(output, str) and output:
            return ToolResult(source, text=output)
        if not isinstance(output, Image.Image) or output.mode != "RGB":
            raise TypeError(f"a tool gives an RGB image or a text, and {name} gave {output!r}")
        require_acceptable(*output.size, what="the resulting image")
        # An engine may preprocess the view once more, and its aspect can exceed the image's (see view_size).
        require_acceptable(*view_size_of(output), what="the resulting image")
        return ToolResult(source, image=output)
    except ToolError as error:
        return ToolResult(source, error=f"{name}: {error}.")


def _explain(error: ValidationError, tool: Tool) -> str:
    """Return the most useful of a call's mistakes: an unknown name before the argument that is missing for it."""
    details = error.errors(include_url=False, include_input=False)
    detail = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    if detail["type"] == "extra_forbidden":
        names = sorted(tool.Args.model_fields, key="image".__eq__)  # the one that all tools share comes last
        return f"it takes no argument{_quoted(detail['loc'][0])}, only {', '.join(names)}"
    problem = PROBLEMS.get(detail["type"], "is not valid").format_map(detail.get("ctx", {}))
    if not detail["loc"]:  # a validator of several arguments
        return f"{problem}; call it as {tool.signature()}"
    argument = detail["loc"][0]
    return f'"{argument}" {problem}' + ("" if argument == "image" else f"; call it as {tool.signature()}")


def _quoted(name: object) -> str:
    """Return the model's own word, if harmless: errors enter the conversation, where <|…|> would be a special token."""
    return f' "{name}"' if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) else " of that name"
