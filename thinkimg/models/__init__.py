"""Models that a run starts from: the base model, the demo's tiny one, CLIP.

    settings (ModelConfig) ──► base.BaseSource ──► Base.locate ──► trainer, engine
                                                     ▲ where model.tiny is set
    stages/demonstrate ──► tiny.create_tiny ─────────┘ (config, weights, tokenizer)
    stages/train_clip ──► clip.train_tiny ──► small CLIP ──┐
    resources ──► clip.load_encoder ◄──────────────────────┴── or a model of open_clip

`seeding` and `importing` are locks for stages that run side by side in one process.
"""
