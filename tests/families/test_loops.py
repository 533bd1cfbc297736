"""Every family on real parts: a loop with all judges, two steps in full and with LoRA, resumed, exported and merged."""

from collections.abc import Iterator

import numpy as np
import pytest
from family_loop import FamilyLoop, family_loop
from PIL import Image

from thinkimg.analysis.export import export_policy
from thinkimg.conversation.protocol import IMAGE_PART, text_part
from thinkimg.conversation.question import state_question
from thinkimg.models.family import list_families, load_family
from thinkimg.records import Sample, StopReason, Trajectory, TurnKind

BOUND = {"float32": 1e-5, "bfloat16": 0.05}
"""Mean |difference| of log-probabilities of engine and trainer; bfloat16 has 8 bits (docs/families.md)."""
DEFAULT = pytest.param("qwen2_5_vl", marks=pytest.mark.long)  # tests/system/test_loop.py has a loop of it
FAMILIES = [DEFAULT, *(name for name in list_families() if name != "qwen2_5_vl")]


@pytest.fixture(scope="module", params=FAMILIES)
def loop(request, tmp_path_factory) -> Iterator[FamilyLoop]:
    """A loop of one iteration: rollouts, scores, two steps, the same once more from the stored policy."""
    with family_loop(tmp_path_factory.mktemp(request.param), request.param) as loop, loop.serving():
        for name in ("rollout", "score", "train"):
            loop.run(name)
        yield loop


def trajectories(loop: FamilyLoop) -> list[Trajectory]:
    return list(loop.artifacts["rollouts"].trajectories())


def test_the_engine_reads_our_prompts_and_images(loop):
    """The engine's expanded prompt is compared with ours on every turn: a difference fails the conversation."""
    rows = trajectories(loop)
    assert {row.stop for row in rows} <= {StopReason.ANSWER, StopReason.MAX_TURNS, StopReason.TRUNCATED}
    assert any(len(row.images) > 1 and len(row.turns) > 1 for row in rows), "some tools' images are seen"
    family = load_family(loop.family)
    assert {row.coordinates for row in rows} == {family.coordinates}
    side = family.processor.token_side
    assert all(size[0] % side == 0 and size[1] % side == 0 for row in rows for size in row.sizes)


def test_engine_and_trainer_agree(loop):
    metrics = loop.artifacts["policy"].metrics
    precision = loop.config().model.precision
    assert metrics["parity/tokens"] > 50 and metrics["parity/mean_abs"] < BOUND[precision]


def test_all_judges_have_a_value(loop):
    metrics = loop.artifacts["scores"].metrics
    judges = ("self", "teacher", "attention", "embedding")
    missing = {judge: metrics[f"missing/{judge}"] for judge in judges}
    # A teacher that has hardly learned may have a rating beyond the likeliest tokens, which the server names.
    assert missing.pop("teacher") < len(loop.artifacts["rollouts"].ids()) and set(missing.values()) == {0}
    assert metrics["reward/teacher_fallback"] == 0


def test_pixels_are_those_of_the_models_own_processor(loop):
    from transformers import AutoImageProcessor

    family = load_family(loop.family)
    own = AutoImageProcessor.from_pretrained(loop.first.directory / "policy" / "model", use_fast=False)
    side, rng = family.processor.token_side, np.random.default_rng(0)
    for rows, columns in ((1, 1), (2, 3), (5, 1)):
        image = Image.fromarray(rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8))
        expected = own(images=[image], return_tensors="np")
        patches = family.processor.extract_patches(image)
        np.testing.assert_allclose(patches, expected["pixel_values"], atol=2e-6)
        grid = (1, rows * family.processor.merge, columns * family.processor.merge)
        assert tuple(expected["image_grid_thw"][0]) == grid


def test_a_stored_policy_trains_on_bit_by_bit(loop):
    """From the artifacts alone, by a worker that has loaded another policy since."""
    loop.run("rollout", iteration=2)
    loop.run("score")
    before = loop.artifacts["policy"]
    after = loop.run("train")
    loop.artifacts["policy"] = before
    again = loop.run("train", force=True)
    assert again.digest == after.digest != before.digest and again.attempt != after.attempt


def test_the_export_renders_what_was_trained(loop, tmp_path):
    from transformers import PreTrainedTokenizerFast

    export = export_policy(loop.store, loop.artifacts["policy"], tmp_path / "export")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export / "policy" / "model")
    samples = {sample.sample_id: sample for sample in loop.artifacts["dataset"].split("train")}
    system = (export / "system.txt").read_text(encoding="utf-8").removesuffix("\n")
    for row in trajectories(loop):
        asked = row.turns[-1].observation is not None  # and then the turns were used up
        said = messages(row, samples[row.sample_id], system)
        rendered = tokenizer.apply_chat_template(said, add_generation_prompt=asked, return_dict=False)
        assert tokenizer.decode(rendered).startswith(tokenizer.decode(row.tokens))
        assert rendered.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == len(row.images)


def messages(row: Trajectory, sample: Sample, system: str) -> list[dict]:
    """Return a conversation as messages, the results of tools as those of a tool."""
    sizes = row.sizes[: len(sample.images)]
    asked = [*[IMAGE_PART] * len(sizes), text_part(state_question(sample, sizes, row.coordinates))]
    said = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    for turn in row.turns:
        said.append({"role": "assistant", "content": turn.text})
        if turn.observation is not None:
            seen = [*[IMAGE_PART] * (turn.image is not None), text_part(turn.observation)]
            said.append({"role": "tool" if turn.kind is TurnKind.TOOL else "user", "content": seen})
    return said


def test_an_adapter_is_trained_merged_and_played(loop):
    """On the first policy as its base; the engine on a CPU plays the merged weights."""
    lora = [
        f"model={{tiny: null, path: '{loop.first.directory / 'policy' / 'model'}', adaptation: lora, lora_rank: 8, "
        f"lora_alpha: 16, dtype: {loop.config().model.precision}}}",
        "warmstart={steps: 3, batch: 8, pairs: 0, learning_rate: 0.01}",
        "train.learning_rate=0.003", "train.steps=2",
    ]  # fmt: skip
    kept = dict(loop.artifacts)
    try:
        loop.first = None
        for name in ("demonstrate", "warmstart", "rollout", "score", "train"):
            loop.run(name, *lora)
        policy = loop.artifacts["policy"]
        assert (policy.directory / "policy" / "adapter" / "adapter_model.safetensors").is_file()
        assert policy.metrics["parity/mean_abs"] < BOUND[loop.config().model.precision]
        assert policy.metrics["parity/slope"] == pytest.approx(1, abs=0.2)
        loop.run("rollout", *lora, iteration=2)
        assert {row.weights for row in trajectories(loop)} == {policy.digest}
    finally:
        loop.artifacts, loop.first = kept, kept["policy"]
