"""Models that a run starts from: the base, the tiny Qwen2.5-VL of the demo, the small CLIP."""
