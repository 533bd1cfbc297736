"""Saved view *Compare mixes* of MLflow's UI: charts of all runs, metrics that are comparable between mixes first.

The UI lists the saved views of an experiment under "Views" and keeps each as a tag of it. Its default view has all
metrics in alphabetical order: raw rewards come after some seventy others.
"""

import base64
import json
import zlib
from collections.abc import Iterable

from thinkimg.store.manifest import utc_now
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.records import milliseconds

KEY, NAME = "thinkimg", "Compare mixes"
TAG = f"mlflow.sharedViewState.{KEY}"
QUERY = f"viewStateShareKey={KEY}&compareRunsMode=CHART&workflowType=machine_learning"
REWARDS, EVALUATION = "Raw rewards of the rollouts", "Held-out evaluation"
HELD_OUT = ("eval/accuracy", "eval/avg_at_k")


def offer_view(connection: Connection, keys: Iterable[str]) -> None:
    """Save the view, or add the charts that it lacks for these metrics; a user's changes of it stay."""
    wanted = [(EVALUATION, key) for key in HELD_OUT]
    wanted += [(REWARDS, key) for key in sorted(keys) if key.startswith("reward/") and key.count("/") == 1]
    tags = connection.client.get_experiment(connection.loops).tags
    view = json.loads(tags[TAG]) if TAG in tags else {"createdAt": milliseconds(utc_now()), "name": NAME}
    state = decode_state(view["state"]) if "state" in view else empty_state()
    have = {existing.get("metricKey") for existing in state["compareRunCharts"]}
    missing = [line_chart(section, key) for section, key in wanted if key not in have and key != "reward/total"]
    if missing:
        state["compareRunCharts"] += missing
        view |= {"state": encode_state(state), "updatedAt": milliseconds(utc_now())}
        connection.client.set_experiment_tag(connection.loops, TAG, json.dumps(view))


def empty_state() -> dict:
    """Return the state of a view of all runs, newest first; MLflow adds its own sections to these two."""
    sections = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        | {"columns": 2}
        for name in (EVALUATION, REWARDS)
    ]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["attributes.`Dataset`"],
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": [],
        "compareRunSections": sections,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def line_chart(section: str, key: str) -> dict:
    """Return the chart of one metric over the iterations."""
    return {
        "uuid": key,
        "type": "LINE",
        "metricSectionId": section,
        "metricKey": key,
        "displayName": key,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def encode_state(state: dict) -> str:
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()}"


def decode_state(state: str) -> dict:
    return json.loads(zlib.decompress(base64.b64decode(state.removeprefix("deflate;"))))
