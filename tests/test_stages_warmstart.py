"""The warm start's demonstrations: exact token streams of scripts that are wrong in stated ways; and users' own data."""

import contextlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from thinkimg.config import Config, load
from thinkimg.conversation import compare
from thinkimg.conversation.codec import Codec
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import right_calls
from thinkimg.records import StopReason, Trajectory, TurnKind, from_row
from thinkimg.stages import pairs, prepare, warmstart
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.image_table import load_samples


def demonstrations(config: Config, store: Store) -> tuple[Artifact, Artifact]:
    dataset, _ = prepare.prepare(config, store)
    with contextlib.ExitStack() as stack:
        base = warmstart.BaseModel(config, dataset, stack)
        known = pairs.pairs(config, store, split="train", count=24)[0] if warmstart.has_pairs(config) else None
        made, _ = store.build(
            "demonstrations",
            warmstart.script_recipe(config, dataset, known),
            lambda work: warmstart.demonstrate(work, config, dataset, base, lambda done, total: None, known),
        )
    return dataset, made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = load("tiny", ["data.train=240", "data.held_out=8"])
    return config, *demonstrations(config, Store(tmp_path_factory.mktemp("store")))


def rows(artifact: Artifact) -> list[Trajectory]:
    return [from_row(Trajectory, row) for row in artifact.table("trajectories").to_pylist()]


def test_every_demonstration_ends_with_an_answer_and_its_images_are_stored(made):
    config, dataset, scripted = made
    known = set(dataset.table("images", ["sha256"])["sha256"].to_pylist())
    known |= set(scripted.table("images", ["sha256"])["sha256"].to_pylist())
    for row in rows(scripted):
        assert row.stop is StopReason.ANSWER
        assert set(row.images) <= known and len(row.images) == len(row.grids)
        assert all(turn.kind is not TurnKind.MALFORMED for turn in row.turns)


def test_demonstrations_are_wrong_as_often_as_the_flaws_say_and_their_answers_are_then_a_guess(made):
    config, dataset, scripted = made
    samples = {sample.sample_id: sample for sample in load_samples(dataset, "train")}
    kinds, right_guesses, guesses = Counter(), 0, 0
    for row in rows(scripted):
        sample = samples[row.sample_id]
        kind = "guess" if len(row.turns) == 1 else "right" if right_calls(sample, row) else "wrong_call"
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


def test_without_tools_the_right_answer_is_demonstrated(tmp_path):
    config = load("tiny", ["data.train=12", "data.held_out=8", "conversation.tools=[]"])
    dataset, scripted = demonstrations(config, Store(tmp_path))
    answers = {sample.sample_id: sample.answer for sample in load_samples(dataset, "train")}
    assert all(len(row.turns) == 1 and row.answer == answers[row.sample_id] for row in rows(scripted))


def test_every_known_pair_is_compared_in_both_orders_with_the_rating_as_the_only_sampled_token(made, tmp_path):
    config, dataset, scripted = made
    known = {
        row["sample_id"]: row
        for row in Store(scripted.directory.parents[2])
        .resolve(next_input(scripted, "pairs"))
        .table("pairs")
        .to_pylist()
    }
    with contextlib.ExitStack() as stack:
        codec = Codec.load(warmstart.BaseModel(config, dataset, stack).directory)
    ratings = compare.rating_tokens(codec)
    compared = [from_row(Trajectory, row) for row in scripted.table("comparisons").to_pylist()]
    assert len(compared) == 4 * len(known) == 4 * 24
    seen = Counter()
    for row in compared:
        pair = known[row.sample_id]
        helps = [{pair["right"]: 2, pair["original"]: 1, pair["wrong"]: 0}[sha] for sha in row.images]
        assert row.roles == (0,) * (len(row.tokens) - 1) + (1,)
        assert row.tokens[-1] == ratings[int(np.argmax(helps))] and row.answer == compare.RATINGS[np.argmax(helps)]
        assert row.tokens[:-1] == tuple(compare.prompt(codec, pair["question"]))
        assert row.tokens.count(codec.image) == 2 and len(row.grids) == 2
        seen[tuple(helps)] += 1
    assert seen == {(1, 2): 24, (2, 1): 24, (1, 0): 24, (0, 1): 24}


def next_input(artifact: Artifact, name: str) -> str:
    found = artifact.manifest["recipe"]["inputs"][name]
    return f"{found['kind']}/{found['fingerprint']}/{found['attempt']}"


@pytest.fixture
def photographs(tmp_path) -> list[str]:
    """A folder of pictures with questions in JSONL, as a user has them; the overrides that name it."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": f"What is number {i}?", "answer": f"thing {i}"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return ["data.source=jsonl", f"data.path={tmp_path / 'questions.jsonl'}", "data.held_out_share=0.34"]


def test_a_tiny_model_is_made_for_a_users_own_questions(photographs, tmp_path):
    config = load("tiny", photographs)
    dataset, _ = prepare.prepare(config, Store(tmp_path / "store"))
    assert not warmstart.has_script(config)
    assert any("What is number" in text for text in warmstart.corpus(config, dataset))
    plain = warmstart.recipe(config, dataset, None).fingerprint
    other = load("tiny", [*photographs, "conversation.system=Look twice."])
    assert warmstart.recipe(other, dataset, None).fingerprint != plain  # its tokenizer is another


def test_a_users_own_demonstrations(photographs, tmp_path):
    plain = load("tiny", photographs)
    dataset, _ = prepare.prepare(plain, Store(tmp_path / "store"))
    sample = load_samples(dataset, "train")[0]
    turns = [
        '<think>Closer.</think><tool>{"name": "crop_image", "args": {"x": 0, "y": 0, "width": 40, "height": 40}}</tool>',
        f"<think>Yes.</think><answer>{sample.answer}</answer>",
    ]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"sample_id": sample.sample_id, "turns": turns}) + "\n")
    config = load("tiny", [*photographs, f"warmstart.demonstrations={path}"])
    _, scripted = demonstrations(config, Store(tmp_path / "store"))
    (row,) = rows(scripted)
    assert row.answer == sample.answer and row.turns[0].image is not None
    for bad, said in (
        ({"sample_id": "nobody", "turns": turns}, "nobody"),
        ({"sample_id": sample.sample_id, "turns": turns[:1]}, "does not work"),
        ({"sample_id": sample.sample_id, "turns": "text"}, "cannot be read"),
        ({"sample": 1}, "cannot be read"),
    ):
        path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=said):
            demonstrations(load("tiny", config_of(photographs, path)), Store(tmp_path / f"store-{said[:3]}"))


def config_of(photographs: list[str], path) -> list[str]:
    return [*photographs, f"warmstart.demonstrations={path}"]


def test_the_puzzles_are_refused_at_a_size_at_which_they_are_not_puzzles(tmp_path):
    with pytest.raises(UserError, match="112"):
        prepare.prepare(load("development"), Store(tmp_path))
