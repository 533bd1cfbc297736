"""GRPO without models or files: from raw reward components to advantages, and from log-probabilities to the loss.

    rewards ─► advantages.mix_rewards ─► group_advantages ─► select_included_rows ────────────┐
                                                                                             ▼
    the trainer's log-probabilities, loss.compute_normaliser (a step's totals) ─► loss.compute_grpo_loss
                                                                                             ▲
    settings.LossConfig ─► losses/<loss_type> (terms.Loss) ──────────────────────────────────┘

`advantages` and `settings` import no torch.
"""
