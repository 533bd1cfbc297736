"""An engine's server without an engine, for tests of its client.

Answers as a script says, and keeps what it was sent.
"""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from thinkimg.engine.client import EngineClient
from thinkimg.engine.request import ImageRef, Sampling

PLAIN = Sampling(temperature=1.0, max_tokens=1, seed=0, stop_token_ids=())


def send_json(handler: BaseHTTPRequestHandler, status: int, value: object) -> None:
    """Answer a request with a value as JSON."""
    payload = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)


class FakeServer:
    """Answers /inference/v1/generate with the statuses of a script, then with 200; keeps the bodies of all requests."""

    def __init__(self, statuses=()):
        fake, self.bodies, pending = self, [], list(statuses)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                fake.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = pending.pop(0) if pending else 200
                choice = {"token_ids": [1], "logprobs": {"content": [{"logprob": -1.0}]}, "finish_reason": "length"}
                choice["weight_versions"] = [{"version": "a"}, {"version": "b"}]
                answer = (
                    {"choices": [choice], "prompt_token_ids": [5]}
                    if status == 200
                    else {"error": {"message": "no luck"}}
                )
                send_json(self, status, answer)

            def log_message(self, *_):
                """Silent."""

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # with the usual 5 a crowd is refused, and retried elsewhere

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


def image(index: int) -> ImageRef:
    return ImageRef(uuid=f"image {index}", data=b"\x89PNG")


def generate_many(urls, count, **options):
    async def run():
        async with EngineClient(urls, media="data", **options) as client:
            return await asyncio.gather(*(client.generate([5], [image(i % 10)], PLAIN) for i in range(count)))

    return asyncio.run(run())
