"""TRL's BNPO: the mean over all tokens, in TRL of a micro-batch, here of the whole step (which makes it DAPO)."""

from typing import Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, compute_clipped_surrogate, token_mean


class Settings(LossConfig):
    loss_type: Literal["bnpo"] = "bnpo"


LOSS = Loss(compute_clipped_surrogate, token_mean)
