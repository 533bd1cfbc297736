"""A small real store with pictures, for the tests of what a person looks at: rollouts, scores, a policy, evaluations.

Three questions about drawn pictures; a crop of each is what the crop tool gives, so that a call can run again.
"""

import json
from dataclasses import replace
from functools import partial

import pyarrow as pa
from ledger_store import make_policy, make_scores
from PIL import Image, ImageDraw

from thinkimg import records
from thinkimg.analysis.view import score_answers
from thinkimg.conversation.picture import model_view_size
from thinkimg.images.decode import encode_png, pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import run_tool
from thinkimg.records import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind, to_row
from thinkimg.rewards.mix import RIGHT
from thinkimg.store.manifest import Recipe

VIEW = {"min_pixels": 3136, "max_pixels": 54880}
CONVERSATION = {"protocol": "think", "system": "Look closely.", "tools": None}
COLOURS = ("red", "green", "blue")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \x1b[31m"
SIZE = (560, 392)
"""Twice as wide and high as the model sees it."""
BOX = {"height": 56, "width": 84, "x": 56, "y": 28}


def draw(colour: str) -> Image.Image:
    image = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    ImageDraw.Draw(image).ellipse((140, 72, 252, 156), fill=colour)
    return image


def sample_of(colour: str) -> Sample:
    return Sample(
        f"s-{colour}", f"Which colour has the disc? {HOSTILE}", (colour,), AnswerType.CHOICE, COLOURS,
        (pixel_hash(draw(colour)),), "made up", "held_out", targets=((140.0, 72.0, 112.0, 84.0),),
    )  # fmt: skip


def crop_of(image: Image.Image) -> Image.Image:
    result = run_tool("crop_image", BOX, [image], partial(model_view_size, limits=ViewLimits(**VIEW)))
    assert result.image is not None, result.error
    return result.image


def trajectory_of(sample: Sample, index: int, answer: str | None, name: str = "t") -> Trajectory:
    """Crops, then answers; without an answer it fails."""
    image = draw(sample.answer)
    crop = crop_of(image)
    call = Turn(
        f'<think>Too small. {HOSTILE}</think>\n<tool>{{"name": "crop_image", "args": {json.dumps(BOX)}}}</tool>',
        TurnKind.TOOL, "crop_image", json.dumps(BOX), CallStatus.OK, None, 0, pixel_hash(crop),
        f"Image 1: {crop.width}x{crop.height} pixels.", 30,
    )  # fmt: skip
    end = Turn(f"<think>I see.</think><answer>{answer}</answer>", TurnKind.ANSWER, tokens=9)
    stop, error = (StopReason.ANSWER, None) if answer else (StopReason.FAILED, "The engine broke.")
    return Trajectory(
        f"{name}-{sample.sample_id}-{index}", sample.sample_id, f"{name}-{sample.sample_id}", index, "p" * 64,
        (1, 2, 3), (0, 1, 1), (-0.5, -0.25), (*sample.images, pixel_hash(crop)), ((1, 14, 20), (1, 4, 6)),
        (call, end) if answer else (call,), answer, stop, error, "v0",
        tuple(model_view_size(one, ViewLimits(**VIEW)) for one in (image, crop)),
    )  # fmt: skip


def image_table(images):
    rows = [
        {"sha256": pixel_hash(image), "data": encode_png(image), "width": image.width, "height": image.height}
        for image in images
    ]
    return pa.Table.from_pylist(rows, records.image_schema())


def trajectory_table(rows):
    return pa.Table.from_pylist([to_row(row) for row in rows], records.trajectory_schema())


class ViewedStore:
    """dataset, rollouts, scores, policy (trained on the scores), evaluations of two policies."""

    def __init__(self, store, config):
        self.store, self.samples = store, [sample_of(colour) for colour in COLOURS]
        self.dataset = self._dataset()
        self.rows = [
            trajectory_of(sample, index, answer)
            for sample in self.samples
            for index, answer in enumerate((sample.answer, "violet", HOSTILE, sample.answer, None))
        ]
        self.rollouts = self._episodes("rollouts", "rollout", {"iteration": 1}, self.rows, stored=True)
        self.scores = make_scores(store, self.dataset, self.rollouts)
        self.policy = make_policy(store, self.dataset, self.rollouts, self.scores, config, alter)

    def _dataset(self):
        def produce(work):
            work.table(
                "samples.parquet", pa.Table.from_pylist([to_row(s) for s in self.samples], records.sample_schema())
            )
            work.table("images.parquet", image_table([draw(colour) for colour in COLOURS]))

        return self.store.build("dataset", Recipe("prepare", 1, 1, {}), produce)[0]

    def _episodes(self, kind, stage, config, rows, *, stored, **inputs):
        def produce(work):
            work.table("trajectories-00000.parquet", trajectory_table(rows))
            if stored:
                crops = {pixel_hash(crop): crop for crop in (crop_of(draw(colour)) for colour in COLOURS)}
                work.table("images-00000.parquet", image_table(crops.values()))

        settings = {"images": VIEW, "conversation": CONVERSATION} | config
        references = {"dataset": self.dataset.reference} | inputs
        return self.store.build(kind, Recipe(stage, 1, records.SCHEMA_VERSION, settings, references), produce)[0]

    def evaluation(self, number: int, answers, *, blind: bool = False):
        """An evaluation whose greedy answers are these, one per sample, and whose sampled ones are wrong."""
        rows = [
            trajectory_of(sample, index, answer, f"e{number}")
            for sample, greedy in zip(self.samples, answers, strict=True)
            for index, answer in enumerate((greedy, "violet"))
        ]
        if blind:
            rows = [blinded(row) for row in rows]
        config = {"number_tolerance": 0.01, "blind": blind, "number": number}
        policy = replace(self.policy.reference, digest=str(number) * 64)
        return self._episodes("evaluation", "evaluate", config, rows, stored=False, policy=policy)

    def accuracy(self, evaluation) -> float:
        """As the manifest of a real evaluation has it."""
        rows = [row for row in evaluation.trajectories() if row.index == 0]
        values = [score["answer"]["value"] for score in score_answers(evaluation, self.dataset, rows).values()]
        judged = [value >= RIGHT for value in values if value is not None]
        return sum(judged) / len(judged)


def alter(row: dict) -> None:
    """What was stored is not what would come out today."""
    row.update(total=row["total"] / 2, advantage=row["advantage"] - 0.125)


def blinded(row: Trajectory) -> Trajectory:
    crop = crop_of(draw(row.sample_id.removeprefix("s-")))
    grey = pixel_hash(Image.new("RGB", crop.size, (128, 128, 128)))
    turns = tuple(replace(turn, image=turn.image and grey) for turn in row.turns)
    return replace(row, images=(row.images[0], grey), turns=turns)
