"""The memory check against a process of its own, and its refusal where memory is short."""

import contextlib
import inspect
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from paths import REPOSITORY, SUPPORT
from preflight_child import group
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from thinkimg.analysis import forecast
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.models.settings import FAMILIES, ModelConfig
from thinkimg.trainer import memory, recurrence
from thinkimg.trainer.forward.packing import ImageToken
from thinkimg.trainer.memory import Requirement, Step, StepCosts, StepOptions
from thinkimg.trainer.micro_batches import count_tokens, split

FULL = ModelConfig(dtype="float32", adaptation="full")
LORA = ModelConfig(dtype="float32", adaptation="lora", lora_rank=4)
IMAGES = "--images 2 --turns 3 --size 8 --words 100"
FEW_IMAGES = "--images 2 --turns 2 --size 4 --words 60"
TEXT = "--images 0 --turns 3 --size 8 --words 250"
VISION = "--images 2 --turns 3 --size 8 --words 20 --train-vision"
MOST_IMAGES = "--images 30 --turns 1 --size 4 --words 20"  # the tower's peak is the step's
QUICK = [
    f"--family qwen2_5_vl --adaptation lora {IMAGES}",
    f"--family qwen3_vl --adaptation lora --layers 3 {IMAGES}",
    f"--family qwen3_5 --adaptation lora --padded {FEW_IMAGES}",
]
GRID = [
    f"--family {family} --adaptation {adaptation} {layers} {padded} {shape}"
    for family, adaptation, layers, padded, shape in itertools.product(
        FAMILIES, ("lora", "full"), ("", "--layers 3", "--layers 6"), ("", "--padded"), (IMAGES, TEXT)
    )
    if family != "qwen3_5" or padded  # its rows are never packed
]
GRID += [
    f"--family {family} --adaptation {case}"
    for family in FAMILIES
    for case in (f"full --padded {VISION}", f"lora --padded --layers 6 {MOST_IMAGES}")
]


def predict(step: Step) -> Requirement:
    """What a step takes where memory is plentiful."""
    return memory.plan(memory.measure(step), step.options, math.inf)


@pytest.fixture(scope="module")
def geometry(tiny_models):
    return AutoConfig.from_pretrained(tiny_models[0])


def step(geometry, model=FULL, *, images=1, turns=1, size=2, **options) -> Step:
    image_token = ImageToken.of(geometry)
    rows = group(image_token, images=images, turns=turns, size=size)
    packed = split(rows, [0] * len(rows), 10**6, image_token)[0]
    return Step(geometry, model, [rows[i] for i in packed.rows], packed.units, StepOptions(**options))


@pytest.mark.parametrize(
    "case",
    [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in GRID if " ".join(case.split()) not in QUICK)],
)
def test_the_peak_is_predicted_within_15_percent(case, tmp_path):
    script = str(SUPPORT / "preflight_child.py")
    argv = [sys.executable, script, "--model", str(tmp_path), *case.split()]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] > 150 * 2**20, "too little to mean anything"
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found


def test_a_few_chunks_tell_of_a_recurrent_layer_what_all_take():
    """Its forward and backward pass, without data, at a length that was not measured and that is no whole chunk."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rule = recurrence.Recurrence(inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule))
    heads, width = 3, 16
    with FakeTensorMode():
        inputs = [torch.empty(2, 64 * 8 + 5, heads, width) for _ in range(3)]
        inputs += [torch.empty(2, 64 * 8 + 5, heads) for _ in range(2)]
        rule(*inputs[:3], g=inputs[3], beta=inputs[4], use_qk_l2norm_in_kernel=True)
        (extrapolated,) = rule._costs.values()
        measured = rule.measure(tuple(inputs), 9, use_qk_l2norm_in_kernel=True)
    assert extrapolated.kept == pytest.approx(measured.kept, rel=0.01)
    assert extrapolated.forward == pytest.approx(measured.forward, rel=0.02)
    assert measured.backward <= extrapolated.backward < 1.15 * measured.backward
    assert measured.kept > 9 * 64 * 2 * heads * (4 * 64 + 4 * width)  # decays and products within chunks, and states


def test_a_step_of_recurrent_layers_is_predicted_as_if_every_chunk_was_gone_through(base_of, monkeypatch):
    own = replace(step(AutoConfig.from_pretrained(base_of("qwen3_5").directory), LORA, checkpointing=True), units=None)
    quick = predict(own)
    monkeypatch.setattr(memory, "extrapolate", lambda family: contextlib.nullcontext())
    slow = predict(own)
    assert quick.activations == pytest.approx(slow.activations, rel=0.07) and quick.total != slow.total
    assert quick.weights == slow.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_tower_gives_is_counted(base_of, family):
    """DeepStack levels are kept as features of all images of a job."""
    own = step(AutoConfig.from_pretrained(base_of(family).directory))
    (grid,) = {tuple(map(int, grid)) for key, grid in own.grids.items() if key.startswith("prompt")}
    width, patches = own.family.feature_width(own.geometry), int(np.prod(grid))
    vision = own.geometry.vision_config
    assert width == vision.out_hidden_size * (3 if family == "qwen3_vl" else 1)
    more = replace(own, job_grids=own.grids | {"another": np.array(grid)})
    difference = predict(more).images - predict(own).images
    assert difference == patches * own.patch_bytes + patches // 4 * width * 4


def test_a_refusal_says_what_to_lower(geometry):
    large = step(geometry, size=8)
    needed = memory.check(large, 10**12)
    with pytest.raises(UserError, match="activations of .* tokens") as caught:
        memory.check(large, int(needed.total * 0.7))
    assert "train.token_budget to" in caught.value.hint and "gradient_checkpointing=auto" in caught.value.hint
    with pytest.raises(UserError) as caught:  # not even a row fits
        memory.check(step(geometry, size=8, checkpointing=True), needed.optimizer + 1000)
    assert "images.max_pixels" in caught.value.hint and "token_budget" not in caught.value.hint
    assert "model.adaptation=lora" in caught.value.hint


def test_a_larger_step_needs_more(geometry):
    def of(model=FULL, **options) -> Requirement:
        return predict(step(geometry, model, **options))

    small = of()
    for more in ({"images": 2}, {"turns": 2}, {"size": 4}):
        assert of(**more).activations > small.activations
    assert of(checkpointing=True).activations < small.activations
    assert of(LORA).optimizer < small.optimizer / 10
    trained = of(train_vision=True)
    assert trained.optimizer > small.optimizer and trained.activations > small.activations
    assert of(entropy_grad=True).activations > small.activations
    halves = of(shards=2)
    assert halves.optimizer < small.optimizer and halves.weights < small.weights and halves.unsharded
    four = of(LORA.model_copy(update={"load_in_4bit": True}))
    assert four.weights < of(LORA).weights and four.unsharded


def test_other_images_of_the_job_are_kept_too(geometry):
    own = step(geometry)
    job = replace(own, job_grids=own.grids | {f"other {key}": grid for key, grid in own.grids.items()})
    more, alone = predict(job), predict(own)
    assert more.images > alone.images and more.activations == alone.activations
    assert predict(replace(job, options=StepOptions(on_gpu=True))).images < more.images  # patches lie elsewhere


def test_a_prediction_draws_nothing_at_random(geometry):
    """Else a resumed job would not be the uninterrupted one."""
    before = torch.get_rng_state()
    predict(step(geometry, LORA, checkpointing=True))
    assert torch.equal(before, torch.get_rng_state())


def test_padding_counts_and_a_shared_prompt_counts_once(geometry):
    packed = step(geometry, LORA, size=8)
    padded = replace(packed, units=None)
    assert count_tokens(packed.rows, packed.units) < count_tokens(packed.rows, None)
    assert predict(packed).activations < predict(padded).activations


def test_the_7b_is_gone_through_without_its_weights(monkeypatch):
    """In the shapes of Qwen2.5-VL-7B, by the difference of three layers and two, for all but the first are equal.

    Each keeps as much for the backward pass, and with checkpointing its input.
    """
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from workload import SEVEN_B, config_of

    def of(layers: int) -> StepCosts:
        geometry = config_of(SEVEN_B)
        geometry.text_config.num_hidden_layers, geometry.vision_config.depth = layers, 1
        costs, largest = forecast.measure_largest(load_config("balanced", ["rollout.group_size=16"]), geometry)
        assert largest.tokens <= 8192 and costs.layers == layers
        return costs

    hidden, middle, rank, tokens = 3584, 18944, 64, 8192
    two, three = of(2), of(3)
    layer = 2 * (2 * hidden**2 + 2 * hidden * 512 + 3 * hidden * middle)  # bytes in bfloat16
    adapters = rank * (4 * hidden + 2 * (hidden + 512) + 3 * (hidden + middle))
    assert three.weights - two.weights == pytest.approx(layer + 4 * adapters, rel=0.01)
    assert three.optimizer - two.optimizer == 12 * adapters
    assert three.activations[3] - two.activations[2] == pytest.approx(2 * hidden * tokens, rel=0.15)
    whole = three.activations[0] - two.activations[0]
    assert 10 * 2 * hidden * tokens < whole < 60 * 2 * hidden * tokens


def test_a_forecast_says_what_to_lower_where_a_step_does_not_fit(monkeypatch):
    config = load_config("tiny")
    assert "fits in" in forecast.forecast_needs(config)
    monkeypatch.setattr(forecast, "free_memory", lambda _: 10**7)
    line = forecast.forecast_needs(config)
    assert "lower train.token_budget" in line and "set train.gradient_checkpointing=auto" in line
    line = forecast.forecast_needs(load_config("tiny", ["train.gradient_checkpointing=auto"]))
    assert "(4 of 4 layers computed again)" in line and "gradient_checkpointing" not in line


def test_the_rows_of_a_forecast_keep_to_the_config():
    config = load_config("tiny", ["rollout.group_size=4", "conversation.max_turns=3"])
    rows, groups = forecast.longest_rows(config, ImageToken(9, 2))
    assert groups[:5] == [0, 0, 0, 0, 1]
    assert all(len(row.tokens) <= config.conversation.max_tokens for row in rows)
    most = config.view().most_tokens
    assert all(len(row.images) == 3 and (row.tokens == 9).sum() == 3 * most for row in rows)
    assert len({image for row in rows[:4] for image in row.images}) == 1 + 4 * 2
