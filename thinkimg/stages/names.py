"""Names of the stages, without their imports."""

import ast
from pathlib import Path

OTHERS = ("build", "names", "stage")  # modules of this folder that are no stage


def stage_names() -> dict[str, str]:
    """Return name -> first line of the docstring, for each stage; nothing is imported."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
    return {
        name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
        if name not in OTHERS
    }
