"""Figures of an iteration and what is read back from stored artifacts, without an engine and without a GPU."""
