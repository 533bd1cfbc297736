"""LUSPO (arXiv 2602.05261): each row's loss times its length; meant for `importance_sampling_level` "sequence"."""

from typing import Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, compute_clipped_surrogate, row_sum


class Settings(LossConfig):
    loss_type: Literal["luspo"] = "luspo"


LOSS = Loss(compute_clipped_surrogate, row_sum)
