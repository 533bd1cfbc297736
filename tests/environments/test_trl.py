"""TRL's own GRPOTrainer plays our conversations: its tokens, its pictures, its rewards and one step of it."""

import asyncio
import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from single_stage import build_stage
from trl import import_utils

import_utils.is_vllm_available = lambda *_, **__: False  # TRL would import vLLM (10 s), which nothing here calls

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.utils import get_json_schema  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from thinkimg.config.load import load_config  # noqa: E402
from thinkimg.conversation.codec import Codec  # noqa: E402
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script  # noqa: E402
from thinkimg.conversation.picture import make_picture  # noqa: E402
from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol  # noqa: E402
from thinkimg.conversation.text_core import TextCore  # noqa: E402
from thinkimg.conversation.tokens import expansion  # noqa: E402
from thinkimg.engine import play  # noqa: E402
from thinkimg.environments.task import Tasks  # noqa: E402
from thinkimg.environments.trl import (  # noqa: E402
    environment,
    make_arguments,
    make_dataset,
    parse_message,
    prepare_processor,
    reward_functions,
)
from thinkimg.errors import UserError  # noqa: E402
from thinkimg.images.decode import decode, pixel_hash  # noqa: E402
from thinkimg.images.toolbox import load_tools  # noqa: E402
from thinkimg.records import StopReason  # noqa: E402
from thinkimg.rewards.batch import Batch  # noqa: E402
from thinkimg.rewards.settings import RULES  # noqa: E402
from thinkimg.stages.prepare import prepare  # noqa: E402
from thinkimg.store.artifacts import Store  # noqa: E402
from thinkimg.store.image_table import ImageTable  # noqa: E402

FORMS = ("think", "qwen", "qwen_xml")
CROP = ToolCall("crop_image", {"x": 28, "y": 0, "width": 56, "height": 28})
AGAIN = ToolCall("crop_image", {"x": 0, "y": 0, "width": 28, "height": 28, "image": "original"})
TURN = ToolCall("rotate_image", {"angle": 90})
WRONG = ToolCall("zoom_image", {"x": 0, "y": 0, "width": 28, "height": 28, "factor": 99})


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """Two puzzles, as `prepare` makes them, and the settings that they are for."""
    root = tmp_path_factory.mktemp("puzzles")
    config = load_config("tiny", ["data.train=2", "data.held_out=1", f"where.store={root}"])
    dataset, _ = build_stage(prepare, config, Store(root))
    return SimpleNamespace(config=config, dataset=dataset, samples=dataset.split("train"), images=ImageTable([dataset]))


class Cut(str):
    """A turn that a limit cut off just before its end."""


class Scripted:
    """A trainer whose turns are written, in place of its generation; keeps what it generated and what it shows."""

    def __init__(self, trainer: GRPOTrainer, codec: Codec, scripts: list[list[str]]):
        self.codec, self.scripts, self.shown = codec, scripts, []
        self.active, self.round = list(range(len(scripts))), 0
        self._generate, trainer._generate = trainer._generate, self.generate
        trainer._generate_single_turn = self.sample

    def sample(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert len(prompt_ids) == len(self.active)
        turns = [self.scripts[i][self.round] for i in self.active]
        self.round += 1
        self.active = [i for i in self.active if self.round < len(self.scripts[i])]
        return [[*self.codec.encode(turn), *[self.codec.end] * (type(turn) is not Cut)] for turn in turns], None

    def generate(self, prompts):
        self.output = self._generate(prompts)
        return self.output


def scripts_of(form: str, samples) -> list[list[str]]:
    """The turns of two rollouts for each of two samples; the last ends TRL's conversation without an answer."""
    turn = lambda action: load_protocol(form).render_turn("I look.", action)  # noqa: E731
    right, other = (Answer(sample.answer) for sample in samples)
    return [
        [turn(CROP), turn(right)],
        [turn(WRONG), turn(Answer("no such thing"))],
        [turn(TURN), turn(AGAIN), turn(other)],
        ["No call and no answer."],
    ]


def step(puzzles, model, form, folder, scripts=None, room=None):
    """One step of TRL on scripted rollouts; the parameters that it changed are in `changed`.

    room: tokens of a completion beyond those of its first turn, CROP.
    """
    limits = ["conversation.max_turn_tokens=300", "conversation.max_tokens=1500"]  # few words have a token of their own
    config = load_config(
        "tiny", [f"where.store={puzzles.config.where.store}", f"conversation.protocol={form}", *limits]
    )
    processor = AutoProcessor.from_pretrained(model, padding_side="left")
    processor.image_processor.size = {"shortest_edge": 200 * 200, "longest_edge": 10**6}  # a view would be enlarged
    codec = prepare_processor(processor, config)
    limits = make_arguments(codec, config)
    if room is not None:
        limits["max_completion_length"] = len(codec.encode(load_protocol(form).render_turn("I look.", CROP))) + 1 + room
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_steps=1, learning_rate=1e-3,
        bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, shuffle_dataset=False,
        disable_tqdm=True, gradient_checkpointing=False, max_grad_norm=1e9, **limits,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=make_dataset(puzzles.dataset, config),
        reward_funcs=reward_functions(config),
        environment_factory=environment(config),
        processing_class=processor,
    )
    scripts = scripts or scripts_of(form, puzzles.samples)
    scripted = Scripted(trainer, codec, scripts)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches, prepare_inputs = [], trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: batches.append(prepare_inputs(inputs)) or batches[-1]
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return SimpleNamespace(
        config=config, codec=codec, scripts=scripts, output=scripted.output, batch=batches[0], changed=changed,
        log=trainer.state.log_history[0], advantages=[*trainer._logs["advantages"]],
    )  # fmt: skip


@pytest.fixture(scope="module")
def steps(puzzles, tiny_models, tmp_path_factory):
    """One step with each protocol, by its name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {form: step(puzzles, tiny_models[0], form, tmp_path_factory.mktemp(form)) for form in FORMS}
    torch.set_num_threads(threads)


def play_ours(puzzles, done, number: int) -> Episode:
    """The same script, as a rollout of ours plays it."""
    config, sample = done.config, puzzles.samples[number // 2]
    pictures = [make_picture(puzzles.images.decoded(sha), config.view()) for sha in sample.images]
    rules = ConversationSpec(config.talk(), config.view(), done.codec)
    episode = Episode(sample, pictures, rules, policy="p", group_id="g", index=number)
    play_script(episode, done.scripts[number])
    return episode


def expand(episode: Episode) -> list[int]:
    """Its token ids as a model gets them, with a token for each patch of a picture."""
    ids, slots = episode.stream.ids, [picture.slot for picture in episode.pictures]
    return np.repeat(ids, expansion(ids, [slot.tokens for slot in slots], episode.codec.image)).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_pictures_are_those_of_our_rollouts(puzzles, steps, form):
    done = steps[form]
    prompts, completions, sampled, messages, _, _, images, _ = done.output
    for number in range(3):
        episode = play_ours(puzzles, done, number)
        assert prompts[number] + completions[number] == expand(episode)
        assert len(episode.pictures) == (2, 1, 3)[number]
        assert [pixel_hash(image) for image in images[number]] == [picture.uuid for picture in episode.pictures]
        assert sum(sampled[number]) == len(episode.stream.logprobs)
        assert [m["content"] for m in messages[number] if m["role"] == "assistant"] == done.scripts[number]
    assert prompts[3] == prompts[2] and len(completions[3]) == sum(sampled[3])
    grids = [grid for number in (0, 1, 2) for grid in play_ours(puzzles, done, number).stream.grids]
    last = play_ours(puzzles, done, 3).stream.grids[:1]
    assert done.batch["image_grid_thw"].tolist() == [list(grid) for grid in [*grids, *last]]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_taken_on_our_rewards(puzzles, steps, form):
    done, samples = steps[form], {sample.sample_id: sample for sample in puzzles.samples}
    episodes = [play_ours(puzzles, done, number) for number in range(4)]
    images = SimpleNamespace(decoded={p.sha256: p.image for e in episodes for p in e.pictures}.__getitem__)
    batch = Batch([episode.trajectory() for episode in episodes[:3]], samples, done.config.rewards, images)
    for name in RULES.shipped:
        values = [score.value for score in RULES[name].score(batch)] + [0.0]  # the last has neither call nor answer
        assert done.log[f"rewards/{name}/mean"] == pytest.approx(np.mean(values)), name
    assert done.log["tools/call_frequency"] == 1.0 and done.log["tools/failure_frequency"] == 0.0
    assert math.isfinite(done.log["grad_norm"]) and done.log["grad_norm"] > 0
    assert any("visual" in name for name in done.changed) and any("language_model" in name for name in done.changed)


def test_nothing_is_paid_that_trl_left_out(puzzles, tiny_models, tmp_path, monkeypatch):
    """The limit drops the first one's picture and the second one's end; the last one's tool breaks."""
    turn, (right, other) = load_protocol("think").render_turn, [Answer(sample.answer) for sample in puzzles.samples]
    scripts = [[turn("I look.", CROP)], [Cut(turn("", right))], [turn("", other)], [turn("", TURN)]]
    monkeypatch.setattr(play, "run_tool", lambda call: break_tool() if call.call == TURN else call.run())
    done = step(puzzles, tiny_models[0], "think", tmp_path, scripts, room=8)
    means = {name: done.log[f"rewards/{name}/mean"] for name in RULES.shipped}
    assert means == {"answer": pytest.approx(1 / 3), "format": pytest.approx(1 / 3), "tool": 0.0}
    assert done.advantages == [0.0] * 4  # the third is alone in its group


def test_methods_have_the_arguments_of_the_tools(puzzles):
    made, tools = environment(puzzles.config)(), load_tools()
    for name, tool in tools.items():
        schema, ours = get_json_schema(getattr(made, name))["function"], tool.Args.model_json_schema()
        assert schema["name"] == name and schema["description"] == " ".join(tool.description.split())
        assert schema["parameters"].get("required", []) == ours.get("required", [])
        for argument, entry in ours["properties"].items():
            shown = schema["parameters"]["properties"][argument]
            assert shown.get("type") == entry.get("type") and shown.get("enum") == entry.get("enum")
            assert shown["description"]


def test_only_the_tools_on_offer_are_methods(puzzles):
    config = load_config("tiny", [f"where.store={puzzles.config.where.store}", "conversation.tools=[crop_image]"])
    made = environment(config)
    assert {name for name in dir(made) if not name.startswith("_")} == {"reset", "crop_image"}


def begin(puzzles, *settings: str):
    config = load_config("tiny", [f"where.store={puzzles.config.where.store}", *settings])
    made, row = environment(config)(), make_dataset(puzzles.dataset, config)[0]
    made.reset(**row)
    return made, row, config


def say(text: str) -> dict:
    return {"role": "assistant", "content": text, "finish_reason": "stop"}


def call(made, *calls: ToolCall) -> list[dict]:
    """The messages of calls, one in each turn, as TRL makes them."""
    messages = []
    for one in calls:
        try:
            content = asyncio.run(getattr(made, one.name)(**one.args))
        except Exception as error:
            content = str({"error": str(error)})
        messages.append(say("") | {"tool_calls": [{"function": {"name": one.name, "arguments": one.args}}]})
        messages.append({"role": "tool", "name": one.name, "content": content})
    return messages


def end(made, config, *messages: dict) -> dict[str, float | None]:
    """The reward of each rule for a conversation of these messages."""
    rules = reward_functions(config)
    return {rule.__name__: rule(completions=[[*messages]], environments=[made])[0] for rule in rules}


def break_tool():
    raise MemoryError("no memory")


def test_rows_have_the_view_and_the_bytes_of_the_original(puzzles):
    made, row, config = begin(puzzles)
    (view,), (original,), sample = row["images"], row["originals"], row["sample"]
    *_, question = row["prompt"]
    assert view.size == (112, 112) and f"Image 0: {view.width}x{view.height}" in question["content"][-1]["text"]
    full = decode(original)
    assert full.size > view.size and pixel_hash(full) == sample.images[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_calls_of_one_message_are_run_one_after_the_other(puzzles):
    """TRL runs them side by side; each has the image of the call before as its current one."""
    made, _, _ = begin(puzzles)

    async def run():
        return await asyncio.gather(made.rotate_image(angle=90), made.crop_image(**CROP.args), made.flip_image())

    asyncio.run(run())
    assert [turn.source for turn in made._core.turns] == [0, 1, 2]
    assert [turn.tool for turn in made._core.turns] == ["rotate_image", "crop_image", "flip_image"]


def test_wrong_calls_are_answered_as_in_training(puzzles):
    made, _, _ = begin(puzzles)
    (part,) = asyncio.run(made.zoom_image(**WRONG.args))
    assert part["text"].startswith("Error: zoom_image:") and made._core.turns[0].status == "error"


def test_nothing_is_shown_after_the_last_turn(puzzles):
    made, _, config = begin(puzzles, "conversation.max_turns=2")
    messages = call(made, TURN, TURN)
    with pytest.raises(ValueError, match="ended"):
        asyncio.run(made.rotate_image(angle=90))
    assert len(made._core.turns) == 2
    assert end(made, config, *messages, say("<think></think><answer>late</answer>"))["answer"] == 0.0


@pytest.mark.parametrize("last", ["answer", "malformed", "cut", "call"])
def test_a_broken_tool_leaves_the_scores_of_its_conversation_missing(puzzles, monkeypatch, last):
    """As in training. The other conversation of the batch has its own."""
    made, row, config = begin(puzzles)
    other, _, _ = begin(puzzles)
    right = say(f"<think></think><answer>{row['sample'].answer}</answer>")
    seen = [*call(other, CROP), right]
    monkeypatch.setattr(play, "run_tool", lambda call: break_tool())
    messages = call(made, TURN)
    assert "rotate_image broke: MemoryError" in messages[-1]["content"]
    ends = {"answer": right, "malformed": say("?"), "cut": right | {"finish_reason": "length"}}
    completion = [*messages, ends[last]] if last in ends else messages[:-1]
    for rule in reward_functions(config):
        assert rule(completions=[completion, seen], environments=[made, other]) == [None, 1.0]


def test_an_environment_is_used_again_without_a_trace_of_before(puzzles):
    made, row, config = begin(puzzles)
    right = say(f"<think></think><answer>{row['sample'].answer}</answer>")
    assert end(made, config, *call(made, CROP), right) == {"answer": 1.0, "format": 1.0, "tool": 1.0}
    made.reset(**row)
    assert end(made, config, right) == {"answer": 1.0, "format": 1.0, "tool": 0.0}


def test_a_turn_that_was_cut_off_calls_no_tool(puzzles, tiny_models):
    codec, protocol = Codec.load(tiny_models[0]), load_protocol("think")
    ids = codec.encode(protocol.render_turn("I look.", CROP))
    assert "tool_calls" not in parse_message(codec, protocol, ids)
    (call,) = parse_message(codec, protocol, [*ids, codec.end])["tool_calls"]
    assert call["function"] == {"name": CROP.name, "arguments": CROP.args}


def test_only_a_turn_with_its_end_is_paid(puzzles, tiny_models):
    """A limit cuts a right answer off anywhere, just before its end included."""
    made, row, config = begin(puzzles)
    codec, protocol = Codec.load(tiny_models[0]), load_protocol("think")
    ids = codec.encode(protocol.render_turn("I look.", Answer(row["sample"].answer)))
    assert end(made, config, parse_message(codec, protocol, [*ids, codec.end]))["answer"] == 1.0
    for length in range(1, len(ids) + 1):
        message = parse_message(codec, protocol, ids[:length])
        assert end(made, config, message) == {"answer": 0.0, "format": 0.0, "tool": 0.0}
        assert made._complete([message])[1].stop is StopReason.TRUNCATED


class Full(TextCore):
    """Conversation of ours in which only so many results have room."""

    room = 0

    def tell(self, content, picture):
        self.room -= 1
        return self.room >= 0 and super().tell(content, picture)


def play_in_room(made, config, calls, room: int) -> TextCore:
    tasks = Tasks.of(config)
    core = Full(made._core.pictures[:1], tasks.conversation, tasks.view)
    core.room = room
    for one in calls:
        pending = core.read(core.protocol.render_thought("") + core.protocol.render_call(one.name, one.args))
        core.observe(pending.run())
    return core


KINDS = (CROP, TURN, WRONG, ToolCall("get_image_info", {}), ToolCall("rotate_image", {"angle": 0}))
PLAYS = [calls for length in (1, 2) for calls in product(KINDS, repeat=length)]


@pytest.mark.parametrize("dropped", ["message", "turn after it"])
def test_a_result_without_room_is_one_that_the_model_did_not_see(puzzles, dropped):
    """As in our loop: the turns, the pictures and the end of every conversation are the same."""
    made, row, config = begin(puzzles, "conversation.max_turns=2")
    unknown = [say("") | {"tool_calls": ["?"]}, {"role": "tool", "name": "no_such", "content": "Tool not found."}]
    for calls in PLAYS:
        made.reset(**row)
        messages = unknown + call(made, *calls)  # TRL answers a call of an unknown tool itself
        completion = messages[:-1] if dropped == "message" else messages
        for _ in RULES.shipped:  # each reward function asks
            _, core = made._complete(completion)
        ours = play_in_room(made, config, calls, len(calls) - 1)
        assert (core.turns, core.stop) == (ours.turns, ours.stop), calls
        assert [picture.sha256 for picture in core.pictures] == [picture.sha256 for picture in ours.pictures]
        _, core = made._complete([*messages, say("<think></think><answer>x</answer>")])
        assert core.turns[: len(calls)] == play_in_room(made, config, calls, 9).turns
    made.reset(**row)
    assert end(made, config, *call(made, CROP)[:-1])["tool"] == 0.0


@pytest.mark.parametrize("name", ["reset", "get_reward", "_call", "_mine"])
def test_a_tool_with_a_name_of_the_class_is_refused(puzzles, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(
        '"""Nothing."""\n'
        "from thinkimg.images.tool import ToolArgs\n"
        "class Args(ToolArgs): pass\n"
        "def apply(image, args, frame): return image\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config("tiny", [f"where.store={puzzles.config.where.store}", f"conversation.tools=[{name}]"])
    with pytest.raises(UserError, match=f"'{name}'") as refused:
        environment(config)
    assert refused.value.hint


@pytest.mark.parametrize("argument", ["self", "name", "args", "made"])
def test_any_argument_of_a_call_is_answered_as_in_training(puzzles, argument):
    made, _, _ = begin(puzzles)
    messages = call(made, ToolCall("flip_image", {argument: 1}))
    assert "takes no argument" in messages[-1]["content"][-1]["text"] and len(made._core.turns) == 1


def test_turns_are_limited_and_no_placeholder_is_sampled(puzzles, tiny_models):
    codec = Codec.load(tiny_models[0])
    arguments = make_arguments(codec, puzzles.config)
    assert arguments["max_tool_calling_iterations"] + 1 == puzzles.config.conversation.max_turns
    suppressed = arguments["generation_kwargs"]["suppress_tokens"]
    assert codec.image in suppressed and codec.end not in suppressed


def test_rules_of_a_user_are_reward_functions(puzzles, tmp_path, monkeypatch):
    (tmp_path / "brevity_rule.py").write_text(
        '"""Rule `brevity_rule`."""\n'
        "from thinkimg.rewards.batch import Score\n"
        "def score(batch):\n"
        '    return [Score.of(1 / len(row.turns), "?") for row in batch.trajectories]\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    made, _, config = begin(puzzles, "rewards.rules=[brevity_rule]")
    assert end(made, config, *call(made, TURN), say("<think></think><answer>x</answer>"))["brevity_rule"] == 0.5


def test_the_loop_is_the_one_of_rollouts(puzzles, monkeypatch):
    """As in tests/serving/test_one_loop.py: whoever changes play_turns changes what TRL trains on."""
    made, row, config = begin(puzzles)

    async def other_turns(core, *_, **__):
        core.read(f"<think></think><answer>{row['sample'].answer}</answer>")
        yield core.turns[-1]

    monkeypatch.setattr(play, "play_turns", other_turns)
    messages = call(made, TURN)
    assert "ended" in messages[-1]["content"]
    assert end(made, config, *messages, say("anything"))["answer"] == 1.0


def test_the_template_renders_a_history_as_the_policy_wrote_it(puzzles, tiny_models):
    for form in ("think", "qwen"):
        config = load_config("tiny", [f"where.store={puzzles.config.where.store}", f"conversation.protocol={form}"])
        processor = AutoProcessor.from_pretrained(tiny_models[0])
        prepare_processor(processor, config)
        call = {"type": "function", "function": {"name": CROP.name, "arguments": CROP.args}}
        thought = load_protocol(form).render_thought("I look.")
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": thought, "tool_calls": [call]},
            {"role": "tool", "content": "done"},
        ]
        text = processor.apply_chat_template(messages, tools=[call], tokenize=False)
        written = text.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
        assert load_protocol(form).parse(written) == CROP and "done" in text
        assert json.dumps(call) not in text
