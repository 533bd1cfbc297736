"""Dr. GRPO (arXiv 2503.20783): rows x max_completion_length as a constant denominator, so length has no influence."""

from typing import Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, compute_clipped_surrogate, constant_mean


class Settings(LossConfig):
    loss_type: Literal["dr_grpo"] = "dr_grpo"


LOSS = Loss(compute_clipped_surrogate, constant_mean)
