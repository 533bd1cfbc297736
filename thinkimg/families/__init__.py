"""The model families: one file each, named like its `model_type` in config.json.

Such a file defines `FAMILY`, an instance of a subclass of models.family.Family: all that differs between the models
that can be trained. Nothing else in thinkimg asks for a model's name.

    config.json ──► models.family.find_family ──┬─► FAMILY.processor ──► images, trainer
                                                ├─► FAMILY.coordinates, .protocols ──► conversation
                                                ├─► FAMILY.compute_features, .language_inputs ──► trainer
                                                ├─► FAMILY.engine_options ──► engine
                                                └─► FAMILY.make_config ──► tiny models

A user's own is such a module elsewhere: an entry point of the group `thinkimg.families`.
"""
