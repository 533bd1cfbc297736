"""Rewards that read the trajectory, one file each."""
