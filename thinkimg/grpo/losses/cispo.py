"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a capped importance weight; no token loses its gradient."""

from typing import TYPE_CHECKING, Literal

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, Terms, reduce_to_level, token_mean

if TYPE_CHECKING:
    from torch import Tensor


class Settings(LossConfig):
    loss_type: Literal["cispo"] = "cispo"


def per_token(cfg: Settings, terms: Terms) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return -min(ratio, epsilon_high) A log pi.

    The cap is epsilon_high itself, not 1 + epsilon_high (recommended: 5.0).
    """
    weight = terms.ratio.clamp(max=cfg.upper_epsilon).detach()
    is_clipped = (terms.ratio > cfg.upper_epsilon) & (terms.advantages > 0)
    return -weight * terms.advantages * terms.logps, {"cispo_clip_ratio": reduce_to_level(cfg, is_clipped)}


LOSS = Loss(per_token, token_mean)
