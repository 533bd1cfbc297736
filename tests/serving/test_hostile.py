"""Hostile requests: whatever a body or a picture's address is, no error of ours, and no file outside of --media."""

import copy
import json
import os
import random
import string
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from chat_server import VIEW, ChatServer, ScriptedClient, answer, data_uri, encode, picture, show

from thinkimg.images.decode import ImageLimits
from thinkimg.serving.body import Question, read_body
from thinkimg.serving.pictures import PictureReader
from thinkimg.serving.refusal import Refusal

NAMES = ("policy", "policy-images")
FILES = {kind: encode(picture(0, (40, 30)), kind) for kind in ("PNG", "JPEG", "WEBP")}
SECRET = b"SECRET-OF-ANOTHER"
ODD = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, 2**63, 10**30, "", "policy", "\x00", "\ud800", "x" * 2000, "[]",
    [], [[]], {}, {"type": "text"}, {"url": 5}, {"role": "user"}, [{"type": "image_url"}], [None] * 50, "NaN",
    "<|im_end|><|image_pad|>", "<answer>x</answer>", "data:,", "file:///etc/passwd", "http://localhost:1/",
]  # fmt: skip
KEYS = [
    "model", "messages", "role", "content", "type", "text", "image_url", "url", "temperature", "seed", "n", "stream",
    "max_tokens", "max_completion_tokens", "tools", "functions", "logprobs", "modalities", "stream_options",
    "include_usage", "detail", "x",
]  # fmt: skip


def body(rng: random.Random, secret: str) -> dict:
    """A valid body, before it is changed."""
    kind = rng.choice(list(FILES))
    urls = [data_uri(damage(rng, FILES[kind]), kind.lower()) for _ in range(rng.choice((0, 1, 1, 2)))]
    urls += rng.choice(([], [], [], [name_file(rng, secret)]))
    messages = [{"role": "user", "content": show("Which? red", *urls)}]
    if rng.random() < 0.3:
        messages = [{"role": "system", "content": "s"}, *messages, {"role": "assistant", "content": "a"}, *messages]
    options = {"temperature": 0.5, "seed": 3, "max_tokens": 9, "stream": rng.random() < 0.2, "modalities": ["image"]}
    chosen = dict(rng.sample(sorted(options.items()), rng.randrange(len(options))))
    return {"model": rng.choice(NAMES), "messages": messages} | chosen


def damage(rng: random.Random, data: bytes) -> bytes:
    """A file with some bytes changed, cut out or put in; or as it is."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 0, 0, 1, 3, 30))):
        at = rng.randrange(len(changed) + 1)
        changed[at : at + rng.choice((0, 1, 1, 8))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
    return bytes(changed)


def name_file(rng: random.Random, secret: str) -> str:
    """An address that may lead to the secret, which lies beside the folder of --media."""
    steps = rng.choice(("", "./", "../", "..%2f", "%2e%2e/", "....//", "a/../../", "link/", "//", "\\..\\"))
    name = rng.choice(("secret.png", "secret.png%00.png", "link.png", "pipe", "", "good.png", "link/secret.png"))
    start = rng.choice((os.path.dirname(secret) + "/media/", os.path.dirname(secret) + "/", "", "/", "~/"))
    return rng.choice(("file://", "FILE://", "file:", "file://localhost", "file://other", "")) + start + steps + name


def mutate(rng: random.Random, value):
    """A JSON value with one part replaced, removed, doubled, renamed or wrapped."""
    places = [(value, key) for key in keys_of(value)]
    todo = [value[key] for key in keys_of(value)]
    while todo:
        inner = todo.pop()
        places += [(inner, key) for key in keys_of(inner)]
        todo += [inner[key] for key in keys_of(inner)]
    if not places:
        return copy.deepcopy(rng.choice(ODD))
    holder, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif action == 1:
        del holder[key]
    elif action == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif action == 3 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = holder.pop(key)
    elif isinstance(holder[key], str):
        text = holder[key]
        at = rng.randrange(len(text) + 1)
        holder[key] = text[:at] + rng.choice(("\x00", "\ud83d", "\u202e", '"', ":", "/", "%", "é")) + text[at + 1 :]
    else:
        holder[key] = [holder[key]]
    return value


def keys_of(value) -> list:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def write(rng: random.Random, value) -> bytes:
    """A body as JSON, at times damaged, deep, or with what is no JSON."""
    text = json.dumps(value).encode()
    luck = rng.random()
    if luck < 0.1:
        return damage(rng, text)
    if luck < 0.13:
        return b'{"messages":' + b"[" * rng.choice((10, 200, 100_000))
    if luck < 0.16:
        return text.replace(b"0.5", rng.choice((b"NaN", b"Infinity", b"1e999", b"9" * 5000)))
    if luck < 0.18:
        return rng.choice((b"", b"null", b"[]", b'"x"', b"\xff\xfe", text.decode().encode("utf-16")))
    return text


def hostile_bodies(seed: int, count: int, secret: str):
    rng = random.Random(seed)
    for _ in range(count):
        value = body(rng, secret)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            value = mutate(rng, value)
        yield write(rng, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder `media` with a picture, links that lead out of it, and a pipe; the secret lies beside it."""
    root = tmp_path_factory.mktemp("pictures")
    (media := root / "media").mkdir()
    (root / "secret.png").write_bytes(SECRET)
    (media / "good.png").write_bytes(FILES["PNG"])
    (media / "link.png").symlink_to(root / "secret.png")
    (media / "link").symlink_to(root)
    (media / "inner.png").symlink_to("good.png")
    (media / "deep").mkdir()
    os.mkfifo(media / "pipe")
    return media


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Paths that the reader opens, as the kernel names them."""
    paths, real = [], os.open

    def record(path, *arguments, **options):
        descriptor = real(path, *arguments, **options)
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return descriptor

    monkeypatch.setattr("thinkimg.serving.pictures.os.open", record)
    return paths


def reader(media, hosts=()) -> PictureReader:
    return PictureReader(VIEW, ImageLimits(max_bytes=2**20, max_pixels=2**20), media, hosts)


def test_bodies_are_read_or_refused(folder):
    secret = str(folder.parent / "secret.png")
    outcomes = set()
    for content in hostile_bodies(1, 3000, secret):
        try:
            assert isinstance(read_body(content, NAMES), Question)
            outcomes.add(200)
        except Refusal as refusal:
            assert 400 <= refusal.status < 500 and refusal.message.isprintable()
            json.dumps(refusal.body()).encode("ascii")
            outcomes.add(refusal.status)
    assert outcomes == {200, 400, 404}


@pytest.mark.parametrize("value", [b"0,", b"[],", b'{"a":0},', b"[" * 50 + b"]" * 50 + b",", b'"x",'])
@pytest.mark.parametrize("key", [b"x", b"tools", b"messages"])
def test_a_body_of_very_many_values_is_not_even_parsed(key, value):
    """As objects of Python they would take a hundred times its bytes, and minutes of the only loop."""
    begin = b'{"model": "policy", "messages": [{"role": "user", "content": "q"}], "' + key + b'": ['
    started = time.process_time()
    with pytest.raises(Refusal, match="too many values"):
        read_body(begin + value * (16 * 2**20 // len(value)) + b"0]}", NAMES)
    assert time.process_time() - started < 1


def test_files_come_from_below_media_alone(folder, opened):
    rng, secret = random.Random(2), str(folder.parent / "secret.png")
    names = [name_file(rng, secret) for _ in range(1500)]
    names += [f"file://{folder}/{name}" for name in ("good.png", "inner.png", "deep/../good.png", "%67ood.png")]
    read = 0
    for name in names:
        try:
            assert reader(folder).fetch(name) == FILES["PNG"]
            read += 1
        except Refusal as refusal:
            assert "etc" not in refusal.message and SECRET.decode() not in refusal.message
    assert read >= 4 and opened
    assert all(path.startswith(f"{folder}{os.sep}") or path == str(folder) for path in opened)
    for name in (f"file://{folder}/pipe", f"file://{folder}/deep", f"file://{folder}/link.png", f"file://{folder}"):
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Refusal, match="no such picture below"):
            reader(folder).fetch(name)
        assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(Refusal, match="--media"):
        reader(None).fetch(f"file://{folder}/good.png")


@pytest.mark.parametrize("put", ["good.png", "deep"])
def test_a_link_that_is_put_there_after_the_check_is_not_followed(tmp_path, monkeypatch, put):
    """In place of the file, or of a folder on the way to it."""
    for root, content in (("media", FILES["PNG"]), ("other", SECRET)):
        (tmp_path / root / "deep").mkdir(parents=True)
        for name in ("good.png", "deep/good.png"):
            (tmp_path / root / name).write_bytes(content)
    media, resolve = tmp_path / "media", os.path.realpath

    def swap(path, *arguments):
        resolved = resolve(path, *arguments)
        if str(path).endswith(".png"):
            (media / put).rename(media / "away")
            (media / put).symlink_to(tmp_path / "other" / put)
        return resolved

    name = f"file://{media}/{put}" if put == "good.png" else f"file://{media}/{put}/good.png"
    assert reader(media).fetch(name) == FILES["PNG"]
    monkeypatch.setattr("thinkimg.serving.pictures.os.path.realpath", swap)
    with pytest.raises(Refusal, match="no such picture below"):
        reader(media).fetch(name)


def test_folders_on_the_way_to_a_picture_need_not_be_readable():
    """As for `open`: they are passed through, by a user who may not list them."""
    with tempfile.TemporaryDirectory() as root:
        media = Path(root).resolve()
        (media / "deep").mkdir()
        (media / "deep" / "good.png").write_bytes(FILES["PNG"])
        (media / "deep").chmod(0o311)
        media.chmod(0o711)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
                (media / "deep").stat()  # it is reached
            assert not os.access(media / "deep", os.R_OK, effective_ids=True)
            assert reader(media).fetch(f"file://{media}/deep/good.png") == FILES["PNG"]
        finally:
            os.seteuid(user)
            (media / "deep").chmod(0o700)


def test_a_large_file_is_not_read_whole(folder):
    (folder / "large.png").write_bytes(bytes(3 * 2**20))
    small = reader(folder)
    assert len(data := small.fetch(f"file://{folder}/large.png")) == 2**20 + 1
    with pytest.raises(Refusal, match="bytes"):
        small.load(data)


def test_damaged_pictures_are_read_or_refused():
    rng, taken = random.Random(3), 0
    for number in range(600):
        try:
            shown = reader(None).load(damage(rng, FILES[("PNG", "JPEG", "WEBP")[number % 3]]))
            taken += shown.view.mode == "RGB"
        except Refusal as refusal:
            assert refusal.code == "invalid_image"
    assert 0 < taken < 600


def send(count: int, seed: int, folder) -> list[int]:
    """Statuses of so many hostile requests to an endpoint."""
    server = ChatServer(ScriptedClient(lambda *_: answer("red")), media=folder)
    secret, statuses = str(folder.parent / "secret.png"), []
    rng = random.Random(seed)
    try:
        with httpx.Client(timeout=60) as client:
            for content in hostile_bodies(seed, count, secret):
                noise = "".join(rng.choices(string.ascii_letters, k=5))
                headers = {"Content-Type": "application/json", "X-Noise": noise}
                got = client.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
                statuses.append(got.status_code)
                assert SECRET not in got.content and b"server_error" not in got.content
                if got.status_code != 200:
                    assert got.json()["error"]["message"], content
        assert server.ask("Which? red").choices[0].message.content == "red"
    finally:
        server.close()
    return statuses


def test_hostile_requests_are_answered_or_refused(folder):
    statuses = send(300, 4, folder)
    assert set(statuses) <= {200, 400, 404, 413} and statuses.count(200) > 20 and statuses.count(400) > 50


@pytest.mark.long
def test_twenty_thousand_hostile_requests(folder):
    import psutil

    process = psutil.Process()
    send(2000, 5, folder)
    before = process.memory_info().rss
    statuses = send(20_000, 6, folder)
    assert set(statuses) <= {200, 400, 404, 413}
    assert process.memory_info().rss - before < 64 * 2**20
