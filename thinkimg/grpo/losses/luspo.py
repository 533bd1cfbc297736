"""LUSPO (arXiv 2602.05261): each row's loss times its length; meant for `importance_sampling_level` "sequence"."""

from thinkimg.grpo.losses._common import Loss, clipped_surrogate, row_sum

LOSS = Loss(clipped_surrogate, row_sum)
