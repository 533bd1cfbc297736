"""VESPO (arXiv 2602.10693): REINFORCE, each row weighted by a Gamma-shaped function of its sequence ratio."""

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, Terms, token_mean

if TYPE_CHECKING:
    from torch import Tensor

LOG_W_MIN, LOG_W_MAX = math.log(1e-8), 20.0
"""Range of a log-weight, from the authors' implementation by way of TRL."""


class Settings(LossConfig):
    loss_type: Literal["vespo"] = "vespo"
    vespo_k_pos: float = Field(2.0, ge=0)
    """Power of the row's weight where the advantage is not negative; damps weights below 1."""
    vespo_lambda_pos: float = Field(3.0, ge=0)
    """Decay of the row's weight where the advantage is not negative; damps weights above 1."""
    vespo_k_neg: float = Field(3.0, ge=0)
    """The same power where the advantage is negative."""
    vespo_lambda_neg: float = Field(2.0, ge=0)
    """The same decay where the advantage is negative."""

    @model_validator(mode="after")
    def _by_token(self) -> Self:
        if self.vllm_importance_sampling_correction and self.vllm_importance_sampling_mode.startswith("sequence"):
            raise ValueError(
                "loss_type vespo computes sequence ratios itself: "
                "set vllm_importance_sampling_mode to token_truncate or token_mask"
            )
        return self


def gamma_weight(cfg: Settings, terms: Terms) -> "Tensor":
    """Return (B, 1): phi(w) = e^lambda w^k e^(-lambda w); w is policy / engine, a product over the row's tokens.

    phi(1) = 1. Its gradient is not wanted: d(-phi A log pi) = -phi A d log pi.
    """
    import torch

    log_w = (torch.clamp(terms.log_ratio.detach(), -20.0, 20.0) * terms.mask).sum(-1, keepdim=True)
    if terms.importance is not None:
        # A token that token_mask set to 0 counts as 1e-8, hence drops its row. Masked tokens have ratio 1.
        log_w = log_w + torch.clamp(torch.log(terms.importance), LOG_W_MIN, LOG_W_MAX).sum(-1, keepdim=True)
    log_w = torch.clamp(log_w, LOG_W_MIN, LOG_W_MAX)
    positive = terms.advantages >= 0
    k = torch.where(positive, cfg.vespo_k_pos, cfg.vespo_k_neg)
    lambda_ = torch.where(positive, cfg.vespo_lambda_pos, cfg.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lambda_ + k * log_w - lambda_ * torch.exp(log_w))
    return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def per_token(cfg: Settings, terms: Terms) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return -phi A log pi."""
    phi = gamma_weight(cfg, terms)
    return -phi * terms.advantages * terms.logps, {"vespo/phi_seq_mean": phi.squeeze(1)}


LOSS = Loss(per_token, token_mean, uses_importance=True)
