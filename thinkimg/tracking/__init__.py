"""MLflow as the projection of manifests and loop records: what it lacks is added by `sync`, and nothing doubles.

This package is the only place that imports mlflow, and it does so when a connection is opened, not before.

    artifacts/*/*/*/manifest.json --------> experiment thinkimg-stages: one short run per artifact
    artifacts/loops/<loop id>.json -------> experiment thinkimg: one run per loop, its points, tables and traces,
                                            and one model version per policy
"""

from thinkimg.tracking.loop import LoopTracker, SyncReport, compare_link, log_stage, open_loop, sync, ui_command
from thinkimg.tracking.projection import input_digest
from thinkimg.tracking.records import IterationRecord, LoopRecord, headline, load_record, loop_id, records, save_record
from thinkimg.tracking.traces import log_traces

__all__ = [
    "IterationRecord",
    "LoopRecord",
    "LoopTracker",
    "SyncReport",
    "compare_link",
    "headline",
    "input_digest",
    "load_record",
    "log_stage",
    "log_traces",
    "loop_id",
    "open_loop",
    "records",
    "save_record",
    "sync",
    "ui_command",
]
