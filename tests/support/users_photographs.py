"""A folder of pictures with questions in JSONL, as a user has them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def photographs(folder: Path) -> list[str]:
    """Write them; returns the overrides that name them."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": f"What is number {i}?", "answer": f"thing {i}"}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return ["data.source=jsonl", f"data.path={folder / 'questions.jsonl'}", "data.held_out_share=0.34"]
