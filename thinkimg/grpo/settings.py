"""Settings of the loss: names, meanings and defaults of TRL 1.16's GRPOConfig (does not import torch)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from thinkimg.registry import Registry
from thinkimg.settings import Variant

LOSSES = Registry("losses", "thinkimg.grpo.losses")
"""Each defines `Settings`, a LossConfig, and `LOSS`, a `terms.Loss`; it imports torch in functions only."""
ScaleRewards = Literal["group", "batch", "none"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class LossConfig(Variant):
    """Settings that all losses share; `loss_type` chooses the loss, which may have further ones.

    Left out of TRL 1.16: adaptive entropy control, the auxiliary loss of mixtures of experts, `normalize_then_sum`
    (GDPO) and synchronised reference models. So is the deprecated `vllm_importance_sampling_cap`.
    """

    registry = LOSSES
    chooser = "loss_type"

    loss_type: str = "dapo"
    """Objective and weighting of tokens: a file in thinkimg/grpo/losses, or the import path of a module of your own."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of policy to old policy for each token, or one per row: exp of the mean log-ratio (GSPO, arXiv 2507.18071;
    to be combined with loss_type "grpo" or "luspo", as the others weigh rows by length). `vespo` wants "token"."""
    epsilon: float = Field(0.2, ge=0)
    """Ratios are clipped below at 1 - epsilon."""
    epsilon_high: float | None = Field(None, ge=0)
    """Ratios are clipped above at 1 + epsilon_high; null means epsilon. DAPO recommends 0.28. For `cispo` it is the cap
    itself (not 1 + epsilon_high), and 5.0 is recommended: left at null `cispo` scales every gradient by about 0.2."""
    delta: float | None = Field(None, gt=0)
    """Upper bound of the ratio where the advantage is negative (two-sided clipping, INTELLECT-2), above
    1 + epsilon_high. Null: no bound."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the reference policy. 0: no reference policy is evaluated."""
    use_bias_correction_kl: bool = True
    """Multiply each token's KL estimate by the ratio of policy to old policy (before clipping), which makes its
    gradient unbiased (DeepSeek-V3.2, arXiv 2512.02556). Neither the engine correction nor the masks below touch it."""
    off_policy_mask_threshold: float | None = Field(None, gt=0)
    """Rows with a negative advantage whose mean log(engine / policy) exceeds this (nats per token) leave the policy
    term (DeepSeek-V3.2 eq. 9). Null: all stay."""
    top_entropy_quantile: float = Field(1.0, ge=0, le=1)
    """Share of the step's tokens, those of highest entropy, that stay in the policy term (arXiv 2506.01939: 0.2)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of a bonus for the mean entropy per token, the same for every loss_type."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the group, of all included rows ("batch"), or not (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Drop rows that ended at the length limit from the loss. They stay in their group's statistics."""
    vllm_importance_sampling_correction: bool = True
    """Correct for the difference between the engine's log-probabilities and the trainer's, by the ratio of old policy
    to engine."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """A ratio per token, or per row (the product over its tokens, not normalised by length); one outside the caps is
    clipped to them ("truncate") or set to 0 ("mask"); what is kept is multiplied by its ratio in either case."""
    vllm_importance_sampling_clip_max: float | None = Field(3.0, ge=1)
    """Upper cap of that ratio; null: none. At least 1, so that rows without any difference pass unchanged."""
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, le=1)
    """Lower cap of that ratio; null: none."""

    @property
    def upper_epsilon(self) -> float:
        """epsilon_high, or epsilon where it is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.vllm_importance_sampling_correction:
            return self
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError("vllm_importance_sampling_clip_min must be smaller than vllm_importance_sampling_clip_max")
        if self.vllm_importance_sampling_mode.endswith("truncate") and low is None and high is None:
            raise ValueError("a truncate mode needs vllm_importance_sampling_clip_min or _clip_max: set one of them")
        return self
