"""The demo's world: puzzles cut from photographs, scripted demonstrations of them, pairs of images known to help or not."""
