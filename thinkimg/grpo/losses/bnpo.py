"""TRL's BNPO: the mean over all tokens, in TRL of a micro-batch, here of the whole step (which makes it DAPO)."""

from thinkimg.grpo.losses._common import Loss, clipped_surrogate, token_mean

LOSS = Loss(clipped_surrogate, token_mean)
