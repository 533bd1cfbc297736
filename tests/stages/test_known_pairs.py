"""Known pairs: puzzles with an image from which they can be read and one from which they can't, stored by content."""

from single_stage import build_stage, recipe_of

from thinkimg.config.load import load_config
from thinkimg.conversation.protocol import ToolCall
from thinkimg.data.split import draw
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles.known_pairs import apply_calls
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.known_pairs import CLIP_PAIRS, known_pairs
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable

CONFIG = load_config("tiny", ["data.train=16", "data.held_out=8", "warmstart.pairs=12"])


def test_each_row_is_a_puzzle_whose_right_image_is_that_of_its_solution(tmp_path):
    store, steps = Store(tmp_path), []
    dataset, _ = build_stage(prepare, CONFIG, store)
    pairs, cached = build_stage(
        known_pairs, CONFIG, store, dataset=dataset, progress=lambda done, total: steps.append((done, total))
    )
    rows, samples = pairs.rows(), draw(dataset.split("train"), 12, 0, "paired")
    assert not cached and [row["sample_id"] for row in rows] == [sample.sample_id for sample in samples]
    assert steps == [(number, 12) for number in range(1, 13)]
    originals, images = ImageTable([dataset]), ImageTable([pairs])
    for sample, row in zip(samples, rows, strict=True):
        assert row["question"] == sample.question and row["family"] == sample.metadata["family"]
        assert row["original"] == sample.images[0]
        calls = [ToolCall(call["name"], call["args"]) for call in sample.metadata["solution"]]
        assert row["right"] == pixel_hash(apply_calls(originals.decoded(row["original"]), calls))
        assert len({row["original"], row["right"], row["wrong"]}) == 3
        assert all(pixel_hash(images.decoded(row[name])) == row[name] for name in ("original", "right", "wrong"))
    assert store.verify(pairs) == []


def test_split_and_count_are_as_told_and_a_split_has_no_more_than_it_has(tmp_path):
    store = Store(tmp_path)
    dataset, _ = build_stage(prepare, CONFIG, store)
    for split, count, expected in (("held_out", 5, 5), ("held_out", 500, 8), ("train", None, 12)):
        pairs, _ = build_stage(known_pairs, CONFIG, store, dataset=dataset, split=split, count=count)
        samples = draw(dataset.split(split), expected, 0, "paired")
        assert [row["sample_id"] for row in pairs.rows()] == [sample.sample_id for sample in samples]


def test_split_count_and_seed_define_them_and_the_puzzles_are_made_first_where_there_are_none(tmp_path):
    store = Store(tmp_path)
    with Resources(CONFIG.where) as resources:
        pairs = Builder(CONFIG, store, resources).make(known_pairs)
    dataset = store.origin(pairs, "dataset")
    assert dataset == build_stage(prepare, CONFIG, store)[0]

    def fingerprint(*overrides, **parameters):
        config = load_config("tiny", ["data.train=16", "data.held_out=8", "warmstart.pairs=12", *overrides])
        return recipe_of(known_pairs, config, dataset=dataset, **parameters).fingerprint

    assert fingerprint() == fingerprint(split="train", count=12) == fingerprint("iterations=2") == pairs.fingerprint
    others = [fingerprint(split="held_out"), fingerprint(count=11), fingerprint("seed=3")]
    assert len({pairs.fingerprint, *others}) == 4
    for_the_clip = load_config("tiny", ["warmstart.pairs=0"])  # alone
    assert known_pairs.settings(for_the_clip).count == CLIP_PAIRS
