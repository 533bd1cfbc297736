"""Data sets of the Hugging Face Hub, by id or by a short name: downloaded, pinned, and read as local tables.

sources/files, sources/hub ──► hub_tables ──► public_sets (names), pins, snapshot (download), card (splits)
thinkimg data ls, pin      ──► public_sets, pin_check
"""
