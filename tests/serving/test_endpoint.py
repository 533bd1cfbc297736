"""Endpoint over a scripted engine, asked by openai's own client: answers, streams, refusals, limits, and faults."""

import gc
import io
import json
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
from chat_server import (
    CROP,
    THINK,
    ChatServer,
    ScriptedClient,
    answer,
    data_uri,
    encode,
    look_then_answer,
    open_data_uri,
    picture,
    show,
)
from PIL import ExifTags, Image

from thinkimg.conversation.episode import Episode
from thinkimg.conversation.protocol import ToolCall
from thinkimg.conversation.text_core import PendingCall
from thinkimg.images.decode import pixel_hash
from thinkimg.serving import app as app_module
from thinkimg.serving.app import Access
from thinkimg.serving.body import TOO_LONG
from thinkimg.tracking.traces import draw_box

URI = data_uri(encode(picture()))


@pytest.fixture(scope="module")
def server():
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def start():
    """start(...): a ChatServer that ends with the test."""
    started = []

    def make(*arguments, **options) -> ChatServer:
        started.append(ChatServer(*arguments, **options))
        return started[-1]

    yield make
    for server in started:
        server.close()


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def collect(events) -> dict:
    """A stream as one message, with the last finish_reason and usage."""
    result = {"content": "", "reasoning_content": "", "reasoning": "", "images": [], "reason": None, "usage": None}
    for chunk in events:
        if chunk.usage is not None:
            result["usage"] = chunk.usage.model_dump()
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            for name in ("content", "reasoning_content", "reasoning"):
                result[name] += delta.get(name) or ""
            result["images"] += delta.get("images") or []
            result["reason"] = choice.finish_reason or result["reason"]
    return result


def test_the_answer_is_bare_and_the_turns_come_beside_it(server):
    done = server.ask(show("Which colour? red", URI))
    (choice,) = done.choices
    assert (choice.message.content, choice.finish_reason) == ("red", "stop") and not choice.message.tool_calls
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.message.reasoning == f"{CROP}\nImage 1: 28x56 pixels.\n\n{answer('red')}"
    prompt, sampling = server.engine.requests[-2]
    assert prompt.endswith("Image 0: 56x28 pixels. Which colour? red<|im_end|>\n<|im_start|>assistant\n")
    assert sampling.temperature == 0.0
    usage, encode_text = done.usage, server.engine.codec.encode
    assert usage.completion_tokens == len(encode_text(CROP)) + len(encode_text(answer("red"))) + 2
    details = usage.completion_tokens_details
    assert usage.completion_tokens - details.reasoning_tokens == len(encode_text("red"))
    assert usage.prompt_tokens == usage.total_tokens - usage.completion_tokens > 0


@pytest.mark.parametrize("model", ["policy", "policy-images"])
def test_streamed_equals_not_streamed(server, model):
    questions = [show(f"Which colour? {word}", URI) for word in ("red", "blue")]
    for question in questions:
        whole = server.ask(question, model=model)
        message = whole.choices[0].message.model_dump()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = list(server.ask(question, model=model, **options))
        streamed = collect(events)
        assert streamed["usage"] == whole.usage.model_dump()
        assert streamed["reason"] == whole.choices[0].finish_reason
        for name in ("content", "reasoning_content", "reasoning"):
            assert streamed[name] == message[name]
        assert streamed["images"] == (message.get("images") or [])
        assert events[0].choices[0].delta.role == "assistant" and not events[-1].choices
        assert len({event.id for event in events}) == 1
        assert collect(server.ask(question, model=model, stream=True))["usage"] is None


def test_pictures_of_the_turns_come_on_request_alone(server):
    question = show("Which colour? red", URI)
    plain = server.ask(question).choices[0].message.model_dump()
    assert "images" not in plain
    for options in ({"model": "policy-images"}, {"extra_body": {"modalities": ["text", "image"]}}):
        boxed, crop = server.ask(question, **options).choices[0].message.images
        images = [open_data_uri(part["image_url"]["url"]) for part in (boxed, crop)]
        assert images[0].size == (160, 120) and pixel_hash(images[0].convert("RGB")) != pixel_hash(picture())
        assert pixel_hash(images[1].convert("RGB")) == pixel_hash(picture().crop((0, 0, 80, 120)))


@pytest.mark.parametrize("unit, tool, arguments, box", [
    ("pixels", "crop_image", {"x": 28, "y": 7, "width": 14, "height": 14}, (80, 30, 120, 90)),
    ("thousandths", "crop_image", {"x": 500, "y": 250, "width": 250, "height": 500}, (80, 30, 120, 90)),
    ("pixels", "zoom_image", {"factor": 2, "center_x": 42, "center_y": 14}, (80, 30, 160, 90)),
    ("thousandths", "zoom_image", {"factor": 2, "center_x": 750, "center_y": 500}, (80, 30, 160, 90)),
])  # fmt: skip
@pytest.mark.parametrize("named", [0, 1])
def test_the_box_lies_where_the_call_cut_on_whichever_picture_of_the_chat(start, unit, tool, arguments, box, named):
    """Pictures of 160 x 120 pixels, seen at 56 x 28; one is stored on its side, as phones do."""
    call = THINK.render_turn("look", ToolCall(tool, {"image": named} | arguments))
    server = start(ScriptedClient(lambda prompt, _: answer("red") if "Image 2:" in prompt else call), coordinates=unit)
    shown, sideways, stored = [picture(1), picture(2)], Image.Exif(), io.BytesIO()
    sideways[ExifTags.Base.Orientation] = 8
    shown[0].transpose(Image.Transpose.ROTATE_270).save(stored, "PNG", exif=sideways)
    history = [
        {"role": "user", "content": show("First?", data_uri(stored.getvalue()))},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": show("And now?", data_uri(encode(shown[1])))},
    ]
    boxed, _ = server.ask(history, model="policy-images").choices[0].message.images
    assert pixel_hash(open_data_uri(boxed["image_url"]["url"])) == pixel_hash(draw_box(shown[named], box))


def test_without_an_answer_the_content_is_a_question_mark(start):
    for script, settings in (
        (lambda *_: CROP, {"max_turns": 2}),
        (lambda *_: "hm " * 200, {"max_turn_tokens": 20}),
        (lambda *_: "no protocol at all", {"max_turns": 1}),
    ):
        server = start(ScriptedClient(script), **settings)
        whole = server.ask(show("q", URI)).choices[0]
        assert (whole.message.content, whole.finish_reason) == ("?", "length") and whole.message.reasoning
        streamed = collect(server.ask(show("q", URI), stream=True))
        assert (streamed["content"], streamed["reason"]) == ("?", "length")


def test_max_tokens_bounds_the_shown_answer_alone(start):
    words = "the stripes run from the left to the right"
    server = start(ScriptedClient(lambda *_: answer(words)))
    encode_text = server.engine.codec.encode
    for limit in (1, 2, 7, 10_000_000):
        choice = server.ask("q", max_tokens=limit).choices[0]
        assert choice.message.content and words.startswith(choice.message.content)
        assert len(encode_text(choice.message.content)) <= limit
        assert choice.finish_reason == ("stop" if choice.message.content == words else "length")
        assert server.engine.requests[-1][1].max_tokens == 512
    server = start(ScriptedClient(lambda *_: answer("é" * 5)))
    assert all(server.ask("q", max_tokens=limit).choices[0].message.content for limit in range(1, 12))


def test_max_completion_tokens_bounds_all_that_is_sampled(server):
    question = show("Which colour? red", URI)
    full = server.ask(question).usage.completion_tokens
    for limit in (1, 5, full - 1, full, full + 1, 100_000):
        done = server.ask(question, max_completion_tokens=limit)
        assert done.usage.completion_tokens <= limit
        assert done.choices[0].message.content == ("red" if limit >= full else "?")
    first = server.ask(question, max_completion_tokens=len(server.engine.codec.encode(CROP)) + 1)
    assert first.choices[0].message.content == "?" and first.usage.completion_tokens > 1


def test_temperature_and_seed_reach_the_engine(server):
    seeds = {}
    for seed in (0, 1, 2**62, None):
        server.ask("Which? red", seed=seed, temperature=0.5)
        prompt, sampling = server.engine.requests[-1]
        assert sampling.temperature == 0.5
        seeds[seed] = sampling.seed
        server.ask("Which? red", seed=seed, temperature=0.5)
        assert server.engine.requests[-1][1].seed == sampling.seed
    assert seeds[None] == seeds[0] and len(set(seeds.values())) == 3


def test_several_turns_of_a_user_are_one_conversation(server):
    other = data_uri(encode(picture(1, (56, 56))))
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": show("First? a", URI)},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": show("And here? b", other)},
    ]
    server.engine.script = lambda *_: answer("done")
    try:
        assert server.ask(history).choices[0].message.content == "done"
    finally:
        server.engine.script = look_then_answer
    prompt, _ = server.engine.requests[-1]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt == (
        "<|im_start|>system\ns<|im_end|>\n"
        f"<|im_start|>user\n{image}Image 0: 56x28 pixels. Be brief.\nFirst? a<|im_end|>\n"
        "<|im_start|>assistant\n<think></think><answer>red</answer><|im_end|>\n"
        f"<|im_start|>user\n{image}Image 1: 56x56 pixels. And here? b<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_32_at_once_get_their_own_answers(server):
    words = [f"w{number}" for number in range(32)]
    uris = [data_uri(encode(picture(number))) for number in range(32)]
    ask = lambda word, uri: server.ask(show(f"Say {word}", uri)).choices[0].message.content  # noqa: E731
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, words, uris)) == words


USER = {"role": "user", "content": "q"}
REFUSALS = [
    (openai.NotFoundError, {"model": "gpt-5"}, "model_not_found"),
    (openai.BadRequestError, {"n": 2}, "unsupported_parameter"),
    (openai.BadRequestError, {"logprobs": True}, "unsupported_parameter"),
    (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter"),
    (openai.BadRequestError, {"modalities": ["text", "audio"]}, None),
    (openai.BadRequestError, {"temperature": -1}, None),
    (openai.BadRequestError, {"temperature": 2.5}, None),
    (openai.BadRequestError, {"max_tokens": 0}, None),
    (openai.BadRequestError, {"messages": []}, None),
    (openai.BadRequestError, {"messages": [{"role": "assistant", "content": "a"}]}, None),
    (openai.BadRequestError, {"messages": [USER, USER]}, None),
    (openai.BadRequestError, {"messages": [{"role": "system", "content": "s"}]}, None),
    (openai.BadRequestError, {"messages": [{"role": "tool", "content": "s", "tool_call_id": "x"}]}, None),
    (openai.BadRequestError, {"messages": [USER, {"role": "assistant", "content": "a"}]}, None),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": ""}]}, None),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, None),
    (openai.BadRequestError, {"messages": [{"role": "system", "content": show("s", URI)}, USER]}, None),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 9000}]}, TOO_LONG),
    (
        openai.BadRequestError,
        {"messages": [{"role": "user", "content": show("q", *[URI] * 9)}]},
        TOO_LONG,
    ),
]
PICTURES = [
    ("data:image/png;base64,AAAA", "invalid_image"),
    (URI[:-400], "invalid_image"),
    (data_uri(encode(picture(0, (1, 300)))), "invalid_image"),
    (data_uri(encode(Image.new("RGB", (1025, 1025)))), "invalid_image"),
    (data_uri(bytes(2**20 + 1)), "invalid_image"),
    ("data:image/png;base64,%%%", None),
    ("data:image/png,AAAA", None),
    ("https://example.org/a.png", None),
    ("http://127.0.0.1:1/a.png", None),
    ("file:///etc/passwd", None),
    ("ftp://example.org/a.png", None),
    ("/etc/passwd", None),
    ("", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind, options, code", REFUSALS)
def test_a_refusal_is_known_to_openais_client(server, kind, options, code, stream):
    body = {"model": "policy", "messages": [USER], "stream": stream} | options
    asked = len(server.engine.requests)
    with pytest.raises(kind) as caught:
        server.client.chat.completions.create(**body)
    assert caught.value.code == code and caught.value.body["message"] and caught.value.body["type"]
    assert len(server.engine.requests) == asked


@pytest.mark.parametrize("url, code", PICTURES)
def test_a_picture_that_can_not_be_used_is_refused(server, url, code):
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(show("q", url))
    assert caught.value.code == code and caught.value.param == "messages"


class Pictures(BaseHTTPRequestHandler):
    """A host with one picture, and an address that leads away from it."""

    def do_GET(self):
        here = self.path == "/a.png"
        self.send_response(200 if here else 302)
        self.send_header("Location", "http://localhost:1/a.png")
        self.end_headers()
        self.wfile.write(encode(picture()) if here else b"")

    def log_message(self, *_):
        """Silent."""


def test_pictures_are_fetched_from_allowed_hosts_alone(start):
    server = start(hosts=("127.0.0.1",))
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{host.server_port}"
            assert server.ask(show("Which? red", f"{url}/a.png")).choices[0].message.content == "red"
            for other in (f"http://localhost:{host.server_port}/a.png", f"{url}/away"):
                with pytest.raises(openai.BadRequestError, match="localhost is not among data.url_hosts"):
                    server.ask(show("Which? red", other))
        finally:
            host.shutdown()


def test_what_evaluators_send_besides_is_accepted(server):
    """Bodies as VLMEvalKit and lmms-eval send them."""
    extra = {
        "n": 1,
        "top_p": 0.9,
        "presence_penalty": 0.0,
        "stop": None,
        "user": "u",
        "response_format": {"type": "text"},
    }
    done = server.ask(show("Which colour? red", URI), max_tokens=32768, temperature=0.0, extra_body=extra)
    assert done.choices[0].message.content == "red"


def test_models_and_health(server):
    assert [model.id for model in server.client.models.list()] == ["policy", "policy-images"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_only_who_has_the_key_is_let_in(start):
    server = start(access=Access(key="s3cret"))
    assert server.ask("Which? red").choices[0].message.content
    for key in ("none", "s3cre", "s3crets", "ключ"):
        answered = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert (answered.status_code, answered.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_page_in_a_browser_can_not_use_it(server):
    """By a host name that leads here, or by a request that a browser sends unasked."""
    there = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert there.status_code == 403
    for host in ("127.0.0.1.evil.example:80", "localhost.evil", "", ":", "[::1", "[", "a b", "127.0.0.1:x:y", "\xff"):
        headers = {"Host": host.encode("latin-1")}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code in (400, 403)
    for host in ("localhost", "localhost:8001", "[::1]:8001", "[::1]", "127.0.0.1"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200
    body = json.dumps({"model": "policy", "messages": [USER]})
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/octet-stream"}, {}):
        plain = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert plain.status_code == 415 and plain.json()["error"]["message"]


def test_bodies_have_a_limit(server, monkeypatch):
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["message"] == "Not Found."
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    monkeypatch.setattr(server.app, "_client_max_size", 10_000)
    with pytest.raises(openai.APIStatusError) as caught:
        server.ask("w" * 20_000)
    assert caught.value.status_code == 413 and caught.value.body["message"]
    monkeypatch.setattr(app_module, "BODY_S", 0.2)

    def slowly():
        yield b'{"model": '
        time.sleep(1)
        yield b'"policy"}'

    late = httpx.post(
        f"{server.url}/v1/chat/completions", content=slowly(), headers={"Content-Type": "application/json"}
    )
    assert late.status_code == 408 and late.json()["error"]["message"]


@pytest.mark.parametrize("headers", [
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "br"},
    {"Content-Encoding": "nothing"},
    {"Content-Type": "application/json; charset=utf-99"},
    {"Content-Type": "application/json;" + "x=y;" * 500},
    {"Expect": "200-ok"},
])  # fmt: skip
def test_odd_headers_are_no_errors_of_ours(server, headers):
    body = json.dumps({"model": "policy", "messages": [USER]}).encode()
    for content in (body, b"\x1f\x8b" + body):
        headers = {"Content-Type": "application/json"} | headers
        got = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert got.status_code < 500


def test_a_request_has_its_time(start):
    server = start(access=Access(timeout_s=0.3))
    server.engine.delay = 5.0
    with pytest.raises(openai.InternalServerError) as caught:
        server.ask("q")
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    with pytest.raises(openai.APIError, match="too long"):
        list(server.ask("q", stream=True))
    until(lambda: server.engine.cancelled == 2)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_takes_his_request_along(start, stream):
    server = start()
    server.engine.delay = 30.0
    impatient = server.client.with_options(timeout=0.5)
    body = {"model": "policy", "messages": [{"role": "user", "content": show("q", URI)}], "stream": stream}
    with pytest.raises(openai.APITimeoutError):
        list(impatient.chat.completions.create(**body))
    until(lambda: server.engine.cancelled == 1)
    server.engine.delay = 0.0
    assert server.ask(show("Which? red", URI)).choices[0].message.content == "red"
    until(lambda: not server.keeper._users)


def test_a_stream_shows_that_it_lives(start, monkeypatch):
    monkeypatch.setattr(app_module, "KEEP_ALIVE_S", 0.05)
    server = start()
    server.engine.delay = 0.5
    body = {"model": "policy", "messages": [USER], "stream": True}
    text = httpx.post(f"{server.url}/v1/chat/completions", json=body).text
    assert text.count(": the policy is at work\n\n") > 3 and text.endswith("data: [DONE]\n\n")


def test_an_engine_that_is_gone_comes_back_by_itself(start, monkeypatch):
    monkeypatch.setattr("thinkimg.serving.keeper.RETRY_S", 0.05)
    server = start()
    question = show("Which? red", URI)
    assert server.ask(question).choices[0].message.content == "red"
    server.engine.gone = True
    with pytest.raises(openai.APIError, match="does not answer"):
        list(server.ask(question, stream=True))
    for options in ({}, {"stream": True}):
        with pytest.raises(openai.InternalServerError) as caught:
            server.ask(question, **options)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
        assert caught.value.response.headers["Retry-After"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    until(lambda: server.connects > 3)
    server.engine.gone = False
    until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert server.ask(question).choices[0].message.content == "red"


def test_nothing_is_kept_of_a_request(start):
    """Media are evicted, users are counted down, and no conversation stays in memory."""
    server = start()
    server.media.cache_bytes = 10_000
    for number in range(20):
        server.ask(show("Which? red", data_uri(encode(picture(number)))))
    until(lambda: server.media.size <= 10_000 and not server.keeper._users)
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, Episode)]


def test_of_a_prompt_that_is_too_long_nothing_is_kept(server):
    texts = [f"{number} " + "a b " * 50_000 for number in range(9)]

    def refuse(text: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            server.ask(text)
        assert caught.value.code == TOO_LONG

    refuse(texts[0])
    gc.collect()
    tracemalloc.start()
    try:
        for text in texts[1:]:
            refuse(text)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2**21, "tokens of one prompt take more"
    finally:
        tracemalloc.stop()


def test_a_tool_that_breaks_is_an_error_and_no_answer(start, monkeypatch):
    monkeypatch.setattr(PendingCall, "run", lambda call: 1 / 0)
    server = start()
    with pytest.raises(openai.InternalServerError) as caught:
        server.ask(show("Which? red", URI))
    assert (caught.value.status_code, caught.value.code) == (502, "failed")
