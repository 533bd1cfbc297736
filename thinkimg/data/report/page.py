"""Self-contained HTML page: texts of strangers escaped, pictures as data: URIs with boxes over them.

The page needs no server, has no script, and loads nothing: its policy forbids all but data: pictures and its own style.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from thinkimg.data.report.example import SIDE, Thumbnail
from thinkimg.data.report.lines import crop
from thinkimg.errors import UserError

Box = tuple[float, float, float, float]
"""(x, y, width, height) in pixels of a picture."""
HEIGHT = 380
"""Height in pixels at which a picture is shown, at most."""
SMALLEST = 120
"""Longer side in pixels to which smaller pictures are enlarged."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --page: #f4f4f2; --card: #fff; --line: #dcdcd8;
  --right: #1a7f37; --right-back: #e4f5e8; --wrong: #b3261e; --target: #ff7a00; --cut: #e02bd0; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #a0a4ab; --page: #16181b; --card: #202327;
  --line: #363a40; --right: #58c26e; --right-back: #1b3323; --wrong: #ff8a80; --warn: #e0b050; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h1, h2, p, li, dd, pre, header { overflow-wrap: anywhere; unicode-bidi: isolate; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-line; }
dd.code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
.legend, .where { color: var(--soft); font-size: .87rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
figure { margin: 0; max-width: 100%; }
.frame { position: relative; width: fit-content; max-width: 100%; line-height: 0; }
.frame img { max-width: 100%; height: auto; border-radius: .3rem; background: #888; }
.frame svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; overflow: visible; }
figcaption { font-size: .8rem; line-height: 1.4; color: var(--soft); }
rect { fill: none; vector-effect: non-scaling-stroke; }
rect.edge { stroke: #000; stroke-width: 4px; stroke-opacity: .55; }
rect.target { stroke: var(--target); stroke-width: 2px; } rect.answer { stroke: #2fd05f; stroke-width: 2px; }
rect.cut { stroke: var(--cut); stroke-width: 2px; }
.question { margin: .5rem 0; white-space: pre-line; }
ol { margin: .4rem 0; padding-left: 1.9rem; } li { padding: .05rem .4rem; border-radius: .3rem; }
li.right { background: var(--right-back); color: var(--right); font-weight: 600; }
details { margin-top: .4rem; font-size: .87rem; color: var(--soft); }
pre { white-space: pre-wrap; margin: .3rem 0 0; font: 13px/1.45 ui-monospace, monospace; }
"""


def check_page(path: Path) -> None:
    """Raise UserError where no page can be written, or under no name of a page: a table of the user's may have it."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} is no name of a page.", hint="Let the file's name end in .html.")
    if not path.parent.is_dir() or path.is_dir():
        problem = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise UserError(f"{path} {problem}.", hint="Name a file in a folder that exists.")


def write_page(path: Path, title: str, body: Iterable[str], style: str = "") -> None:
    """Write a page. Raises as `check_page`."""
    check_page(path)
    path.write_text(render_page(title, body, style), encoding="utf-8")


def render_page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a page. body: lines of HTML, everything of strangers in them escaped. style: CSS beside STYLE."""
    head = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape_text(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head><body>',
        f"<h1>{escape_text(title)}</h1>",
    ]
    return "\n".join([*head, *body, "</body></html>"]) + "\n"


def render_figure(
    picture: Thumbnail, name: str, boxes: Mapping[str, Sequence[Box]], *, share: float = 1.0
) -> Iterator[str]:
    """Yield a picture with boxes over it, which are in its own pixels.

    name: alternative text, and the beginning of the caption. boxes: class (target, answer, cut) -> boxes. share: of the
    largest size at which a picture is shown.
    """
    width, height = picture.size
    room = min(SIDE / width, HEIGHT / height) * share
    scale = min(room, max(1, SMALLEST / max(width, height)))
    yield '<figure><div class="frame">'
    yield f'<img src="{escape(picture.uri)}" width="{max(1, round(width * scale))}" alt="{escape_text(name)}">'
    yield f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
    for kind, listed in boxes.items():
        for x, y, wide, high in listed:
            edges = f'x="{x:.10g}" y="{y:.10g}" width="{wide:.10g}" height="{high:.10g}"'
            yield f'<rect class="edge" {edges}/><rect class="{kind}" {edges}/>'
    yield "</svg>"
    yield f"</div><figcaption>{escape_text(name)}: {width} x {height} pixels</figcaption></figure>"


def escape_text(value: str) -> str:
    """Return a stranger's text for HTML: cropped, with its markup and its control characters to be seen."""
    return escape(crop(value, lines=200, length=8000))
