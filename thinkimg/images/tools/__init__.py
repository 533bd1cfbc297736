"""Image tools: every module of this folder is one tool, named like the tool.

    docstring    the tool's description in the system prompt
    Args         a ToolArgs with the tool's own arguments. Positions are in the model's coordinates: pixels of the image
                 as the model sees it, or thousandths of its sides; so the docstring names no unit of them.
    apply        (image, args, frame) -> a new RGB image, or a text: a pure function of full-resolution pixels.
                 `frame` maps positions to them. It raises ToolError for a mistake that the model can correct.
    region       (args, view) -> the box of its source that the image shows, in the model's coordinates, in which the
                 source's (width, height) is `view`. `region = in_place` for a tool that moves no pixel. None, or no
                 `region`, where no box says what the image shows (rotated, mirrored, put together), or the tool gives a
                 text.

A module of this form in a user's own project is a tool as well, by its import path or an entry point `thinkimg.tools`.
"""
