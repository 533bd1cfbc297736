"""One frozen tree of settings, with YAML presets, dotted overrides, JSON Schema and one sentence for each mistake.

    flows ──► deployment (limits of a deployment's run)
                    │
                    ▼
    cli, flows ──► load ──► tree ──► settings.py of each section (conversation, data, engine, rewards, trainer, …)
                    │                    │
                    ▼                    ▼
              presets/*.yaml      the registries' entries (losses, sources, protocols, judges)

A section defines its settings beside its code, on the base class in thinkimg/settings.py. No package below imports
`Config`: a stage takes its slice and hands sections down. `where` has machines, addresses and speed: it is recorded in
manifests and enters no fingerprint.
"""
