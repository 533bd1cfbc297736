"""Dr. GRPO (arXiv 2503.20783): rows x max_completion_length as a constant denominator, so length has no influence."""

from thinkimg.grpo.losses._common import Loss, clipped_surrogate, constant_mean

LOSS = Loss(clipped_surrogate, constant_mean)
