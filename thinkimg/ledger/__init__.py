"""The ledger: what became of an iteration's rewards, read back from stored artifacts, without an engine and without a GPU.

remix     what another mix would have made of stored scores
explain   the whole story of one trajectory's reward
diff      which scores differ between two artifacts, and why
"""
