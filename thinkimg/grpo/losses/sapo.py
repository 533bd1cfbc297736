"""SAPO (arXiv 2511.20347): a sigmoid gate around ratio 1 in place of the clip; mean over each row's tokens."""

import torch
from torch import Tensor

from thinkimg.grpo.loss_config import LossConfig
from thinkimg.grpo.losses._common import Loss, Terms, row_mean


def per_token(cfg: LossConfig, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A, with tau by the sign of A."""
    tau = torch.where(terms.advantages > 0, cfg.sapo_temperature_pos, cfg.sapo_temperature_neg)
    return -torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.advantages, {}


LOSS = Loss(per_token, row_mean)
