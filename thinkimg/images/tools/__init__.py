"""The image tools: every module of this folder is one tool, named like the tool.

    docstring    the tool's description in the system prompt
    Args         a ToolArgs with the tool's own arguments
    apply        (image, args, frame) -> a new RGB image, or a text. A pure function of full-resolution pixels; raises
                 ToolError for what the model can correct. Arguments are pixels of the image as the model sees it.
    region       (args, view) -> the part of its source that the image shows: a box in pixels of the view, whose size
                 (width, height) `view` is. `region = in_place` says that every pixel stays where it is. None, or no
                 region, says that no box tells: rotated, mirrored, put together. A tool that gives a text has none.

A module of this form in a user's own project is a tool as well, by its import path or an entry point `thinkimg.tools`.
"""
