"""A user's own tool, protocol, source, rule, judge and loss, in a project outside the clone, through the command line.

The store is one of version 1, so that old artifacts are seen to be inputs as well.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY, SUPPORT
from users_files import BRACKETS, BREVITY, REINFORCE

from thinkimg.store.artifacts import Store

PRESET = """
model:
  tiny:
    {vocab_size: 288, hidden_size: 32, layers: 1, heads: 1, vision_layers: 1, vision_hidden_size: 4, vision_heads: 1}
  dtype: float32
  adaptation: full
data: {source: mine.squares, train: 4, held_out: 2, held_out_share: 0.4}
images: {min_pixels: 3136, max_pixels: 7056}
conversation: {system: Use a tool or answer., max_turns: 3, max_images: 4, max_turn_tokens: 128, max_tokens: 512}
warmstart: {demonstrations: demonstrations.jsonl}
image: {types: []}
mix: {answer: 1.0}
train: {learning_rate: 3.0e-4, steps: 1, token_budget: 2048}
where: {tracking: {enabled: false}}
"""
SQUARES = """
import io
from PIL import Image
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source, raw_row

class Settings(RowsConfig):
    side: int = 84

def open_source(data, limits):
    def square(number):
        buffer = io.BytesIO()
        Image.new("RGB", (data.side, data.side), (40 * number, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def rows():
        for number in range(6):
            record = {"image": number, "question": "How red?", "answer": str(number)}
            yield raw_row(record, data, lambda value: lambda: square(value), id=f"p{number}", where=str(number))

    return Source("squares", f"squares of {data.side}", rows)
"""
NEGATIVE = '''
"""Show the picture with its colours turned round."""
from PIL import ImageOps
from thinkimg.images.tool import ToolArgs, in_place

class Args(ToolArgs):
    pass

region = in_place

def apply(image, args, frame):
    return ImageOps.invert(image)
'''
WIDTH = """
import thinkimg.settings
from thinkimg.rewards.judgement import Judgement

class Settings(thinkimg.settings.Settings):
    widest: int = 100

def judge(pairs, context):
    widths = [context.images.decoded(pair.processed).width for pair in pairs]
    context.judged(len(pairs))
    return [Judgement(width / context.settings.image.width.widest, None, {"width": width}) for width in widths]
"""
TALKATIVE = BREVITY.replace("    most =", "    print('a word of the user')\n    most =")  # it is no part of the result
FILES = {"squares": SQUARES, "negative": NEGATIVE, "brackets": BRACKETS, "brevity": TALKATIVE, "width": WIDTH,
         "reinforce": REINFORCE}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The user's folder, in which the commands run."""
    root = tmp_path_factory.mktemp("project")
    (root / "mine").mkdir()
    for name, source in FILES.items():
        (root / "mine" / f"{name}.py").write_text(source)
    (root / "mine.yaml").write_text(PRESET)
    shutil.copytree(SUPPORT / "golden" / "store_v1", root / "artifacts")
    return root


def thinkimg(project: Path, command: str, *settings: str) -> str:
    """The reference that the command prints."""
    words = [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PREFECT_HOME": str(project / "prefect"), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "thinkimg", *command.split(), "--preset", "mine.yaml", *words],
        cwd=project, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (reference,) = done.stdout.splitlines()  # the reference alone, as in REF=$(thinkimg score …)
    return reference


def made(project: Path, reference: str):
    return Store(project / "artifacts").resolve(reference)


def test_a_source_a_tool_and_a_protocol(project):
    dataset = made(project, thinkimg(project, "prepare", "data.side=112"))
    samples = list(dataset.samples())
    assert {sample.source for sample in samples} == {"squares"} and dataset.metrics["images"] == len(samples)
    turns = ['dark\n\n[[{"name": "negative", "args": {}}]]', "bright\n\n<answer>1</answer>"]
    rows = [{"sample_id": sample.sample_id, "turns": turns} for sample in samples if sample.split == "train"]
    (project / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["conversation.tools=[mine.negative]", "conversation.protocol=mine.brackets"]
    demonstrations = made(project, thinkimg(project, f"demonstrate --dataset {dataset.short}", *own))
    images, tried = demonstrations.images(dataset), 0
    for row in demonstrations.trajectories():
        (shown, negative), first = row.images, row.turns[0]
        assert (first.tool, first.image, row.answer) == ("negative", negative, "1")
        red = images.decoded(shown).getpixel((0, 0))[0]
        assert images.decoded(negative).getpixel((0, 0)) == (255 - red, 255, 255)
        tried += 1
    assert tried == len(rows)
    assert demonstrations.manifest["recipe"]["sources"].keys() == {"mine.negative", "mine.brackets"}


def test_a_rule_and_a_judge_score_and_a_loss_trains_on_old_scores(project):
    own = [
        "rewards.rules=[mine.brevity]",
        "rewards.brevity.most=6",
        "image.types=[mine.width]",
        "image.weights.width=1",
    ]
    scores = made(project, thinkimg(project, "score --rollouts decece", *own))
    rollouts = made(project, "rollouts/decece")
    turns = [len(row.turns) for row in rollouts.trajectories()]
    assert scores.values()["brevity"].tolist() == [1 - count / 6 for count in turns]
    images = rollouts.images(made(project, "dataset/2b6d"))
    crops = [[turn.image for turn in row.turns if turn.image] for row in rollouts.trajectories()]
    widths = [images.decoded(shown[-1]).width / 100 if shown else 0 for shown in crops]
    assert scores.values()["width"].tolist() == widths and sum(map(bool, widths)) == 2
    assert scores.manifest["recipe"]["sources"].keys() == {"mine.brevity", "mine.width"}

    loss = ["train.loss.loss_type=mine.reinforce", "train.loss.strength=0.5"]
    policy = made(project, thinkimg(project, "train --scores 069a", *loss))
    old = made(project, "policy/569f")
    assert policy.metrics["train/rows"] == 4 and policy.metrics["grad_norm"] > 0
    assert policy.digest != old.digest and policy.manifest["recipe"]["sources"].keys() == {"mine.reinforce"}
    assert policy.manifest["recipe"]["config"]["train"]["loss"]["strength"] == 0.5
