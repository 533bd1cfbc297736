"""The loss family: one file per loss, named like the value of `train.loss.loss_type`.

Such a file defines `class Settings(LossConfig)`, with the settings that only this loss has, and `LOSS`, its per-token
term and the weight of each token. It imports torch within functions only, so that the config need not wait for it.

    train.loss ──► Settings          grpo/loss.py ──► LOSS.per_token(settings, terms) x LOSS.weight(mask, totals)

A user's own is such a module elsewhere: `train.loss.loss_type: my_project.losses.mine`, or an entry point of the group
`thinkimg.losses`.
"""
