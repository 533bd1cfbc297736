"""Rules: rewards that read the trajectory, one file each: `score(batch)`, and `Settings` where it has some."""
