"""Terms of a loss: its inputs, the clipped surrogate, and the four ways of weighting tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinkimg.grpo.settings import LossConfig

if TYPE_CHECKING:  # the settings of a loss lie beside it, and must not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Normaliser:
    """Totals of one whole optimizer step, over its micro-batches and processes, after exclusion of rows.

    Every loss divides by these and never by a property of its micro-batch. So a step's micro-batches sum to one loss,
    however the step is cut.
    """

    rows: int
    """Trajectories in the step."""
    tokens: int
    """Tokens with mask 1 in the step."""
    max_completion_length: int
    """Upper limit of a trajectory's completion, in tokens (observations included); only `dr_grpo` reads it."""
    entropy_threshold: float | None = None
    """Entropy (nats) from which a token stays in the policy term; needed if `top_entropy_quantile` < 1."""
    entropy_tokens: int | None = None
    """Tokens at or above that threshold; needed if `top_entropy_quantile` < 1 and `entropy_coef` != 0."""


@dataclass(frozen=True)
class Terms:
    """Inputs of a loss for B rows of T completion tokens; all floating tensors are 0 where the mask is 0."""

    logps: "Tensor"
    """(B, T), carries the gradient."""
    log_ratio: "Tensor"
    """(B, T), log(policy / old policy), carries the gradient."""
    ratio: "Tensor"
    """(B, T), or (B, 1) at level "sequence": exp of the log-ratio, there of its mean; carries the gradient."""
    advantages: "Tensor"
    """(B, 1)."""
    mask: "Tensor"
    """(B, T) of 0 and 1, in the dtype of `logps`."""
    importance: "Tensor | None"
    """(B, T) or (B, 1), old policy / engine after the cap, no gradient; None if correction is off."""


PerToken = Callable[[Any, Terms], "tuple[Tensor, dict[str, Tensor]]"]
"""(the loss's own settings, terms) -> loss (B, T) or (B, 1), to be minimised; and metrics: (B, T) of tokens or (B,) of
rows. The names of a user's own loss get `loss/` in front."""

Weight = Callable[["Tensor", Normaliser], "Tensor | float"]
"""(mask (B, T), totals) -> weight of each token, broadcastable to (B, T)."""


@dataclass(frozen=True)
class Loss:
    """A member of the family: sum over tokens of per_token x weight."""

    per_token: PerToken
    weight: Weight
    uses_importance: bool = False
    """True if `per_token` has used `Terms.importance` itself; otherwise it is multiplied onto the result."""


def compute_clipped_surrogate(cfg: LossConfig, terms: Terms) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return PPO's clipped objective (arXiv 1707.06347 eq. 7), and the shares of clipped tokens.

    The upper bound is its own (DAPO, arXiv 2503.14476 section 3.1). `delta` bounds negative advantages too
    (INTELLECT-2, arXiv 2505.07291).
    """
    low, high = 1 - cfg.epsilon, 1 + cfg.upper_epsilon
    ratio = terms.ratio
    clipped = ratio.clamp(low, high)
    if cfg.delta is not None:
        ratio = ratio.clamp(max=cfg.delta)
    loss = -(ratio * terms.advantages).minimum(clipped * terms.advantages)
    is_low = (ratio < low) & (terms.advantages < 0)
    is_high = (ratio > high) & (terms.advantages > 0)
    return loss, {
        "clip_ratio/low_mean": reduce_to_level(cfg, is_low),
        "clip_ratio/high_mean": reduce_to_level(cfg, is_high),
        "clip_ratio/region_mean": reduce_to_level(cfg, is_low | is_high),
    }


def reduce_to_level(cfg: LossConfig, values: "Tensor") -> "Tensor":
    """Return values computed from `Terms.ratio` as those of tokens (B, T) or of rows (B,).

    The shape alone does not tell: a micro-batch of one-token rows is (B, 1), too.
    """
    return values.squeeze(1) if cfg.importance_sampling_level == "sequence" else values


def row_mean(mask: "Tensor", totals: Normaliser) -> "Tensor":
    """Weigh by the mean over a row's tokens, then over the step's rows. A row without tokens counts as loss 0."""
    return 1.0 / (mask.sum(-1, keepdim=True).clamp(min=1.0) * max(totals.rows, 1))


def token_mean(mask: "Tensor", totals: Normaliser) -> float:
    """Weigh by the mean over the step's tokens."""
    return 1.0 / max(totals.tokens, 1)


def constant_mean(mask: "Tensor", totals: Normaliser) -> float:
    """Weigh by the sum over a row's tokens / the constant `max_completion_length`, then the mean over the rows."""
    return 1.0 / (max(totals.rows, 1) * totals.max_completion_length)


def row_sum(mask: "Tensor", totals: Normaliser) -> float:
    """Weigh by the sum over a row's tokens, then the mean over the step's rows."""
    return 1.0 / max(totals.rows, 1)
