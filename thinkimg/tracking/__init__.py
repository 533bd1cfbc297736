"""MLflow as a projection of manifests and loop records; `thinkimg track sync` adds what it lacks, and nothing doubles.

This package alone imports mlflow, when a connection is opened.

    artifacts/*/*/*/manifest.json --------> experiment thinkimg-stages: one short run per artifact
    artifacts/loops/<loop id>.json -------> experiment thinkimg: one run per loop, its points, tables and traces,
                                            and one model version per policy

    flows/loop.py ──► loop.py ─┬─► records.py       the loop's JSON file
                               ├─► projection.py    runs, points, models
                               ├─► trace_data.py ──► traces.py
                               └─► connection.py    MLflow itself; view.py: the saved view of its UI
"""
