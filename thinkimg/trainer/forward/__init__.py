"""The fast forward pass: packing, shared prompts, packed attention, vision, log-probabilities, FSDP2."""
