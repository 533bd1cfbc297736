"""GRPO: from raw reward components to a policy's next weights (advantages, loss, packing, policy, trainer)."""
