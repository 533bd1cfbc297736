"""The loss against TRL's own code over the whole grid, and the properties that TRL's does not have."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import trl_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl import GRPOConfig

from thinkimg.grpo.advantages import select_included_rows
from thinkimg.grpo.loss import (
    Logps,
    LossOutput,
    compute_grpo_loss,
    compute_normaliser,
)
from thinkimg.grpo.settings import LOSSES, LossConfig

MAX_LENGTH = 11
TOKEN_KEYS = ("logps", "old_logps", "ref_logps", "engine_logps", "mask", "entropies")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(seed: int, masks: str, rows: int = 6, width: int = 7) -> dict:
    """Random inputs, far enough off policy that each clip, cap and mask acts on some tokens but not on all."""
    rng = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:  # float32 values, as TRL stores the engine's in float32
        return (scale * torch.randn(rows, width, generator=rng)).double()

    lengths = [width, *torch.randint(1, width + 1, (rows - 1,), generator=rng).tolist()]
    sampled = torch.ones(rows, width, dtype=torch.long)
    if masks != "padding":
        sampled = (torch.rand(rows, width, generator=rng) < 0.6).long()
        sampled[:, 0] = 1
    if masks == "empty row":  # and observations in the others
        sampled[1] = 0
    old = -noise(1.0).abs()
    engine = (old + noise(0.4)).float().double()
    engine[2, 0] = float("nan")
    return {
        "logps": (old + noise(0.4)).requires_grad_(),
        "old_logps": old,
        "ref_logps": old + noise(0.4),
        "engine_logps": engine,
        "rewards": torch.rand(rows, generator=rng, dtype=torch.float64).numpy(),
        "entropies": noise(1.0).abs().requires_grad_(),
        "lengths": lengths,
        "sampled": sampled,
        "mask": sampled * (torch.arange(width) < torch.tensor(lengths)[:, None]),
    }


def ours(cfg: LossConfig, b: dict, advantages: Tensor, normaliser=None) -> LossOutput:
    if normaliser is None:
        normaliser = compute_normaliser(cfg, [b["mask"]], max_completion_length=MAX_LENGTH, entropies=[b["entropies"]])
    engine = b["engine_logps"] if cfg.vllm_importance_sampling_correction else None
    logps = Logps(b["logps"], b["old_logps"], b["ref_logps"], engine)
    rest = {"mask": b["mask"], "entropies": b["entropies"]}
    return compute_grpo_loss(cfg, logps, advantages=advantages, normaliser=normaliser, **rest)


def theirs(cfg: LossConfig, b: dict, **kwargs) -> tuple[Tensor, Tensor, dict[str, float]]:
    """TRL's loss, the advantages that it computed on the way, and its metrics."""
    trainer, output = trl_reference.score(
        cfg,
        group_size=3,
        max_completion_length=MAX_LENGTH,
        engine_logps=b["engine_logps"] if cfg.vllm_importance_sampling_correction else None,
        **{key: b[key] for key in ("rewards", "old_logps", "ref_logps", "lengths", "sampled")},
        **kwargs,
    )
    loss, metrics = trl_reference.loss(trainer, output, b["logps"], b["entropies"])
    return loss, output["advantages"], metrics


def gradients(loss: Tensor, b: dict) -> tuple[Tensor, Tensor]:
    grads = torch.autograd.grad(loss, (b["logps"], b["entropies"]), allow_unused=True)
    return tuple(torch.zeros_like(b["logps"]) if g is None else g for g in grads)


def assert_same_as_trl(cfg: LossConfig, b: dict) -> None:
    reference, advantages, reference_metrics = theirs(cfg, b)
    out = ours(cfg, b, advantages)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.loss, reference, **close)
    for mine, other in zip(gradients(out.loss, b), gradients(reference, b), strict=True):
        torch.testing.assert_close(mine, other, **close)
    for name in out.metrics.keys() & reference_metrics.keys():
        assert out.metrics[name].item() == pytest.approx(reference_metrics[name], rel=1e-6, abs=1e-6), name
    assert {"entropy", *(("kl",) if cfg.beta else ())} <= out.metrics.keys() & reference_metrics.keys()


CORRECTIONS = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KL = ({"beta": 0.0}, {"beta": 0.3, "use_bias_correction_kl": True}, {"beta": 0.3, "use_bias_correction_kl": False})
EXTRAS = (
    {},
    {"top_entropy_quantile": 0.5},
    {"off_policy_mask_threshold": 0.05},
    {"entropy_coef": 0.2},
    {"entropy_coef": 0.2, "top_entropy_quantile": 0.3, "off_policy_mask_threshold": 0.1},
    {"vllm_importance_sampling_clip_min": 0.7},
    {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": None},
)


def correction(mode: str | None) -> dict:
    if mode is None:
        return {"vllm_importance_sampling_correction": False}
    return {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5}


def allowed(loss_type: str, mode: str | None) -> bool:
    return not (loss_type == "vespo" and mode is not None and mode.startswith("sequence"))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_gradient_and_metrics_are_trls(loss_type, level):
    modes = [mode for mode in CORRECTIONS if allowed(loss_type, mode)]
    grid = itertools.product((None, 0.5), (None, 1.3), KL, modes, ("padding", "empty row"))
    for i, (high, delta, kl, mode, masks) in enumerate(grid):
        options = {"epsilon_high": high, "delta": delta} | kl | correction(mode) | EXTRAS[i % len(EXTRAS)]
        cfg = LossConfig(loss_type=loss_type, importance_sampling_level=level, **options)
        assert_same_as_trl(cfg, batch(i, masks))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_mask_with_every_correction_and_kl_is_trls(loss_type, level):
    """The other half of the grid: masks and both caps against modes, KL and a lower epsilon; clips as they come."""
    modes = [mode for mode in CORRECTIONS if allowed(loss_type, mode)]
    for i, (extra, mode, kl) in enumerate(itertools.product(EXTRAS, modes, KL)):
        options = {
            "epsilon": (0.1, 0.3)[i // 2 % 2],
            "epsilon_high": (None, 0.5)[i % 2],
            "delta": (None, 1.6, None)[i % 3],
        }
        cfg = LossConfig(
            loss_type=loss_type, importance_sampling_level=level, **options | kl | correction(mode) | extra
        )
        assert_same_as_trl(cfg, batch(i, ("padding", "observations", "empty row")[i % 3]))


OWN = {
    "sapo": dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), st.floats(0.5, 2)),
    "vespo": dict.fromkeys(("vespo_k_pos", "vespo_lambda_neg"), st.floats(0, 4)),
}


@st.composite
def configs(draw) -> LossConfig:
    loss_type = draw(st.sampled_from(list(LOSSES)))
    mode = draw(st.sampled_from([m for m in CORRECTIONS if allowed(loss_type, m)]))
    options = draw(st.sampled_from(KL)) | correction(mode) | draw(st.sampled_from(EXTRAS))
    return LossConfig(
        loss_type=loss_type,
        importance_sampling_level=draw(st.sampled_from(["token", "sequence"])),
        epsilon=draw(st.sampled_from([0.1, 0.2])),
        epsilon_high=draw(st.sampled_from([None, 0.28, 5.0])),
        delta=draw(st.sampled_from([None, 1.3])),
        scale_rewards=draw(st.sampled_from(["group", "batch", "none"])),
        **{name: draw(values) for name, values in OWN.get(loss_type, {}).items()},
        **options,
    )


seeds, mask_kinds = st.integers(0, 2**20), st.sampled_from(["padding", "observations", "empty row"])


@given(configs(), seeds, mask_kinds)
@settings(max_examples=100, deadline=None)
def test_equality_with_trl_holds_off_the_grid(cfg, seed, masks):
    assert_same_as_trl(cfg, batch(seed, masks))


def take(b: dict, rows: Tensor, width: int) -> dict:
    return b | {key: b[key][rows, :width] for key in TOKEN_KEYS}


@given(configs(), seeds, mask_kinds, st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=100, deadline=None)
def test_micro_batches_sum_to_the_step(cfg, seed, masks, assignment):
    """Loss, gradient and metrics are the step's, however it is cut; each part is trimmed to its longest row."""
    b, advantages = batch(seed, masks), torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    whole = ours(cfg, b, advantages)
    rows = [torch.tensor([i for i in range(6) if assignment[i] == part], dtype=torch.long) for part in range(4)]
    parts = [take(b, r, max((b["lengths"][i] for i in r), default=1)) for r in rows]  # an empty part is a part, too
    totals = compute_normaliser(
        cfg, [p["mask"] for p in parts], max_completion_length=MAX_LENGTH, entropies=[p["entropies"] for p in parts]
    )
    outputs = [ours(cfg, part, advantages[r], totals) for part, r in zip(parts, rows, strict=True)]
    summed = sum(out.loss for out in outputs)
    torch.testing.assert_close(summed, whole.loss, rtol=1e-10, atol=1e-10)
    for part_sum, step in zip(gradients(summed, b), gradients(whole.loss, b), strict=True):
        torch.testing.assert_close(part_sum, step, rtol=1e-10, atol=1e-10)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(out.metrics[name] for out in outputs), value, rtol=1e-10, atol=1e-10)


@given(configs(), seeds, st.lists(st.booleans(), min_size=6, max_size=6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_excluded_rows_change_nothing(cfg, seed, cut, drop_truncated):
    """Six rows, some of them excluded or truncated, against the rows that remain, in a step of their own."""
    b, advantages = batch(seed, "observations"), torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    included, truncated = np.array([True, False, True, True, False, True]), np.array(cut)
    chosen = select_included_rows(included, truncated, mask_truncated_completions=drop_truncated)
    expected = [i for i in range(6) if included[i] and not (drop_truncated and truncated[i])]
    assert chosen.tolist() == expected
    few = take(b, torch.tensor(expected, dtype=torch.long), 7)
    in_row = torch.from_numpy(included)[:, None]
    poisoned = {key: b[key].masked_fill(~in_row, float("nan")) for key in TOKEN_KEYS if key != "mask"}
    many = take(b | poisoned, torch.from_numpy(chosen), 7)
    assert ours(cfg, many, advantages[chosen]).loss.equal(ours(cfg, few, advantages[expected]).loss)


@given(configs(), seeds, st.sampled_from([float("nan"), float("-inf"), float("inf"), 1e30]))
@settings(max_examples=50, deadline=None)
def test_masked_positions_have_no_influence(cfg, seed, junk):
    """A banned token inside an observation has log-probability -inf in the trainer and NaN in the table."""
    b, advantages = batch(seed, "observations"), torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    dirty = dict(b)
    for key in ("logps", "old_logps", "ref_logps", "engine_logps", "entropies"):
        dirty[key] = b[key].detach().masked_fill(b["mask"] == 0, junk).requires_grad_(b[key].requires_grad)
    clean_out, dirty_out = ours(cfg, b, advantages), ours(cfg, dirty, advantages)
    assert dirty_out.loss.equal(clean_out.loss)
    for mine, other in zip(gradients(dirty_out.loss, dirty), gradients(clean_out.loss, b), strict=True):
        assert mine.equal(other)
        assert not mine[b["mask"] == 0].any()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_truncated_rows_are_dropped_where_trl_empties_their_mask(loss_type):
    """Losses over tokens agree; losses over rows differ from TRL's by the number of rows that it still counts."""
    cfg = LossConfig(loss_type=loss_type, mask_truncated_completions=True, vllm_importance_sampling_mode="token_mask")
    b, truncated = batch(3, "observations"), np.array([True, False, False, True, False, False])
    reference, advantages, _ = theirs(cfg, b, truncated=truncated)
    rows = torch.from_numpy(select_included_rows(~np.zeros(6, bool), truncated, mask_truncated_completions=True))
    mine = ours(cfg, take(b, rows, 7), advantages[rows]).loss
    counts_rows = loss_type in ("grpo", "sapo", "luspo", "dr_grpo")
    torch.testing.assert_close(mine * (4 / 6 if counts_rows else 1), reference, rtol=1e-9, atol=1e-9)


def test_bool_masks_and_float32_are_accepted():
    b = batch(0, "observations")
    cfg, advantages = LossConfig(), torch.linspace(-1, 1, 6)
    single = {key: b[key].float() for key in TOKEN_KEYS} | {"mask": b["mask"].bool()}
    out = ours(cfg, single, advantages)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), ours(cfg, b, advantages.double()).loss, rtol=1e-5, atol=1e-5)


def test_names_and_defaults_are_trls():
    fields = GRPOConfig.__dataclass_fields__
    for loss_type in LOSSES:
        for name, field in LOSSES[loss_type].Settings.model_fields.items():
            assert name == "loss_type" or fields[name].default == field.default, name
            assert name == "loss_type" or field.description, name
    assert fields["loss_type"].default == LossConfig().loss_type


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_type": "ppo"},
        {"epsilonn": 0.2},
        {"loss_type": "vespo"},  # with the default mode, as in TRL
        {"vllm_importance_sampling_clip_min": 1.0, "vllm_importance_sampling_clip_max": 1.0},
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
        {"vllm_importance_sampling_clip_max": 0.5},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError):
        LossConfig(**wrong)


def test_config_does_not_import_torch_and_lists_the_losses_in_its_schema():
    code = (
        "import sys; from thinkimg.grpo.settings import LossConfig; s = LossConfig.model_json_schema(); "
        "print('torch' in sys.modules, len(s['oneOf']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["False", str(len(LOSSES))]


@pytest.mark.parametrize(
    ("options", "missing"),
    [({}, "engine"), ({"beta": 0.1}, "reference"), ({"entropy_coef": 0.1}, "entropies")],
)
def test_a_term_without_its_input_is_not_silently_left_out(options, missing):
    b, cfg = batch(0, "padding"), LossConfig(**options)
    normaliser = compute_normaliser(cfg, [b["mask"]], max_completion_length=MAX_LENGTH)
    logps = {"policy": b["logps"], "old": b["old_logps"], "reference": b["ref_logps"], "engine": b["engine_logps"]}
    logps = Logps(**{name: None if name == missing else values for name, values in logps.items()})
    entropies = None if missing == "entropies" else b["entropies"]
    with pytest.raises(AssertionError, match=missing):
        compute_grpo_loss(
            cfg, logps, advantages=torch.ones(6), mask=b["mask"], entropies=entropies, normaliser=normaliser
        )
