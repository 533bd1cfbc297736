"""Page of the endpoint: three files of this package; nothing is loaded from elsewhere."""

from importlib.resources import files

from aiohttp import web

PATHS = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
"""Path of the endpoint -> file."""
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Limits of the page, should a model's text ever become more than text: it may ask this endpoint and nothing else."""


def page_routes() -> list[web.RouteDef]:
    """Return the routes of the page's files."""
    return [web.get(path, serve_file) for path in PATHS]


async def serve_file(request: web.Request) -> web.Response:
    """Answer with the file of a path."""
    name = PATHS[request.path]
    text = files("thinkimg.serving").joinpath("page_files", name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=TYPES[name.rpartition(".")[2]], charset="utf-8", headers=HEADERS)
