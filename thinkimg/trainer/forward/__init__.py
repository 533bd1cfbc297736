"""Fast forward pass of a vision-language model: log-probabilities of chosen tokens.

    conversations ─► packing ────────► batch, padded ──┐
                 └─► shared_prompts ─► batch, packed ──┤
    pixels ────────► vision (tower) ─► features ───────┤
                                                       ▼
    logprobs.Scorer ─► language model ─► packed_attention (CPU) or flex (GPU) ─► head, a slice at a time

`fsdp` shards the decoder layers over processes. `attention` registers attention functions with transformers.
"""
