"""GRPO (DeepSeekMath, arXiv 2402.03300): the mean over each row's tokens, so tokens of short rows weigh more."""

from thinkimg.grpo.losses._common import Loss, clipped_surrogate, row_mean

LOSS = Loss(clipped_surrogate, row_mean)
