"""Stages: each makes one kind of artifact from input artifacts and a slice of the config.

    prepare ──► dataset ─┬─► rollout ──► rollouts ──► score ──► scores ──► train ──► policy ─┐
                         │      ▲                                            ▲               │  × iterations
        warmstart ──► policy ───┴────────────────────────────────────────────┴───────────────┘
                         └─► evaluate ──► evaluation

stage.py says what a stage is. Every other module but names.py holds one stage under the module's own name. Before the
loop known_pairs makes pairs of images for teaching and measuring judges, demonstrate writes conversations for
warmstart, and train_clip trains a small CLIP. A stage calls no other stage; pipeline.py joins them.
"""
