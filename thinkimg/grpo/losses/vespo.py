"""VESPO (arXiv 2602.10693): REINFORCE, each row weighted by a Gamma-shaped function of its sequence ratio."""

import math

import torch
from torch import Tensor

from thinkimg.grpo.loss_config import LossConfig
from thinkimg.grpo.losses._common import Loss, Terms, token_mean

LOG_W_MIN, LOG_W_MAX = math.log(1e-8), 20.0
"""Range of a log-weight, from the authors' implementation by way of TRL."""


@torch.no_grad()
def gamma_weight(cfg: LossConfig, terms: Terms) -> Tensor:
    """phi(w) = e^lambda w^k e^(-lambda w), so phi(1) = 1; w is policy / engine over the row's tokens, a product.

    Returns (B, 1). Its gradient is not wanted: d(-phi A log pi) = -phi A d log pi.
    """
    log_w = (torch.clamp(terms.log_ratio, -20.0, 20.0) * terms.mask).sum(-1, keepdim=True)
    if terms.importance is not None:
        # A token that token_mask set to 0 counts as 1e-8, hence drops its row. Masked tokens have ratio 1.
        log_w = log_w + torch.clamp(torch.log(terms.importance), LOG_W_MIN, LOG_W_MAX).sum(-1, keepdim=True)
    log_w = torch.clamp(log_w, LOG_W_MIN, LOG_W_MAX)
    positive = terms.advantages >= 0
    k = torch.where(positive, cfg.vespo_k_pos, cfg.vespo_k_neg)
    lambda_ = torch.where(positive, cfg.vespo_lambda_pos, cfg.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lambda_ + k * log_w - lambda_ * torch.exp(log_w))
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def per_token(cfg: LossConfig, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """-phi A log pi."""
    phi = gamma_weight(cfg, terms)
    return -phi * terms.advantages * terms.logps, {"vespo/phi_seq_mean": phi.squeeze(1)}


LOSS = Loss(per_token, token_mean, uses_importance=True)
