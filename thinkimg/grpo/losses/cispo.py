"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a capped importance weight; no token loses its gradient."""

import torch
from torch import Tensor

from thinkimg.grpo.loss_config import LossConfig
from thinkimg.grpo.losses._common import Loss, Terms, by_level, token_mean


def per_token(cfg: LossConfig, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio, epsilon_high) A log pi. The cap is epsilon_high itself, not 1 + epsilon_high (recommended: 5.0)."""
    weight = torch.clamp(terms.ratio, max=cfg.upper_epsilon).detach()
    is_clipped = (terms.ratio > cfg.upper_epsilon) & (terms.advantages > 0)
    return -weight * terms.advantages * terms.logps, {"cispo_clip_ratio": by_level(cfg, is_clipped)}


LOSS = Loss(per_token, token_mean)
