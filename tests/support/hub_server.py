"""Server on localhost that speaks the Hub's interface, as far as huggingface_hub, datasets and open_clip ask it."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: more
  data_files: more/**
---
# A set
"""
"""Card of a data set with two configurations."""

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubServer:
    """Repositories of "models" and "datasets" by id, each a list of commits; `main` is the last one.

    url: its address. asked: the paths of all requests. down: True lets it answer 503 to everything. gated: ids of
    repositories that nobody may see. stop_at: path of a file -> bytes of it, after which the server says no more; with
    cut it ends the connection instead, once.
    ranges: (path, value of the header Range) of what was sent in parts.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.ranges: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.stop_at: dict[str, int] = {}
        self.cut = False
        self.stopped = threading.Event()
        self.closing = threading.Event()
        self.down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def commit(self, kind: str, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files alone, and return its hash."""
        commits = self.repositories.setdefault((kind, repository), {})
        sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        return sha

    def downloaded(self) -> list[str]:
        """Return the names of all files that were asked for, each once, in order."""
        return list(dict.fromkeys(match[4] for path in self.asked if (match := FILE.fullmatch(path))))

    def close(self):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append(path)
        if self.hub.down:
            return self.reply(503, b"down")
        if match := API.fullmatch(path):
            kind, name, action, revision, inside = match.groups()
            commits = self.hub.repositories.get((kind, name))
            if name in self.hub.gated:
                return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if commits is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            sha = list(commits)[-1] if revision in (None, "main") else revision
            if sha not in commits:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = commits[sha]
            if action == "tree":
                return self.reply(200, tree(files, inside or "", "recursive=true" in url.query.lower()))
            if action == "paths-info":
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                return self.reply(200, [entry for entry in listed(files) if entry["path"] in wanted])
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        if match := FILE.fullmatch(path):
            kind, name, revision, file = match.groups()
            commits = self.hub.repositories.get(("datasets" if kind else "models", name), {})
            sha = list(commits)[-1] if commits and revision == "main" else revision
            if name in self.hub.gated:
                return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if file not in commits.get(sha, {}):
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            data = commits[sha][file]
            tag = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            return self.reply(200, data, tag, stop_at=self.hub.stop_at.get(file))
        return self.reply(404, b"{}")

    def reply(self, status, content, headers=(), stop_at=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        first, last = 0, len(data)
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(ranged[1]), int(ranged[2] or len(data)) + 1
            status = 206
            self.hub.ranges.append((self.path, ranged[0]))
        part = data[first:last]
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(part)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if stop_at is None or len(part) <= stop_at:
            self.wfile.write(part)
        else:
            self.wfile.write(part[:stop_at])
            self.wfile.flush()
            self.hub.stopped.set()
            if self.hub.cut:
                self.hub.stop_at.clear()
                self.close_connection = True
            else:
                self.hub.closing.wait()


def listed(files):
    return [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]


def tree(files, inside, recursive):
    """Return the entries below a folder, those of its subfolders too if asked to."""
    prefix = f"{inside}/" if inside else ""
    entries, folders = [], set()
    for entry in listed(files):
        rest = entry["path"].removeprefix(prefix)
        if not entry["path"].startswith(prefix):
            continue
        if "/" in rest:
            folders.add(prefix + rest.split("/")[0])
        if recursive or "/" not in rest:
            entries.append(entry)
    return entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]


def ask_locally(monkeypatch, server: HubServer, cache: Path) -> None:
    """Let the Hub's library ask a server of ours, and keep its files in a directory of the test's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    # It waits before it asks again.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
