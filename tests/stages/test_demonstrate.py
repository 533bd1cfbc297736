"""Demonstrations: exact token streams of scripts that are wrong in stated ways; and users' own."""

import json
from collections import Counter

import numpy as np
import pytest
from single_stage import build_stage
from users_photographs import photographs

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.conversation import compare
from thinkimg.conversation.codec import Codec
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import has_right_calls
from thinkimg.records import Coordinates, StopReason, TurnKind
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.demonstrate import demonstrate, locate_start
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Dataset, Demonstrations

BROKEN_TOOL = '''"""Magnify."""

from thinkimg.images.tool import ToolArgs


class Args(ToolArgs):
    pass


def apply(image, args, frame):
    return image.resize({}["size"])
'''


def demonstrations(config: Config, store: Store) -> tuple[Dataset, Demonstrations]:
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        return dataset, builder.make(demonstrate, dataset=dataset)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = load_config("tiny", ["data.train=240", "data.held_out=8", "warmstart.pairs=24"])
    return config, *demonstrations(config, Store(tmp_path_factory.mktemp("store")))


def test_every_demonstration_ends_with_an_answer_and_its_images_are_stored(made):
    config, dataset, scripted = made
    known = set(dataset.table("images", ["sha256"])["sha256"].to_pylist())
    known |= set(scripted.table("images", ["sha256"])["sha256"].to_pylist())
    for row in scripted.trajectories():
        assert row.stop is StopReason.ANSWER
        assert set(row.images) <= known and len(row.images) == len(row.grids)
        assert all(turn.kind is not TurnKind.MALFORMED for turn in row.turns)


def test_demonstrations_are_wrong_as_often_as_the_flaws_say_and_their_answers_are_then_a_guess(made):
    config, dataset, scripted = made
    samples = {sample.sample_id: sample for sample in dataset.split("train")}
    kinds, right_guesses, guesses = Counter(), 0, 0
    for row in scripted.trajectories():
        sample = samples[row.sample_id]
        kind = "guess" if len(row.turns) == 1 else "right" if has_right_calls(sample, row) else "wrong_call"
        kinds[kind] += 1
        if kind == "right":
            assert row.answer == sample.answer
        else:
            guesses += 1
            right_guesses += row.answer == sample.answer
    flaws, count = config.warmstart.flaws, sum(kinds.values())
    assert abs(kinds["guess"] / count - flaws.guess) < 0.1
    assert abs(kinds["wrong_call"] / count - flaws.wrong_call) < 0.1
    assert 0.1 < right_guesses / guesses < 0.4  # a quarter, by chance


@pytest.mark.parametrize(("family", "protocol"), [
    ("qwen3_vl", "qwen"), ("qwen3_5", "qwen_xml"), ("qwen2_5_vl", "qwen"),
])  # fmt: skip
def test_with_the_preset_every_family_has_demonstrations_in_its_own_form(tmp_path, family, protocol):
    settings = [f"model.tiny.family={family}", "data.train=24", "data.held_out=8", "warmstart.pairs=2"]
    config = load_config("tiny", [*settings, *(["conversation.protocol=qwen"] if family == "qwen2_5_vl" else [])])
    dataset, scripted = demonstrations(config, Store(tmp_path))
    samples, unit = {sample.sample_id: sample for sample in dataset.split("train")}, config.talk().unit
    rows = list(scripted.trajectories())
    assert config.talk().form == protocol and len(rows) == len(samples) == 24
    right = [row for row in rows if has_right_calls(samples[row.sample_id], row)]
    assert right and all(row.answer == samples[row.sample_id].answer for row in right)
    opening = "<think>\n" if family == "qwen3_5" else ""  # of its chat template
    hasty = {
        turn.text.startswith(f"{opening}A quick look.") is (row not in right) for row in rows for turn in row.turns[:-1]
    }
    assert hasty == {True}
    assert {row.coordinates for row in rows} == {unit}
    crops = [json.loads(turn.args) for row in rows for turn in row.turns if turn.tool == "crop_image"]
    assert crops and {args["width"] for args in crops} == {250 if unit is Coordinates.THOUSANDTHS else 28}


def test_without_tools_the_right_answer_is_demonstrated(tmp_path):
    config = load_config("tiny", ["data.train=12", "data.held_out=8", "conversation.tools=[]"])
    dataset, scripted = demonstrations(config, Store(tmp_path))
    answers = {sample.sample_id: sample.answer for sample in dataset.split("train")}
    assert all(len(row.turns) == 1 and row.answer == answers[row.sample_id] for row in scripted.trajectories())


def test_every_known_pair_is_compared_in_both_orders_with_the_rating_as_the_only_sampled_token(made):
    config, dataset, scripted = made
    store = Store(scripted.directory.parents[2])
    known = {row["sample_id"]: row for row in store.origin(scripted, "pairs").rows()}
    with Resources(config.where) as resources:
        codec = Codec.load(locate_start(demonstrate.settings(config), dataset, resources))
    ratings = compare.rating_tokens(codec)
    compared = list(scripted.trajectories(table="comparisons"))
    assert len(compared) == 4 * len(known) == 4 * 24
    seen = Counter()
    for row in compared:
        pair = known[row.sample_id]
        helps = [{pair["right"]: 2, pair["original"]: 1, pair["wrong"]: 0}[sha] for sha in row.images]
        assert row.roles == (0,) * (len(row.tokens) - 1) + (1,)
        assert row.tokens[-1] == ratings[int(np.argmax(helps))] and row.answer == compare.RATINGS[np.argmax(helps)]
        assert row.tokens[:-1] == tuple(compare.encode_comparison(codec, pair["question"]))
        assert row.tokens.count(codec.image) == 2 and len(row.grids) == 2
        seen[tuple(helps)] += 1
    assert seen == {(1, 2): 24, (2, 1): 24, (1, 0): 24, (0, 1): 24}


def test_a_users_own_demonstrations(tmp_path):
    data = photographs(tmp_path)
    dataset, _ = build_stage(prepare, load_config("tiny", data), Store(tmp_path / "store"))
    sample = dataset.split("train")[0]
    turns = [
        '<think>Closer.</think><tool>{"name": "crop_image", "args": '
        '{"x": 0, "y": 0, "width": 40, "height": 40}}</tool>',
        f"<think>Yes.</think><answer>{sample.answer}</answer>",
    ]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"sample_id": sample.sample_id, "turns": turns}) + "\n")
    config = load_config("tiny", [*data, f"warmstart.demonstrations={path}"])
    _, scripted = demonstrations(config, Store(tmp_path / "store"))
    (row,) = scripted.trajectories()
    assert row.answer == sample.answer and row.turns[0].image is not None
    for bad, said in (
        ({"sample_id": "nobody", "turns": turns}, "nobody"),
        ({"sample_id": sample.sample_id, "turns": turns[:1]}, "does not work"),
        ({"sample_id": sample.sample_id, "turns": "text"}, "cannot be read"),
        ({"sample": 1}, "cannot be read"),
        ({"sample_id": sample.sample_id, "turns": [turns[0].replace("crop_image", "crop_img"), turns[1]]},
         r"calls the tool 'crop_img' in turn 1, which is not on offer\. Hint: .*crop_image"),
    ):  # fmt: skip
        path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=said):
            demonstrations(config, Store(tmp_path / f"store-{said[:3]}"))


@pytest.mark.parametrize("bad", [
    {"sample_id": "nobody", "turns": ["<think>A.</think><answer>a</answer>"]},
    {"sample_id": None, "turns": ["<think>No end.</think>"]},
    {"sample_id": None, "turns": ['<think>A.</think><tool>{"name": "nothing", "args": {}}</tool>',
                                  "<think>B.</think><answer>a</answer>"]},
    {"sample_id": None, "turns": 7},
    "no object",
])  # fmt: skip
def test_a_demonstration_that_cannot_be_used_is_counted_and_left_out(tmp_path, caplog, bad):
    data, store = photographs(tmp_path), Store(tmp_path / "store")
    dataset, _ = build_stage(prepare, load_config("tiny", data), store)
    (held_out, *_), (sample, *_) = dataset.split("held_out"), dataset.split("train")
    good = {"sample_id": sample.sample_id, "turns": [f"<think>Yes.</think><answer>{sample.answer}</answer>"]}
    if isinstance(bad, dict):
        bad = bad | {"sample_id": bad["sample_id"] or sample.sample_id}
    lines = [good, bad, {**good, "sample_id": held_out.sample_id}, good]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config("tiny", [*data, f"warmstart.demonstrations={path}"])
    _, scripted = demonstrations(config, store)
    assert [row.answer for row in scripted.trajectories()] == [sample.answer] * 2
    assert scripted.metrics["left_out"] == 2
    (told,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told.startswith("2 of 4 demonstrations are left out.") and "Hint:" in told
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:3]))
    with pytest.raises(UserError, match="None of 2 demonstrations can be used"):
        demonstrations(load_config("tiny", [*data, f"warmstart.demonstrations={path}"]), store)


@pytest.mark.parametrize("form", ["qwen", "qwen_xml"])
def test_demonstrations_in_another_protocol_than_the_models_are_refused(tmp_path, form):
    data, store = photographs(tmp_path), Store(tmp_path / "store")
    dataset, _ = build_stage(prepare, load_config("tiny", data), store)
    sample = dataset.split("train")[0]
    turns = [
        '<think>A.</think><tool>{"name": "get_image_info", "args": {}}</tool>',
        f"<think>B.</think><answer>{sample.answer}</answer>",  # a turn of each protocol
    ]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"sample_id": sample.sample_id, "turns": turns}))
    settings = [*data, f"warmstart.demonstrations={path}", "conversation.protocol=" + form]
    with pytest.raises(UserError, match=f"breaks the protocol {form} in turn 1: .*<tool_call>.*conversation.protocol"):
        demonstrations(load_config("tiny", settings), store)
    _, scripted = demonstrations(load_config("tiny", [*settings, "conversation.protocol=think"]), store)
    assert [row.answer for row in scripted.trajectories()] == [sample.answer]


def test_calls_that_fail_in_demonstrations_are_said_with_the_unit(tmp_path, caplog):
    data, store = photographs(tmp_path), Store(tmp_path / "store")
    dataset, _ = build_stage(prepare, load_config("tiny", data), store)
    lines = []
    for sample, edge in zip(dataset.split("train")[:3], (40, 990, 900), strict=True):
        call = {"name": "crop_image", "args": {"x": edge, "y": 0, "width": 40, "height": 40}}
        turns = [f"<think>A.</think><tool>{json.dumps(call)}</tool>", "<think>B.</think><answer>a</answer>"]
        lines.append({"sample_id": sample.sample_id, "turns": turns})
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for unit, failed in (("thousandths", [1]), ("pixels", [1, 2])):
        caplog.clear()
        settings = [*data, f"warmstart.demonstrations={path}", f"conversation.coordinates={unit}"]
        _, scripted = demonstrations(load_config("tiny", settings), store)
        assert len(list(scripted.trajectories())) == 3
        (said,) = [record.getMessage() for record in caplog.records if "call fails" in record.getMessage()]
        assert said.startswith(f"In {len(failed)} of 3 demonstrations a call fails") and f"are in {unit} " in said
        assert f"{lines[failed[0]]['sample_id']}, turn 1: crop_image: the rectangle ends at x=1030" in said


def test_a_users_tool_that_breaks_is_a_sentence_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "magnify.py").write_text(BROKEN_TOOL)
    monkeypatch.syspath_prepend(tmp_path)
    data = photographs(tmp_path)
    dataset, _ = build_stage(prepare, load_config("tiny", data), Store(tmp_path / "store"))
    sample = dataset.split("train")[0]
    turns = ['<think>A.</think><tool>{"name": "magnify", "args": {}}</tool>', "<think>B.</think><answer>a</answer>"]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"sample_id": sample.sample_id, "turns": turns}) + "\n")
    config = load_config("tiny", [*data, f"warmstart.demonstrations={path}", "conversation.tools=[magnify]"])
    with pytest.raises(UserError) as caught:
        demonstrations(config, Store(tmp_path / "store"))
    expected = "The tool magnify broke: KeyError: 'size' (magnify.py, line 11)."
    assert caught.value.message == expected and "{}" in caught.value.hint
