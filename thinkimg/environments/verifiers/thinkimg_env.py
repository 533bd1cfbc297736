"""Environment for verifiers 0.4: our questions as a taskset, our loop as a harness, our rules as rewards.

    ThinkTaskset ──► ThinkTask ──► ThinkHarness.launch ──► play_turns ──► verifiers' interception ──► any server
                         └──► score: the trace's turns are played again, and rules look at the result

`thinkimg-vf-eval` is vf-eval with this environment, in this process, and without its upload of the results.
"""

import asyncio
import base64
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import httpx
import tenacity
import verifiers.v1 as vf
from verifiers.v1.cli.eval.main import main as run_vf_eval

from thinkimg.config.load import load_config
from thinkimg.conversation.picture import Picture
from thinkimg.conversation.protocol import IMAGE_PART, Content
from thinkimg.conversation.text_core import PendingCall, TextCore
from thinkimg.engine import play
from thinkimg.environments.task import Tasks
from thinkimg.errors import UserError, is_passing
from thinkimg.http_clients import make_client
from thinkimg.images.decode import encode_png
from thinkimg.records import Sample, StopReason
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset

__all__ = ["ThinkHarness", "ThinkTaskset"]

ATTEMPTS = 4
"""Requests for a turn, at most."""


class ThinkConfig(vf.TasksetConfig):
    """Data set and settings."""

    preset: str = "development"
    """Preset of thinkimg, or path of a YAML file."""
    set: list[str] = []
    """Settings, as a.b=value. `where.store` is the store of the data set."""
    dataset: str = ""
    """Data set, which must be named: the beginning of its fingerprint, or its path."""
    split: Literal["train", "held_out"] = "held_out"
    """Samples that become tasks."""


class ThinkData(vf.TaskData):
    """Question as a task; what a rollout in another process needs is in it, or in the store."""

    preset: str
    overrides: tuple[str, ...]
    directory: Path
    """The data set's."""
    sample: Sample

    def begin(self) -> tuple[Tasks, TextCore]:
        """Return the rules, and the conversation before the first turn."""
        tasks, images = open_tasks(self.preset, self.overrides, self.directory)
        return tasks, tasks.begin(tasks.make_pictures(map(images.decoded, self.sample.images)))


class ThinkTask(vf.Task[ThinkData]):
    """Question with the rewards of our rules."""

    @vf.reward
    async def rules(self, trace: vf.Trace) -> dict[str, float]:
        """Return the value of each rule that has one. What the trace holds is all that they depend on.

        Raises RuntimeError for a tool that breaks: an error of the trace, where no value would be a reward of 0.
        """
        tasks, core = self.data.begin()
        finished = [call for call in trace.calls if call.node is not None]
        turns = iter([(trace.nodes[call.node].message.content, call.finish_reason) for call in finished])

        async def take_turn() -> PendingCall | None:
            written, reason = next(turns, (None, None))
            if reason is None:
                core.stop = StopReason.MAX_TURNS
                return None
            return core.read(written or "", complete=reason != "length")

        with ThreadPoolExecutor(1) as pool:
            async for _ in play.play_turns(core, take_turn, pool):
                pass
            if core.stop is StopReason.FAILED:
                raise RuntimeError(core.error)
            loop, rows = asyncio.get_running_loop(), [(self.data.sample, core)]
            values = {rule: (await loop.run_in_executor(pool, tasks.score, rule, rows))[0] for rule in tasks.rules}
        return {rule: value for rule, value in values.items() if value is not None}


class ThinkTaskset(vf.Taskset[ThinkTask, ThinkConfig]):
    """Samples of a data set of thinkimg."""

    def load(self) -> Iterator[ThinkTask]:
        overrides = tuple(self.config.set)
        store = Store(load_config(self.config.preset, overrides).where.store)
        if not self.config.dataset:
            raise UserError("No data set is named.", hint="--env.taskset.dataset, and a set that names where.store.")
        dataset: Dataset = store.resolve(self.config.dataset, "dataset")
        tasks, images = open_tasks(self.config.preset, overrides, dataset.directory)
        for sample in dataset.split(self.config.split):
            pictures = tasks.make_pictures(map(images.decoded, sample.images))
            *_, question = tasks.messages(sample, pictures)
            data = ThinkData(
                id=sample.sample_id,
                prompt=[vf.UserMessage(content=show(question["content"], pictures))],
                system_prompt=tasks.system or None,
                preset=self.config.preset,
                overrides=overrides,
                directory=dataset.directory,
                sample=sample,
            )
            yield ThinkTask(data, self.config.task)


class ThinkHarness(vf.Harness[vf.HarnessConfig]):
    """Our loop in this process: only its model calls leave it."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        assert isinstance(data, ThinkData), "the harness plays the tasks of its own taskset"
        _, core = data.begin()
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages += [message.model_dump(exclude_none=True) for message in prompt]

        headers = {"Authorization": f"Bearer {secret}"}
        # verifiers leaves it to a harness to ask again: a server may close a connection just when it is used.
        patience, pauses = tenacity.stop_after_attempt(ATTEMPTS), tenacity.wait_exponential(0.5)
        again = tenacity.AsyncRetrying(
            stop=patience, wait=pauses, retry=tenacity.retry_if_exception(is_passing), reraise=True
        )
        host = httpx.URL(endpoint).host
        async with make_client(httpx.AsyncClient, host, headers=headers, timeout=None) as client:

            async def sample() -> dict[str, Any]:
                body = {"model": ctx.model, "messages": messages, "max_tokens": core.config.max_turn_tokens}
                reply = await client.post(f"{endpoint}/chat/completions", json=body)
                return reply.raise_for_status().json()["choices"][0]

            async def take_turn() -> PendingCall | None:
                choice = await again(sample)
                written = choice["message"]["content"] or ""
                messages.append({"role": "assistant", "content": written})
                return core.read(written, complete=choice["finish_reason"] != "length")

            with ThreadPoolExecutor(1, thread_name_prefix="tools") as pool:
                async for turn in play.play_turns(core, take_turn, pool):
                    if turn.observation is not None:
                        messages.append({"role": "user", "content": show(core.message, core.pictures[-1:])})
        return vf.ProgramResult(exit_code=int(core.stop is StopReason.FAILED), stdout="", stderr=core.error or "")


@cache
def open_tasks(preset: str, overrides: tuple[str, ...], directory: Path) -> tuple[Tasks, ImageTable]:
    """Return the rules of some settings, and the images of a data set."""
    return Tasks.of(load_config(preset, overrides)), ImageTable([Dataset.open(directory)])


def show(content: Content, pictures: list[Picture]) -> list[dict[str, Any]]:
    """Return a message's parts in OpenAI's form; the pictures, as the model sees them, take the places of images."""
    views = iter(pictures)
    return [show_picture(next(views)) if part == IMAGE_PART else dict(part) for part in content]


def show_picture(picture: Picture) -> dict[str, Any]:
    """Return a picture's view as a part of a message, without loss."""
    data = base64.b64encode(encode_png(picture.view)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def evaluate() -> None:
    """Run vf-eval with this environment: in this process, and never with an upload of the results."""
    argv = sys.argv[1:]
    if any(arg.startswith("--push") for arg in argv):
        raise SystemExit("thinkimg-vf-eval uploads nothing: leave --push out, or use vf-eval itself.")
    try:
        run_vf_eval(["thinkimg-env", "--env.agent.runtime.type", "subprocess", *argv, "--no-push"])
    except UserError as error:
        raise SystemExit(str(error)) from error
