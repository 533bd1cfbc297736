"""GRPO without models or files: from raw reward components to advantages, and from log-probabilities to the loss.

    rewards ─► advantages.mix_rewards ─► advantages.advantages ─► advantages.included_rows ──┐
                                                                                             ▼
    the trainer's log-probabilities, loss.step_normaliser (totals of the step) ──────► loss.grpo_loss
                                                                                             ▲
    settings.LossConfig ─► losses/<loss_type> (terms.Loss) ──────────────────────────────────┘

`advantages` and `settings` import no torch.
"""
