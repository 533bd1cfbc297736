"""Sparse YAML presets; `extends` names the preset that one starts from."""
