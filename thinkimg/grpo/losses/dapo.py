"""DAPO (arXiv 2503.14476): every token of the step weighs the same."""

from thinkimg.grpo.losses._common import Loss, clipped_surrogate, token_mean

LOSS = Loss(clipped_surrogate, token_mean)
