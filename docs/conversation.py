"""Draw one trajectory of a store as docs/conversation.png: question, turns, images of the tools, rewards.

python docs/conversation.py 09f00b2d8232dd85-5 --store artifacts
"""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

from cyclopts import run
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from thinkimg.analysis.explain import explain_reward, find_trajectory
from thinkimg.config.load import load_config
from thinkimg.records import Coordinates
from thinkimg.store.artifacts import Store

WIDTH, GAP, PADDING = 1680, 56, 22  # pixels; GitHub shows a README at half of that
INK, GREY, LINE, TRACK, BLUE, GREEN, FRAME = [
    "#1f2328",
    "#59636e",
    "#d1d9e0",
    "#f6f8fa",
    "#0969da",
    "#1a7f37",
    "#fb8f44",
]
SANS, BOLD, MONO = (findfont(name) for name in ("DejaVu Sans", "DejaVu Sans:bold", "DejaVu Sans Mono"))


class Canvas:
    """A white picture."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 3000), "white")
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: int, top: int, right: int, bottom: int) -> None:
        self.draw.rounded_rectangle((left, top, right, bottom), 14, outline=LINE, width=3)

    def arrow(self, x: int, y: int) -> None:
        self.draw.line((x - 18, y, x + 10, y), BLUE, 5)
        self.draw.polygon([(x + 20, y), (x + 4, y - 12), (x + 4, y + 12)], BLUE)


class Column:
    """Text and images on a canvas, from the top down."""

    def __init__(self, canvas: Canvas, left: int, top: int, right: int):
        self.canvas, self.x, self.y, self.width = canvas, left + PADDING, top + PADDING, right - left - 2 * PADDING

    def text(self, text: str, font: str = SANS, size: int = 26, color: str = INK, space: int = 12) -> None:
        face = ImageFont.truetype(font, size)
        characters = int(self.width / face.getlength("abcdefghij mnopqrst") * 19)
        for line in wrap(text, characters):
            self.canvas.draw.text((self.x, self.y), line, color, face)
            self.y += int(size * 1.35)
        self.y += space

    def picture(self, picture: Image.Image, frame: tuple[float, float, float, float] | None = None) -> None:
        """frame: x, y, width, height in pixels of the picture."""
        scale = self.width / max(picture.size)
        large = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.NEAREST)
        self.canvas.image.paste(large, (self.x, self.y))
        if frame:
            x, y, width, height = (round(edge * scale) for edge in frame)
            corners = (self.x + x, self.y + y, self.x + x + width, self.y + y + height)
            self.canvas.draw.rectangle(corners, outline=FRAME, width=6)
        self.y += large.height + 18


def draw(
    trajectory: str, /, *, store: Path = Path("artifacts"), out: Path = Path(__file__).parent / "conversation.png"
) -> None:
    """Draw a trajectory, by the beginning of its id."""
    artifacts = Store(store)
    scores, name, _ = find_trajectory(artifacts, trajectory)
    rollout = explain_reward(artifacts, scores, name, load_config("tiny"))
    canvas = Canvas()
    bottom = draw_turns(canvas, rollout, seen_images(artifacts, rollout))
    bottom = draw_rewards(canvas, rollout, bottom + 34)
    canvas.image.crop((0, 0, WIDTH, bottom + 4)).save(out, optimize=True)


def seen_images(store: Store, rollout: dict[str, Any]) -> list[Image.Image]:
    """Return the images of a conversation at the size at which the model saw them."""
    rollouts = store.resolve(rollout["artifacts"]["rollouts"], "rollouts")
    images = rollouts.images(store.origin(rollouts, "dataset"))
    return [
        images.decoded(entry["sha256"]).resize((entry["seen_width"], entry["seen_height"]), Image.Resampling.BICUBIC)
        for entry in rollout["images"]
    ]


def draw_turns(canvas: Canvas, rollout: dict[str, Any], pictures: list[Image.Image]) -> int:
    """Draw question, turns and images of the tools side by side. Return the lower edge."""
    sizes = [describe_size(entry, picture) for entry, picture in zip(rollout["images"], pictures, strict=True)]
    frame = find_crop(rollout, pictures[0])

    def question(column: Column) -> None:
        column.picture(pictures[0], frame)
        column.text(rollout["question"], BOLD)
        column.text(", ".join(rollout["choices"]) + "?")
        column.text(sizes[0], size=22, color=GREY)

    cards: list[tuple[str, Callable[[Column], None]]] = [("Question", question)]
    shown = 0
    for number, turn in enumerate(rollout["turns"], 1):
        cards.append((f"Turn {number}: the model", lambda column, turn=turn: write_turn(column, turn, rollout)))
        if turn["image"]:
            shown += 1

            def result(column: Column, picture=pictures[shown], size=sizes[shown], tool=turn["tool"]) -> None:
                column.picture(picture, (0, 0, *picture.size) if tool == "crop_image" else None)
                column.text(size, size=22, color=GREY)

            cards.append((f"Turn {number}: {turn['tool']}", result))
    width = (WIDTH - 4 - GAP * (len(cards) - 1)) // len(cards)
    columns = []
    for place, (title, fill) in enumerate(cards):
        left = 2 + place * (width + GAP)
        columns.append(Column(canvas, left, 0, left + width))
        columns[-1].text(title, size=24, color=BLUE, space=14)
        fill(columns[-1])
    bottom = max(column.y for column in columns) + PADDING - 8
    for place, column in enumerate(columns):
        left = column.x - PADDING
        canvas.box(left, 2, left + width, bottom)
        if place:
            canvas.arrow(left - GAP // 2, 240)
    return bottom


def find_crop(rollout: dict[str, Any], picture: Image.Image) -> tuple[float, float, float, float] | None:
    """Return x, y, width, height of the first crop, in pixels of the picture that the model saw."""
    crops = [json.loads(turn["args"]) for turn in rollout["turns"] if turn["tool"] == "crop_image"]
    if not crops:
        return None
    wide, high = Coordinates(rollout["coordinates"]).extent(picture.size)
    x, width = (crops[0][edge] * picture.width / wide for edge in ("x", "width"))
    y, height = (crops[0][edge] * picture.height / high for edge in ("y", "height"))
    return x, y, width, height


def describe_size(entry: dict[str, Any], picture: Image.Image) -> str:
    """Return the size of an image, and how much of it the model sees."""
    full, seen = (
        f"{width}\u00a0×\u00a0{height}" for width, height in ((entry["width"], entry["height"]), picture.size)
    )
    return f"{full} pixels; the model sees {'all of them' if full == seen else seen}."


def write_turn(column: Column, turn: dict[str, Any], rollout: dict[str, Any]) -> None:
    """Write what the model sampled, tag by tag."""
    for tag, font, size in (("think", BOLD, 26), ("tool", MONO, 24), ("answer", BOLD, 26)):
        _, opening, rest = turn["text"].partition(f"<{tag}>")
        if opening:
            column.text(opening, MONO, 22, GREY, space=2)
            column.text(rest.partition(f"</{tag}>")[0], font, size)
    if turn["kind"] == "answer":
        right = rollout["components"]["answer"]["value"] == 1
        column.text("✓ This is right." if right else f"Right is {rollout['right_answer']}.", color=GREEN)


def draw_rewards(canvas: Canvas, rollout: dict[str, Any], top: int) -> int:
    """Draw each term of the mix as a bar, and the advantage. Return the lower edge."""
    weighed = rollout["weighed"][-1]
    terms = Column(canvas, 2, top, WIDTH // 2)
    terms.text("Rewards: value × weight in the mix", size=24, color=BLUE, space=14)
    for term in weighed["terms"]:
        value = term["value"] or 0.0
        left, right, y = terms.x + 290, terms.x + 710, terms.y + 6
        canvas.draw.rectangle((left, y, right, y + 20), TRACK, LINE)
        canvas.draw.rectangle((left, y, left + round((right - left) * value), y + 20), BLUE)
        figures = ImageFont.truetype(SANS, 24)
        canvas.draw.text((right + 24, terms.y), f"{value:.2f} × {term['weight']:.2g}", GREY, figures)
        terms.text(term["name"] if term["name"] == term["column"] else f"{term['name']}: {term['column']}", space=7)
    totals = [row["total"] for row in weighed["group"]]
    result = Column(canvas, 1030, top + 48, WIDTH)
    result.text(f"Total reward {weighed['total']:.2f}", BOLD)
    result.text(f"Mean of its group of {len(totals)} rollouts: {sum(totals) / len(totals):.2f}")
    result.text(f"Advantage {weighed['advantage']:+.2f}", BOLD, color=BLUE)
    result.text("GRPO makes what is better than the group's mean more likely.", size=22, color=GREY)
    bottom = max(terms.y, result.y) + PADDING - 8
    canvas.box(2, top, WIDTH - 3, bottom)
    return bottom


if __name__ == "__main__":
    run(draw)
