"""Server of an engine or a teacher without either: it plays recorded conversations, and fails as it is told.

Each turn is found by its seed, a hash of (policy, sample, index, turn). Ratings follow from the hash of the request.
"""

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from thinkimg.conversation.episode import Episode, derive_seed
from thinkimg.records import Role

PASSING = (401, 403, 404, 429, 500, 503, "reset", "garbage", "page", "empty", "abort")
"""Faults of a server that are no request's own: statuses, and answers that are none."""
REFUSING = (400, 413, 422)


class ScriptedEngine:
    """Server; `fault(number)` gives the fault of its n-th answer since `begin`, from 0, or None."""

    def __init__(self):
        self.turns: dict[int, tuple[list[int], list[int]]] = {}  # seed -> (expanded prompt, sampled tokens)
        self.fault: Callable[[int], int | str | None] = lambda number: None
        self.count, self.version, self.restarted_at, self.lock = 0, "none", None, threading.Lock()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", -1  # unbuffered, each answer waits 40 ms for an ACK

            def do_GET(self):
                engine.respond(self, {"weight_version": engine.version, "object": "list", "data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "new_version" in body:
                    engine.version = body["new_version"]
                asked = "token_ids" in body or "messages" in body
                engine.respond(self, engine.generate(body) if asked else {"success": True})

            def log_message(self, *_):
                """Silent."""

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def begin(
        self, fault: Callable[[int], int | str | None] = lambda number: None, restarted_at: int | None = None
    ) -> None:
        """Forget the weights and the number of answers. restarted_at: answer before which it is started again."""
        self.fault, self.count, self.version, self.restarted_at = fault, 0, "none", restarted_at

    def played(self) -> str:
        """Return the version of the weights of this answer: after a start those that it started with."""
        restarted = self.restarted_at is not None and self.count >= self.restarted_at
        return "default" if restarted else self.version

    def record(self, policy: str, episode: Episode) -> None:
        """Learn the turns of a conversation that has ended."""
        stream, turn, position, start = episode.stream, 0, 0, None
        expanded, lengths = stream.expanded(), iter(stream.image_tokens)
        for role, token in zip(stream.roles, stream.ids, strict=True):
            start = (position if start is None else start) if role == Role.SAMPLED else None
            position += next(lengths) if token == stream.codec.image else 1
            if role == Role.SAMPLED and token == stream.codec.end:
                seed = derive_seed(policy, episode.sample.sample_id, episode.index, turn)
                self.turns[seed] = expanded[:start], expanded[start:position]
                turn += 1

    def generate(self, body: dict) -> dict:
        """Return the recorded turn, or ratings."""
        luck = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        if "messages" in body:
            top = [{"token": name, "logprob": -1.0 - luck[i] / 99} for i, name in enumerate(("1", "2"))]
            content = [{"token": "1", "logprob": -1.0, "top_logprobs": top}]
            choice = {"index": 0, "message": {"role": "assistant", "content": "1"}, "finish_reason": "length"}
            choice |= {"logprobs": {"content": content}}
            return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        params = body["sampling_params"]
        if "logprob_token_ids" in params:
            top = [{"token_id": t, "logprob": -1.0 - luck[i] / 99} for i, t in enumerate(params["logprob_token_ids"])]
            choice = {"logprobs": {"content": [{"top_logprobs": top}]}, "weight_versions": [{"version": self.played()}]}
            return {"choices": [choice]}
        prompt, sampled = self.turns[params["seed"]]
        choice = {"token_ids": sampled, "logprobs": {"content": [{"logprob": -1.0}] * len(sampled)}}
        choice |= {"finish_reason": "stop", "weight_versions": [{"version": self.played()}]}
        return {"choices": [choice], "prompt_token_ids": prompt}

    def respond(self, handler: BaseHTTPRequestHandler, answer: dict) -> None:
        """Send the answer, or fail."""
        with self.lock:
            fault, self.count = self.fault(self.count), self.count + 1
        if fault == "reset":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "abort" and "choices" in answer:
            answer["choices"][0] |= {"finish_reason": "abort", "token_ids": [], "logprobs": {"content": []}}
        status = fault if isinstance(fault, int) else 200
        payload = json.dumps({} if fault == "empty" else {"error": "no luck"} if status != 200 else answer).encode()
        payload = {"garbage": b'{"choices": [', "page": b"<html>Please log in</html>"}.get(fault, payload)
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if fault == "page" else "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
