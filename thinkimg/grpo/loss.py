"""The GRPO loss of one micro-batch as a pure function over tensors, equal to TRL 1.16's `GRPOTrainer._compute_loss`.

Departures from TRL, if a step is more than one micro-batch or a position is masked:
- Denominators and the entropy threshold are those of the whole optimizer step. TRL averages `grpo`, `sapo`, `luspo`,
  `dr_grpo`, `bnpo` and the entropy bonus within each micro-batch and then over these. Each has its own threshold.
- Excluded rows are dropped. TRL gives truncated rows an empty mask and counts them.
- Values at masked positions, NaN and infinities included, have no influence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkimg.grpo.settings import LOSSES, LossConfig
from thinkimg.grpo.terms import Loss, Normaliser, Terms

LARGEST = 20.0  # logarithm of a ratio in metrics: its square has to be a number


@dataclass(frozen=True)
class Logps:
    """Log-probabilities (B, T) of completion tokens, with the engine's temperature and banned tokens."""

    policy: Tensor
    """Under the policy, with gradient."""
    old: Tensor
    """Under the policy before the step's first update."""
    reference: Tensor | None = None
    """Under the reference policy; needed if beta != 0."""
    engine: Tensor | None = None
    """Under the engine, at sampling; NaN where unknown. Needed by the correction, preferred by the off-policy mask."""

    def masked(self, keep: Tensor) -> "Logps":
        """Return the log-probabilities with 0 where `keep` (B, T) is False.

        Filled before any arithmetic, as 0 x NaN is NaN: observation tokens include banned ones, whose logp is -inf.
        """
        tensors = {name: x.masked_fill(~keep, 0.0) for name, x in vars(self).items() if x is not None}
        return Logps(**tensors)


@dataclass(frozen=True)
class LossOutput:
    """Share of a micro-batch in the step. Shares add up over micro-batches and processes."""

    loss: Tensor
    """0-d, carries the gradient. DDP and FSDP average gradients over processes: multiply by their number there."""
    metrics: dict[str, Tensor]
    """0-d, detached; each sums over the step to a mean over the step's tokens (rows for values that a row has once)."""


def compute_normaliser(
    cfg: LossConfig, masks: Sequence[Tensor], *, max_completion_length: int, entropies: Sequence[Tensor] = ()
) -> Normaliser:
    """Return the totals of an optimizer step.

    masks: (B_i, T_i) bool or 0/1 of all micro-batches of all processes, excluded rows dropped.
    entropies: (B_i, T_i) in nats, aligned with masks; needed if `top_entropy_quantile` < 1. The pass before the step
    that gives `Logps.old` gives them too, so that the threshold is as old as that pass.
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


def compute_importance(
    cfg: LossConfig, old_logps: Tensor, engine_logps: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the ratio of old policy to engine after the cap, (B, T) for token modes, (B, 1) for others; and metrics.

    A token that the engine could not score (NaN) has ratio 1. The sequence ratio is a product, so its spread grows with
    the number of tokens. TRL 1.16, `_generate_and_score_completions`; the idea: fengyao.notion.site/off-policy-rl.
    Metrics: (B, T) of tokens or (B,) of rows: the ratio after the cap, where it is 0, where it lay beyond the cap, and
    before the cap the ratio and its square.
    """
    log_ratio = torch.nan_to_num((old_logps - engine_logps) * mask, nan=0.0)
    by_row = cfg.vllm_importance_sampling_mode.startswith("sequence")
    if by_row:
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = torch.exp(log_ratio)
    low, high = cfg.vllm_importance_sampling_clip_min, cfg.vllm_importance_sampling_clip_max
    beyond = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        beyond |= ratio < low
    if high is not None:
        beyond |= ratio > high
    if cfg.vllm_importance_sampling_mode.endswith("truncate"):
        importance = torch.clamp(ratio, min=low, max=high)
    else:
        importance = ratio.masked_fill(beyond, 0.0)
    finite = torch.exp(log_ratio.clamp(max=LARGEST))
    metrics = {"mean": importance, "zero": importance == 0, "beyond_cap": beyond}
    metrics |= {"uncapped_mean": finite, "uncapped_square": finite.square()}
    return importance, {
        f"sampling/importance_sampling_ratio/{name}": values.squeeze(1) if by_row else values
        for name, values in metrics.items()
    }


def estimate_effective_sample(metrics: Mapping[str, float]) -> float | None:
    """Return the effective share of a step's sample, from its metrics; None without a correction.

    Kish's (sum of weights)^2 / (n x sum of squared weights), of the ratios before the cap, which hides how far they
    are apart.
    """
    mean, square = (metrics.get(f"sampling/importance_sampling_ratio/uncapped_{name}") for name in ("mean", "square"))
    if mean is None or square is None:
        return None
    return mean**2 / square if square else 0.0


def keep_on_policy(threshold: float, logps: Tensor, sampling_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return (B, 1): 0 for rows with a negative advantage whose mean log(sampling / policy) exceeds threshold, else 1.

    DeepSeek-V3.2 (arXiv 2512.02556) eq. 9. Tokens without a sampling log-probability (NaN) count as no difference.
    """
    difference = torch.nan_to_num(sampling_logps - logps.detach(), nan=0.0)
    mean = (difference * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return ((advantages >= 0) | (mean <= threshold)).to(mask.dtype)


def compute_grpo_loss(
    cfg: LossConfig,
    logps: Logps,
    *,
    advantages: Tensor,
    mask: Tensor,
    entropies: Tensor | None,
    normaliser: Normaliser,
) -> LossOutput:
    """Return the micro-batch's share of the step's loss.

    advantages: (B,). mask: (B, T) bool or 0/1, 1 for sampled tokens, 0 for observations and padding.
    entropies: (B, T) in nats, with gradient if `entropy_coef` != 0; needed for that and if `top_entropy_quantile` < 1.
    Sums (TRL 1.16 `_compute_loss`): per-token loss x masks x importance ratio + beta x KL, weighted by the loss type,
    minus entropy_coef x mean entropy.
    """
    keep = mask.bool()
    mask, logps = keep.to(logps.policy.dtype), logps.masked(keep)
    entropies = None if entropies is None else entropies.masked_fill(~keep, 0.0)
    advantages = advantages.unsqueeze(1)

    log_ratio = logps.policy - logps.old
    if cfg.importance_sampling_level == "token":
        ratio = torch.exp(log_ratio)
    else:
        ratio = torch.exp((log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0))

    importance = None
    observed: dict[str, Tensor] = {}
    if cfg.vllm_importance_sampling_correction:
        assert logps.engine is not None, "vllm_importance_sampling_correction needs the engine's log-probabilities"
        importance, observed = compute_importance(cfg, logps.old, logps.engine, mask)

    loss_type: Loss = LOSSES.member(cfg.loss_type, "LOSS")
    terms = Terms(logps.policy, log_ratio, ratio, advantages, mask, importance)
    per_token, loss_metrics = loss_type.per_token(cfg, terms)
    space = "" if cfg.loss_type in LOSSES.shipped else "loss/"  # a user's own names meet none of ours
    observed |= {f"{space}{name}": values for name, values in loss_metrics.items()}

    if cfg.off_policy_mask_threshold is not None:
        sampling_logps = logps.old if logps.engine is None else logps.engine
        kept = keep_on_policy(cfg.off_policy_mask_threshold, logps.policy, sampling_logps, advantages, mask)
        observed["off_policy_mask/dropped"] = (1 - kept).squeeze(1)
        per_token = per_token * kept
    high_entropy = mask
    if cfg.top_entropy_quantile < 1.0:
        assert entropies is not None and normaliser.entropy_threshold is not None, (
            "use compute_normaliser with entropies"
        )
        high_entropy = mask * (entropies >= normaliser.entropy_threshold)
        per_token = per_token * high_entropy
    if importance is not None and not loss_type.uses_importance:
        per_token = per_token * importance

    if cfg.beta != 0.0:
        assert logps.reference is not None, "beta != 0 needs the reference's log-probabilities"
        # Schulman's k3 estimator, DeepSeekMath (arXiv 2402.03300) eq. 4; neither masks nor importance ratio touch it.
        log_ref_ratio = logps.reference - logps.policy
        kl = torch.exp(log_ref_ratio) - log_ref_ratio - 1
        if cfg.use_bias_correction_kl:
            kl = kl * ratio
        observed["kl"] = kl
        per_token = per_token + cfg.beta * kl

    loss = (per_token * mask * loss_type.weight(mask, normaliser)).sum()
    if cfg.entropy_coef != 0.0:
        assert entropies is not None, "entropy_coef != 0 needs entropies"
        tokens = normaliser.tokens if cfg.top_entropy_quantile == 1.0 else normaliser.entropy_tokens
        assert tokens is not None, "use compute_normaliser with entropies"
        loss = loss - cfg.entropy_coef * (entropies * high_entropy).sum() / max(tokens, 1)
    if entropies is not None:
        observed["entropy"] = entropies
    return LossOutput(loss, {name: _share(values.detach(), mask, normaliser) for name, values in observed.items()})


def _share(values: Tensor, mask: Tensor, totals: Normaliser) -> Tensor:
    """Return the share in a mean: over the step's tokens for (B, T), over its rows for (B,)."""
    if values.ndim == 1:
        return values.to(mask.dtype).sum() / max(totals.rows, 1)
    return (values * mask).sum() / max(totals.tokens, 1)
