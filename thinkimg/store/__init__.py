"""Content-addressed store of artifacts: files, manifests, tables, lineage and removal.

    stages ──► artifacts (Store, Work) ──► manifest (Recipe, Artifact) ──► files (write, sync, rename)
                   │                           ▲
                   ▼                           │
    readers ──► kinds (Dataset, Rollouts, …) ──┴──► tables, image_table (Parquet)

    cli ──► lineage (Graph) ◄── gc (Garbage)

An artifact is a directory that is complete when it has its manifest. `Store.build` returns the artifact of a recipe, or
makes it in a `Work` whose closed parts survive a crash.
"""
