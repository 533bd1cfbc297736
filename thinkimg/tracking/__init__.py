"""MLflow as the projection of manifests and loop records: what it lacks is added by `sync`, and nothing doubles.

This package is the only place that imports mlflow, and it does so when a connection is opened, not before.

    artifacts/*/*/*/manifest.json --------> experiment thinkimg-stages: one short run per artifact
    artifacts/loops/<loop id>.json -------> experiment thinkimg: one run per loop, its points, tables and traces,
                                            and one model version per policy
"""
