"""The names of the stages, for those who must not wait for their imports."""

import ast
import pkgutil
from pathlib import Path

OTHERS = ("names", "stage")  # modules of this folder that are no box


def stage_names() -> dict[str, str]:
    """Name of each box's module -> the first line of its docstring; nothing is imported."""
    folder = Path(__file__).parent
    modules = [found.name for found in pkgutil.iter_modules([str(folder)]) if found.name not in OTHERS]
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in modules}
    return {name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0] for name, text in texts.items()}
