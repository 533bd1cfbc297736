"""Rewards that look at the processed image with a model, one file each: see judge.Judge for what it defines."""
