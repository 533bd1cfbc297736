"""SAPO (arXiv 2511.20347): a sigmoid gate around ratio 1 in place of the clip; mean over each row's tokens."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, Terms, row_mean

if TYPE_CHECKING:
    from torch import Tensor


class Settings(LossConfig):
    loss_type: Literal["sapo"] = "sapo"
    sapo_temperature_pos: float = Field(1.0, gt=0)
    """Temperature of the gate where the advantage is positive."""
    sapo_temperature_neg: float = Field(1.05, gt=0)
    """Temperature of the gate elsewhere."""


def per_token(cfg: Settings, terms: Terms) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return -(4 / tau) sigmoid(tau (ratio - 1)) A, with tau by the sign of A."""
    import torch

    tau = torch.where(terms.advantages > 0, cfg.sapo_temperature_pos, cfg.sapo_temperature_neg)
    return -torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.advantages, {}


LOSS = Loss(per_token, row_mean)
