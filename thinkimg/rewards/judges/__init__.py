"""Judges: rewards that look at the processed image with a model, one file each; see judge.Judge."""
