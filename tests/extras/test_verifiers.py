"""verifiers, unmodified, on our environment: `make test-verifiers` runs this in an environment of its own."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.picture import make_picture
from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol
from thinkimg.conversation.tokens import ROLES
from thinkimg.engine import play
from thinkimg.environments.task import Tasks
from thinkimg.images.decode import pixel_hash
from thinkimg.records import Role, Trajectory
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.serving.serve import Connect, make_connect
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import settings_of
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable

pytestmark = pytest.mark.extra

TURN = load_protocol("think").render_turn
CROP = TURN("Too small.", ToolCall("crop_image", {"x": 28, "y": 0, "width": 56, "height": 28}))
WRONG = TURN("Closer.", ToolCall("zoom_image", {"x": 0, "y": 0, "width": 28, "height": 28, "factor": 99}))

# A tenth of the warm start of the tiny preset: the policy calls tools and answers, mostly wrongly.
SETTINGS = ["warmstart.steps=160", "warmstart.batch=16", "evaluate.k=1", "where.tracking.enabled=false"]


class Server(ThreadingHTTPServer):
    request_queue_size = 512  # vf-eval asks 128 at once


class Endpoint:
    """Chat completions whose turns are written: script(body, number of turns so far); (text, reason) for a cut one."""

    def __init__(self, script):
        endpoint = self
        self.script, self.bodies = script if callable(script) else lambda body, number: script[number], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                turn = endpoint.script(body, sum(message["role"] == "assistant" for message in body["messages"]))
                text, reason = (turn, "stop") if isinstance(turn, str) else turn
                choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                data = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
                self.send_response(500 if reason == "broken" else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    root = tmp_path_factory.mktemp("puzzles")
    overrides = ["data.train=1", "data.held_out=2", f"where.store={root}"]
    config = load_config("tiny", overrides)
    dataset, _ = build_stage(prepare, config, Store(root))
    return SimpleNamespace(config=config, dataset=dataset, overrides=overrides)


def arguments(url: str, dataset, overrides: list[str], *more: str) -> list[str]:
    return [
        "--no-rich", "--model", "policy", "--client.base-url", url, "--client.api-key-var", "NONE",
        "--sampling.temperature", "0", "--env.taskset.preset", "tiny", "--env.taskset.set", json.dumps(overrides),
        "--env.taskset.dataset", dataset.short, *more,
    ]  # fmt: skip


def read_traces(folder: Path) -> list[dict]:
    """The traces of the only run below a folder, in the order of their tasks."""
    (path,) = folder.glob("outputs/*/traces.jsonl")
    traces = [trace for line in path.read_text().splitlines() for trace in json.loads(line)["traces"]]
    return sorted(traces, key=lambda trace: trace["task"]["data"]["idx"])


def evaluate_with(monkeypatch, folder: Path, argv: list[str]) -> list[dict]:
    """Run `thinkimg-vf-eval` in this process."""
    import thinkimg_env

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(sys, "argv", ["thinkimg-vf-eval", *argv])
    thinkimg_env.evaluate()
    return read_traces(folder)


def scores_of(trace: dict) -> dict[str, float]:
    return {name: reward["score"] for name, reward in trace["rewards"].items()}


def read_messages(trace: dict) -> list[tuple[str, list[str], list[str]]]:
    """(role, texts, hashes of the pictures) of each message."""
    rows = []
    for node in trace["nodes"]:
        content = node["message"]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part["type"] == "text"]
        rows.append((node["message"]["role"], texts, hash_pictures(parts)))
    return rows


def hash_pictures(parts: list[dict]) -> list[str]:
    data = [part["image_url"]["url"].partition(",")[2] for part in parts if part["type"] == "image_url"]
    return [pixel_hash(Image.open(io.BytesIO(base64.b64decode(url))).convert("RGB")) for url in data]


def count_equal(traces: list[dict], rows: dict[str, Trajectory], images: ImageTable, tasks: Tasks) -> int:
    """The number of traces that have a row's texts, observations, and pictures by hash of what the model sees.

    images: those of the questions. An evaluation stores none of the others: the calls are run again.
    """
    equal = 0
    for trace in traces:
        row = rows[trace["task"]["data"]["id"]]
        _, question, *messages = read_messages(trace)
        core = tasks.begin(tasks.make_pictures([images.decoded(row.images[0])]))
        for turn in row.turns[:-1]:
            if call := core.read(turn.text):
                core.observe(call.run())
        seen = {picture.sha256: picture.uuid for picture in core.pictures}
        expected = [[("assistant", [turn.text], [])] for turn in row.turns]
        for turn, told in zip(row.turns[:-1], expected, strict=False):
            told.append(("user", [turn.observation], [seen[turn.image]] if turn.image else []))
        equal += messages == sum(expected, []) and question[2] == [seen[row.images[0]]]
    return equal


def play_ours(puzzles, script: list[str]):
    """Yield each conversation as our core has it, and the value of each rule."""
    tasks, images = Tasks.of(puzzles.config), ImageTable([puzzles.dataset])
    for sample in puzzles.dataset.split("held_out"):
        core = tasks.begin(tasks.make_pictures(map(images.decoded, sample.images)))
        for text in script:
            if call := core.read(text):
                core.observe(call.run())
        yield sample, core, {rule: tasks.score(rule, [(sample, core)])[0] for rule in tasks.rules}


def test_conversations_and_rewards_are_ours(puzzles, tmp_path, monkeypatch):
    script = [CROP, "No call.", WRONG, TURN("Seen.", Answer("A"))]
    with Endpoint(script) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    tasks = Tasks.of(puzzles.config)
    assert len(traces) == 2
    for trace, (sample, core, values) in zip(traces, play_ours(puzzles, script), strict=True):
        system, question, *messages = read_messages(trace)
        ours, asked = tasks.messages(sample, core.pictures[:1])
        assert system == ("system", [ours["content"]], [])
        assert question == ("user", [asked["content"][-1]["text"]], [core.pictures[0].uuid])
        assert messages[::2] == [("assistant", [text], []) for text in script]
        assert [picture.uuid for picture in core.pictures[1:]] == messages[1][2] and core.turns[0].image
        assert messages[1::2] == [
            ("user", [turn.observation], [core.pictures[1].uuid] * (turn.image is not None)) for turn in core.turns[:-1]
        ]
        assert scores_of(trace) == values and values["format"] == 0.75 and values["tool"] == 0.5
        assert trace["ok"] and not trace["errors"]
    assert {body["max_tokens"] for body in endpoint.bodies} == {puzzles.config.conversation.max_turn_tokens}
    assert {body["temperature"] for body in endpoint.bodies} == {0}


def test_a_turn_that_was_cut_off_ends_its_conversation(puzzles, tmp_path, monkeypatch):
    with Endpoint([(CROP, "length")]) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert [scores_of(trace) for trace in traces] == [{"answer": 0.0, "format": 0.0, "tool": 0.0}] * 2
    assert len(endpoint.bodies) == 2


def test_without_an_answer_the_turns_run_out(puzzles, tmp_path, monkeypatch):
    with Endpoint([CROP, "?", "?", "?"]) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert [scores_of(trace) for trace in traces] == [{"answer": 0.0, "format": 0.0, "tool": 1.0}] * 2
    assert len(endpoint.bodies) == 2 * puzzles.config.conversation.max_turns


def test_a_turn_is_asked_for_again(puzzles, tmp_path, monkeypatch):
    """As verifiers' own client never does, and servers close connections now and then."""
    refused = []

    def script(body: dict, number: int):
        refused.append(number)
        return ("", "broken") if number and refused.count(1) <= 2 else [CROP, TURN("Seen.", Answer("A"))][number]

    with Endpoint(script) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert refused.count(1) == 4 and all(trace["ok"] for trace in traces)
    assert [scores_of(trace)["format"] for trace in traces] == [1.0, 1.0]


def test_a_broken_endpoint_is_an_error_of_its_rollouts(puzzles, tmp_path, monkeypatch):
    with Endpoint([CROP, ("", "broken")]) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert len(traces) == 2 and not any(trace["ok"] for trace in traces)
    assert all("500" in trace["errors"][0]["message"] for trace in traces)


def test_a_broken_tool_is_an_error_of_its_rollouts(puzzles, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "run_tool", lambda call: 1 / 0)
    with Endpoint([CROP]) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert all("crop_image broke" in trace["errors"][0]["message"] for trace in traces) and len(traces) == 2


def test_a_tool_that_breaks_when_a_trace_is_scored_is_no_reward_of_zero(puzzles, tmp_path, monkeypatch):
    calls, script = [], [CROP, TURN("Seen.", Answer("A"))]

    def run_tool(call):
        calls.append(call)
        if len(calls) % 2 == 0:  # one at a time: each is played, and played again for its score
            raise MemoryError("no memory")
        return call.run()

    monkeypatch.setattr(play, "run_tool", run_tool)
    with Endpoint(script) as endpoint:
        argv = arguments(endpoint.url, puzzles.dataset, puzzles.overrides, "--max-concurrent", "1")
        traces = evaluate_with(monkeypatch, tmp_path, argv)
    assert [trace["errors"][0]["type"] for trace in traces] == ["TaskError"] * 2
    assert all("crop_image broke: MemoryError" in trace["errors"][0]["message"] for trace in traces)
    assert len(endpoint.bodies) == len(calls) == 4 and not any(any(trace["rewards"].values()) for trace in traces)


def test_the_loop_is_the_one_of_rollouts(puzzles, tmp_path, monkeypatch):
    """As in tests/serving/test_one_loop.py: whoever changes play_turns changes what verifiers plays and scores."""

    async def other_turns(core, *_, **__):
        core.read(TURN("", Answer("patched")))
        yield core.turns[-1]

    monkeypatch.setattr(play, "play_turns", other_turns)
    with Endpoint([CROP]) as endpoint:
        traces = evaluate_with(monkeypatch, tmp_path, arguments(endpoint.url, puzzles.dataset, puzzles.overrides))
    assert not endpoint.bodies
    assert [scores_of(trace)["format"] for trace in traces] == [1.0, 1.0]


def test_nothing_is_ever_uploaded(puzzles, tmp_path, monkeypatch):
    """Not where a file asks for it, and not where a flag does."""
    (tmp_path / "file.toml").write_text(
        f'push = true\n[env.taskset]\nid = "thinkimg-env"\npreset = "tiny"\n'
        f'dataset = "{puzzles.dataset.short}"\nset = {json.dumps(puzzles.overrides)}\n'
    )
    with Endpoint([TURN("", Answer("A"))]) as endpoint:
        argv = ["@", "file.toml", "--no-rich", "--client.base-url", endpoint.url, "--client.api-key-var", "NONE"]
        assert len(evaluate_with(monkeypatch, tmp_path, argv)) == 2
    (config,) = tmp_path.glob("outputs/*/configs/resolved/eval.json")
    assert json.loads(config.read_text())["push"] is False
    for flag in ("--push", "--push=true"):
        with pytest.raises(SystemExit, match="uploads nothing"):
            evaluate_with(monkeypatch, tmp_path, [flag])


def test_a_mistake_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^No data set is named"):
        evaluate_with(monkeypatch, tmp_path, ["--no-rich"])
    with pytest.raises(SystemExit, match="no_such"):
        evaluate_with(
            monkeypatch, tmp_path, ["--no-rich", "--env.taskset.dataset", "a", "--env.taskset.preset", "no_such"]
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The puzzles of the tiny preset, and what makes the rest."""
    root = tmp_path_factory.mktemp("verifiers") / "artifacts"
    overrides = [*SETTINGS, f"where.store={root}"]
    config = load_config("tiny", overrides)
    with Resources(config.where, say=lambda line: None) as resources:
        builder = Builder(config, Store(root), resources)
        dataset = builder.make(prepare)
        yield SimpleNamespace(config=config, overrides=overrides, resources=resources, builder=builder, dataset=dataset)


def test_vf_eval_plays_the_conversations_of_our_loop(made, tmp_path, monkeypatch):
    """300 demonstrations with all kinds of tools, turn by turn, against those that are stored."""
    demonstrations = made.builder.make(demonstrate, dataset=made.dataset)
    ids = [sample.sample_id for sample in made.dataset.split("train")[:300]]
    rows = {row.sample_id: row for row in demonstrations.trajectories() if row.sample_id in ids}
    images, view = ImageTable([made.dataset]), made.config.view()
    by_picture = {make_picture(images.decoded(row.images[0]), view).uuid: row for row in rows.values()}

    def script(body: dict, number: int) -> str:
        question = next(message["content"] for message in body["messages"] if message["role"] == "user")
        return by_picture[hash_pictures(question)[0]].turns[number].text

    with Endpoint(script) as endpoint:
        argv = arguments(endpoint.url, made.dataset, made.overrides, "--env.taskset.split", "train", "-n", "300")
        traces = evaluate_with(monkeypatch, tmp_path, argv)
    assert len(traces) == len(rows) == len(by_picture) == 300 and all(trace["ok"] for trace in traces)
    assert sum(len(row.images) > 1 for row in rows.values()) > 200
    assert count_equal(traces, rows, images, Tasks.of(made.config)) == 300


async def start(connect: Connect) -> list[str]:
    """The addresses of the servers, which hold the policy from then on."""
    async with await connect() as engine:
        return engine.urls


def test_vf_eval_plays_the_conversations_of_evaluate(made, tmp_path):
    """The same policy in the same server, greedily: all held-out puzzles whose history is encoded as it was sampled."""
    policy = made.builder.make(warmstart, dataset=made.dataset)
    evaluation = made.builder.make(evaluate, dataset=made.dataset, policy=policy, samples=300)
    (url,) = asyncio.run(start(make_connect(policy, settings_of(made.config), made.resources)))
    argv = arguments(f"{url}/v1", made.dataset, made.overrides)
    program = Path(sys.executable).with_name("thinkimg-vf-eval")
    done = subprocess.run([program, *argv], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    traces = read_traces(tmp_path)
    rows = {row.sample_id: row for row in evaluation.trajectories() if row.index == 0}
    assert len(rows) == len(traces) == 300 and all(trace["ok"] for trace in traces)
    assert sum(len(row.images) > 1 for row in rows.values()) > 100
    codec = Codec.load(policy.vocabulary)
    exact = [trace for trace in traces if survives(rows[trace["task"]["data"]["id"]], codec)]
    assert len(exact) >= 290
    assert count_equal(exact, rows, ImageTable([made.dataset]), Tasks.of(made.config)) == len(exact)


def survives(row: Trajectory, codec: Codec) -> bool:
    """Tell whether its turns, but the last, have the tokens that chat completions make of their texts."""
    sampled = iter([token for token, role in zip(row.tokens, row.roles, strict=True) if ROLES[role] is Role.SAMPLED])
    turns = [(turn.text, [*islice(sampled, turn.tokens)]) for turn in row.turns]
    role = "assistant\n"  # a tokenizer may join its end with a text's beginning
    return all(codec.encode(role + text) == [*codec.encode(role), *ids[:-1]] for text, ids in turns[:-1])
