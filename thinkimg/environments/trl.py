"""Environment for TRL 1.16: its GRPOTrainer plays our conversations, and our rules are its reward functions.

    prepare_processor ──► chat template, parser     environment ──► reset ──► a tool's method ──► play_turns
    make_dataset ──► prompt, views, originals       reward_functions ◄── the environments of a batch

TRL ends a conversation with the first turn that calls none of the tools, and counts tokens itself.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from copy import copy
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from thinkimg.config.tree import Config
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import Protocol, ToolCall, load_protocol
from thinkimg.conversation.template import quote, write_template
from thinkimg.conversation.text_core import PendingCall, TextCore, withhold
from thinkimg.engine import play
from thinkimg.environments.task import Tasks
from thinkimg.errors import UserError
from thinkimg.images.decode import decode
from thinkimg.images.tool import Tool, describe_argument
from thinkimg.images.toolbox import load_tools
from thinkimg.records import Sample, StopReason
from thinkimg.store.image_table import STORED, ImageTable
from thinkimg.store.kinds import Dataset

if TYPE_CHECKING:
    import datasets
    from transformers import ProcessorMixin

Reward = Callable[..., list[float | None]]
RESERVED = ("reset", "get_reward")
"""Methods of an environment that TRL calls itself."""
TYPES = {"integer": int, "number": float, "boolean": bool, "string": str, "array": list, "object": dict}
"""Type of JSON Schema -> type hint, from which transformers makes the schema again."""

# TRL hands tools to the template, which ours describes in the system prompt. It also renders calls, of which no token
# reaches the model: to see that the template can, and to find where a tool's result begins.
PREAMBLE = """\
{%- set tools = none %}
{%- set plain = namespace(messages=[]) %}
{%- for message in messages %}
    {%- if message['tool_calls'] %}
        {%- set written = namespace(text='') %}
        {%- for call in message['tool_calls'] %}
            {%- set fields = {'name': call['function']['name'], ARGS: call['function']['arguments']} %}
            {%- set written.text = written.text ~ OPEN ~ fields | tojson ~ CLOSE %}
        {%- endfor %}
        {%- set content = message['content'] %}
        {%- set parts = [{'type': 'text', 'text': content}] if content is string else content %}
        {%- set message = {'role': 'assistant', 'content': parts + [{'type': 'text', 'text': written.text}]} %}
    {%- endif %}
    {%- set plain.messages = plain.messages + [message] %}
{%- endfor %}
{%- set messages = plain.messages %}
"""


class Environment:
    """Conversation of one rollout. TRL takes every method of a subclass but reset() for a tool."""

    _tasks: ClassVar[Tasks]
    _pool: ClassVar[Executor]
    _sample: Sample
    _core: TextCore
    _lock: asyncio.Lock
    """Lock of a call: TRL runs the calls of one message side by side."""

    def reset(self, *, originals: Sequence[bytes], sample: Sample, **_: Any) -> None:
        """Begin the conversation about a row of make_dataset."""
        self._sample = sample
        self._core = self._tasks.begin(self._tasks.make_pictures(decode(data, STORED) for data in originals))
        self._lock = asyncio.Lock()

    async def _call(self, name: str, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a tool's message shows: the picture as the model sees it, and the text.

        Raises ValueError where nothing can be shown any more; TRL gives the model its text.
        """
        core, protocol = self._core, self._core.protocol

        async def take_turn() -> PendingCall | None:
            return core.read(protocol.render_thought("") + protocol.render_call(name, args))

        async with self._lock, aclosing(play.play_turns(core, take_turn, self._pool)) as turns:
            turn = await anext(turns, None)
            if turn is None or turn.observation is None:
                raise ValueError(core.error or "The conversation has ended; give an answer.")
            image = [{"type": "image", "image": core.pictures[-1].view}] if turn.image else []
        return [*image, {"type": "text", "text": turn.observation}]

    def _complete(self, completion: Sequence[Mapping[str, Any]]) -> tuple[Sample, TextCore]:
        """Return sample and conversation as TRL has ended it; each reward function asks for them.

        The turn that TRL sampled last is read. Results that no turn follows had no room: TRL runs a call before it
        sees that, and then drops the message.
        """
        core = copy(self._core)
        number = max(number for number, message in enumerate(completion) if message["role"] == "assistant")
        last, shown = completion[number], sum(message.get("name") in core.tools for message in completion[:number])
        withheld = core.turns[shown:]
        core.turns = core.turns[:shown] + [withhold(turn) for turn in withheld]
        core.pictures = core.pictures[: len(core.pictures) - sum(turn.image is not None for turn in withheld)]
        if core.stop is None and withheld:
            core.stop = StopReason.MAX_TOKENS
        elif core.stop is None and not last.get("tool_calls"):
            core.read(last["content"], complete=last.get("finish_reason") != "length")
        return self._sample, core


def environment(config: Config) -> type[Environment]:
    """Return the class for GRPOTrainer's `environment_factory`, with a method for each of `conversation.tools`.

    Raises UserError for a tool whose name has a meaning of its own there.
    """
    tasks = Tasks.of(config)
    members = {name: make_method(tool) for name, tool in load_tools(tasks.conversation.tools).items()}
    for name in members:
        if name in RESERVED or name.startswith("_"):
            raise UserError(
                f"TRL takes no method '{name}' of an environment for a tool.",
                hint=f"Rename its module: neither with _ at the beginning, nor {' or '.join(RESERVED)}.",
            )
    members |= {"_tasks": tasks, "_pool": ThreadPoolExecutor(1, thread_name_prefix="tools")}
    return type("ThinkEnvironment", (Environment,), members)


def make_method(tool: Tool) -> Callable[..., Awaitable[list[dict[str, Any]]]]:
    """Return a tool as a method, with the signature and docstring from which transformers makes its JSON schema."""

    async def method(self: Environment, /, **args: Any) -> list[dict[str, Any]]:
        return await self._call(tool.name, args)

    schema = tool.Args.model_json_schema()
    arguments: dict[str, dict[str, Any]] = schema["properties"]
    hints = {name: make_hint(entry) for name, entry in arguments.items()}
    empty, required = inspect.Parameter.empty, schema.get("required", ())
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, hint in hints.items():
        default = empty if name in required else arguments[name].get("default")
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    lines = [f"    {name}: {describe_argument(entry)}" for name, entry in arguments.items()]
    method.__name__ = method.__qualname__ = tool.name
    method.__annotations__ = hints
    method.__signature__ = inspect.Signature(parameters)
    method.__doc__ = "\n".join([" ".join(tool.description.split()), "", "Args:", *lines])
    return method


def make_hint(schema: dict[str, Any]) -> Any:
    """Return the type hint from which transformers makes a schema again; Any for one of another form."""
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if "anyOf" in schema:
        return reduce(or_, map(make_hint, schema["anyOf"]))
    return TYPES.get(schema.get("type", ""), Any)


def reward_functions(config: Config) -> list[Reward]:
    """Return our rules as reward functions, one each. `rewards.functions` are TRL's own form: add them as they are."""
    tasks = Tasks.of(config)

    def make(rule: str) -> Reward:
        def reward(
            completions: list[list[dict[str, Any]]], environments: list[Environment], **_: Any
        ) -> list[float | None]:
            pairs = zip(environments, completions, strict=True)
            return tasks.score(rule, [environment._complete(completion) for environment, completion in pairs])

        reward.__name__ = rule
        return reward

    return [make(rule) for rule in tasks.rules]


def make_dataset(dataset: Dataset, config: Config, split: str = "train") -> "datasets.Dataset":
    """Return the samples of "train" or "held_out" as rows for GRPOTrainer; a row is made when it is read.

    Columns: `prompt`, messages without their pictures; `images`, the pictures as the model sees them, for which the
    prompt has places; `originals`, their bytes at full resolution; `sample`. A view in place of the original is what
    keeps coordinates true: TRL's processor would choose a size of its own.
    """
    import datasets

    tasks, table = Tasks.of(config), ImageTable([dataset])
    samples = dataset.split(split)

    def make_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [show_sample(samples[number]) for number in batch["number"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def show_sample(sample: Sample) -> dict[str, Any]:
        pictures = tasks.make_pictures(map(table.decoded, sample.images))
        return {
            "prompt": tasks.messages(sample, pictures),
            "images": [picture.view for picture in pictures],
            "originals": [table.get(sha256) for sha256 in sample.images],
            "sample": sample,
        }

    return datasets.Dataset.from_dict({"number": range(len(samples))}).with_transform(make_rows)


def prepare_processor(processor: "ProcessorMixin", config: Config) -> Codec:
    """Have a processor render and read conversations as in training; return the codec of its tokenizer.

    It gets our chat template, in place of stock ones without tools (Qwen2.5-VL); the protocol's own parser; and sizes
    of pictures that leave a view as it is. Raises UserError as Codec.
    """
    tasks = Tasks.of(config)
    codec = Codec(processor.tokenizer, tasks.conversation.thinking)
    protocol = load_protocol(tasks.conversation.form)
    names = {"ARGS": protocol.args_key, "OPEN": protocol.open_call, "CLOSE": protocol.close_call}
    sets = "".join(f"{{%- set {name} = {quote(text)} %}}\n" for name, text in names.items())
    processor.chat_template = sets + PREAMBLE + write_template(codec, protocol)
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 2**31}  # pixels; a view keeps its size
    processor.tokenizer.response_template = {}  # TRL asks for one, and knows none for this chat template
    processor.tokenizer.parse_response = partial(parse_message, codec, protocol)
    return codec


def parse_message(codec: Codec, protocol: Protocol, ids: Sequence[int], **_: Any) -> dict[str, Any]:
    """Return sampled ids as a message, with its call if it is one that the protocol reads.

    Its `finish_reason` is "length" where a limit cut the turn off. TRL hands the message on as it is.
    """
    is_whole = ids[-1] == codec.end
    text = codec.turn_start + codec.decode(ids[:-1] if is_whole else ids)
    message: dict[str, Any] = {"role": "assistant", "content": text, "finish_reason": "stop" if is_whole else "length"}
    if is_whole and isinstance(action := protocol.parse(text), ToolCall):
        message["tool_calls"] = [{"type": "function", "function": {"name": action.name, "arguments": action.args}}]
    return message


def make_arguments(codec: Codec, config: Config) -> dict[str, Any]:
    """Return arguments of GRPOConfig that carry our limits over: turns, tokens, and tokens that are never sampled.

    For generation with transformers. TRL bounds a completion, results of tools included, and no single turn.
    """
    talk = config.talk()
    return {
        "max_tool_calling_iterations": talk.max_turns - 1,  # after each of these rounds TRL samples a turn
        "max_completion_length": talk.max_tokens,
        "generation_kwargs": {"suppress_tokens": list(codec.banned)},
    }
