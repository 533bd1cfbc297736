"""The stages: each a plain function from settings and input artifacts to an artifact, and whether it was there already.

prepare ──► dataset ─┬─► rollout ──► rollouts ──► score ──► scores ──► train ──► policy ─┐
                     │      ▲                                            ▲               │  × iterations
    warmstart ──► policy ───┴────────────────────────────────────────────┴───────────────┘
                     └─► evaluate ──► evaluation
"""
