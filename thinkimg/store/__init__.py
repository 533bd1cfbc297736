"""The content-addressed store: files, manifests, artifacts, their lineage and their removal."""
