"""DAPO (arXiv 2503.14476): every token of the step weighs the same."""

from typing import Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, compute_clipped_surrogate, token_mean


class Settings(LossConfig):
    loss_type: Literal["dapo"] = "dapo"


LOSS = Loss(compute_clipped_surrogate, token_mean)
