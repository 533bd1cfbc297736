"""One frozen tree of settings, with YAML presets, dotted overrides, JSON Schema and one sentence for each mistake.

    cli, flows ──► load ──► tree ──► settings.py of each section (conversation, data, engine, rewards, trainer, …)
                    │                    │
                    ▼                    ▼
              presets/*.yaml      the registries' entries (losses, sources, protocols, judges)

A section defines its settings beside its code, on the base class in thinkimg/settings.py. Nothing below this package
knows `Config`: a stage takes its slice and hands sections down. `where` says on what machines and how fast things run:
it is recorded in manifests and never part of a fingerprint.
"""
