"""GRPO (DeepSeekMath, arXiv 2402.03300): the mean over each row's tokens, so tokens of short rows weigh more."""

from typing import Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, compute_clipped_surrogate, row_mean


class Settings(LossConfig):
    loss_type: Literal["grpo"] = "grpo"


LOSS = Loss(compute_clipped_surrogate, row_mean)
