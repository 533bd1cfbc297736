"""The GRPO loss of one micro-batch as a pure function over tensors, equal to TRL 1.16's `GRPOTrainer._compute_loss`.

How it departs from TRL, where a step is more than one micro-batch or a position is masked:
- Denominators and the entropy threshold are those of the whole optimizer step. TRL averages `grpo`, `sapo`, `luspo`,
  `dr_grpo`, `bnpo` and the entropy bonus within each micro-batch and then over these, each with its own threshold.
- Excluded rows are dropped. TRL gives truncated rows an empty mask and counts them.
- What stands at masked positions, NaN and infinities included, has no influence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkimg.grpo.settings import LOSSES, LossConfig
from thinkimg.grpo.terms import Loss, Normaliser, Terms


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the step. Shares add up over micro-batches and processes."""

    loss: Tensor
    """0-d, carries the gradient. DDP and FSDP average gradients over processes: multiply by their number there."""
    metrics: dict[str, Tensor]
    """0-d, detached; each sums over the step to a mean over the step's tokens (rows for values that a row has once)."""


def step_normaliser(
    cfg: LossConfig, masks: Sequence[Tensor], *, max_completion_length: int, entropies: Sequence[Tensor] = ()
) -> Normaliser:
    """Totals of an optimizer step.

    masks: (B_i, T_i) bool or 0/1 of all micro-batches of all processes, excluded rows dropped.
    entropies: (B_i, T_i) in nats, aligned with masks; only needed if `top_entropy_quantile` < 1. A pass before the
    step gives them (the one that gives old_logps): the threshold is as old as that pass.
    """
    rows = sum(mask.shape[0] for mask in masks)
    tokens = sum(int(mask.sum()) for mask in masks)
    if cfg.top_entropy_quantile == 1.0:
        return Normaliser(rows, tokens, max_completion_length)
    assert len(entropies) == len(masks), "top_entropy_quantile < 1 needs the entropies of the whole step"
    active = torch.cat([e[m.bool()].float() for e, m in zip(entropies, masks, strict=True)])
    if active.numel() == 0:
        return Normaliser(rows, tokens, max_completion_length, entropy_threshold=float("inf"), entropy_tokens=0)
    threshold = torch.quantile(active, 1 - cfg.top_entropy_quantile).item()
    kept = sum(int(((e >= threshold) & m.bool()).sum()) for e, m in zip(entropies, masks, strict=True))
    return Normaliser(rows, tokens, max_completion_length, entropy_threshold=threshold, entropy_tokens=kept)


def importance_ratio(cfg: LossConfig, old_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    """Ratio of old policy to engine after the cap, (B, T) for token modes and (B, 1) for sequence modes.

    A token that the engine could not score (NaN) has ratio 1. The sequence ratio is a product, so its spread grows with
    the number of tokens. TRL 1.16, `_generate_and_score_completions`; the idea: fengyao.notion.site/off-policy-rl.
    """
    log_ratio = torch.nan_to_num((old_logps - engine_logps) * mask, nan=0.0)
    if cfg.vllm_importance_sampling_mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = torch.exp(log_ratio)
    low, high = cfg.vllm_importance_sampling_clip_min, cfg.vllm_importance_sampling_clip_max
    if cfg.vllm_importance_sampling_mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)


def off_policy_keep(
    threshold: float, logps: Tensor, sampling_logps: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """(B, 1) of 0 and 1: 0 for rows with a negative advantage whose mean log(sampling / policy) exceeds threshold.

    DeepSeek-V3.2 (arXiv 2512.02556) eq. 9. Tokens without a sampling log-probability (NaN) count as no difference.
    """
    difference = torch.nan_to_num(sampling_logps - logps.detach(), nan=0.0)
    mean = (difference * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return ((advantages >= 0) | (mean <= threshold)).to(mask.dtype)


def grpo_loss(
    cfg: LossConfig,
    *,
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    engine_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    entropies: Tensor | None,
    normaliser: Normaliser,
) -> LossOutput:
    """The micro-batch's share of the step's loss.

    logps: (B, T) log-probabilities of the completion tokens under the policy, with gradient, computed like the
        engine's (same temperature, same banned tokens). old_logps: the same before the step's first update.
    ref_logps: under the reference policy; needed if beta != 0. engine_logps: as sampled, NaN where unknown; needed if
        the correction is on; where None, `off_policy_mask_threshold` compares with old_logps.
    advantages: (B,). mask: (B, T) bool or 0/1, 1 for sampled tokens, 0 for observations and padding.
    entropies: (B, T) in nats, with gradient if `entropy_coef` != 0; needed for that and if `top_entropy_quantile` < 1.
    Sums (TRL 1.16 `_compute_loss`): per-token loss x masks x importance ratio + beta x KL, weighted by the loss type,
    minus entropy_coef x mean entropy.
    """
    keep = mask.bool()
    mask = keep.to(logps.dtype)
    # Filled before any arithmetic, as 0 x NaN is NaN: observation tokens include banned ones, whose logp is -inf.
    logps, old_logps = logps.masked_fill(~keep, 0.0), old_logps.masked_fill(~keep, 0.0)
    engine_logps = None if engine_logps is None else engine_logps.masked_fill(~keep, 0.0)
    entropies = None if entropies is None else entropies.masked_fill(~keep, 0.0)
    advantages = advantages.unsqueeze(1)

    log_ratio = logps - old_logps
    if cfg.importance_sampling_level == "token":
        ratio = torch.exp(log_ratio)
    else:
        ratio = torch.exp((log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0))

    importance = None
    observed: dict[str, Tensor] = {}
    if cfg.vllm_importance_sampling_correction:
        assert engine_logps is not None, "vllm_importance_sampling_correction needs engine_logps"
        importance = importance_ratio(cfg, old_logps, engine_logps, mask)
        values = importance.squeeze(1) if cfg.vllm_importance_sampling_mode.startswith("sequence") else importance
        observed["sampling/importance_sampling_ratio/mean"] = values
        observed["sampling/importance_sampling_ratio/zero"] = values == 0

    loss_type: Loss = LOSSES.member(cfg.loss_type, "LOSS")
    terms = Terms(logps, log_ratio, ratio, advantages, mask, importance)
    per_token, loss_metrics = loss_type.per_token(cfg, terms)
    observed |= loss_metrics

    if cfg.off_policy_mask_threshold is not None:
        sampling_logps = old_logps if engine_logps is None else engine_logps
        kept = off_policy_keep(cfg.off_policy_mask_threshold, logps, sampling_logps, advantages, mask)
        observed["off_policy_mask/dropped"] = (1 - kept).squeeze(1)
        per_token = per_token * kept
    high_entropy = mask
    if cfg.top_entropy_quantile < 1.0:
        assert entropies is not None and normaliser.entropy_threshold is not None, "use step_normaliser with entropies"
        high_entropy = mask * (entropies >= normaliser.entropy_threshold)
        per_token = per_token * high_entropy
    if importance is not None and not loss_type.uses_importance:
        per_token = per_token * importance

    if cfg.beta != 0.0:
        assert ref_logps is not None, "beta != 0 needs ref_logps"
        # Schulman's k3 estimator, DeepSeekMath (arXiv 2402.03300) eq. 4; neither masks nor importance ratio touch it.
        log_ref_ratio = ref_logps.masked_fill(~keep, 0.0) - logps
        kl = torch.exp(log_ref_ratio) - log_ref_ratio - 1
        if cfg.use_bias_correction_kl:
            kl = kl * ratio
        observed["kl"] = kl
        per_token = per_token + cfg.beta * kl

    loss = (per_token * mask * loss_type.weight(mask, normaliser)).sum()
    if cfg.entropy_coef != 0.0:
        assert entropies is not None, "entropy_coef != 0 needs entropies"
        tokens = normaliser.tokens if cfg.top_entropy_quantile == 1.0 else normaliser.entropy_tokens
        assert tokens is not None, "use step_normaliser with entropies"
        loss = loss - cfg.entropy_coef * (entropies * high_entropy).sum() / max(tokens, 1)
    if entropies is not None:
        observed["entropy"] = entropies
    return LossOutput(loss, {name: _share(values.detach(), mask, normaliser) for name, values in observed.items()})


def _share(values: Tensor, mask: Tensor, totals: Normaliser) -> Tensor:
    """Part of the mean over the step's tokens for (B, T), over its rows for (B,)."""
    if values.ndim == 1:
        return values.to(mask.dtype).sum() / max(totals.rows, 1)
    return (values * mask).sum() / max(totals.tokens, 1)
