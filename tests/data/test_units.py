"""The unit of positions in a data set's reports: that of the model that is asked; boxes stay pixels of the picture."""

import json

import numpy as np
import pytest
from single_stage import build_stage
from small_sets import write_signs

from thinkimg.answers.boxes import read_box
from thinkimg.cli.data import read_settings, summarise_dataset
from thinkimg.config.load import load_config
from thinkimg.conversation.question import state_question
from thinkimg.data.report.inspect import inspect
from thinkimg.data.report.lines import example_lines
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store

FAMILIES = {"qwen2_5_vl": "pixels", "qwen3_vl": "thousandths", "qwen3_5": "thousandths"}
"""Family -> unit of its positions."""
BOXES = [[100 * i, 50, 100 * i + 80, 950 - 10 * i] for i in range(10)]
"""x1, y1, x2, y2 in thousandths."""


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A data set whose right answers are boxes as Qwen3-VL's own data has them, on pictures of 120 x 90 pixels."""
    root = tmp_path_factory.mktemp("units") / "boxes"
    return write_signs(root, 10, answer=lambda i: json.dumps({"bbox_2d": BOXES[i]}))


@pytest.mark.parametrize("form", ["thousandths_xyxy", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_data_set_is_shown_in_the_unit_in_which_it_is_asked(boxes, tmp_path, family, form):
    unit = FAMILIES[family]
    overrides = [f"data.path={boxes}", "data.answer_type=box", f"data.boxes={form}", f"model.tiny.family={family}"]
    artifact, _ = build_stage(prepare, load_config("tiny", overrides), Store(tmp_path))
    assert artifact.manifest["recipe"]["config"]["asked"]["conversation"]["coordinates"] == unit
    summary = summarise_dataset(artifact, count=10, pictures=False)
    assert len(summary.examples) == 10
    for example in summary.examples:
        *question, form = example.text.split("\n")
        assert form == f"Answer with x, y, width, height in {unit} of image 0."
        assert question[0].startswith("Image 0: ") and f" {unit}. " in question[0]
        (size,) = [picture.size for picture in example.pictures]
        number = int(example.sample.sample_id.rpartition(":")[2]) - 1
        left, top, right, bottom = np.array(BOXES[number]) * (size * 2) / 1000
        assert read_box(example.sample.answer) == pytest.approx((left, top, right - left, bottom - top))
        assert "box, in pixels of the picture" in "\n".join(example_lines(example))


@pytest.mark.parametrize(
    "model, unit",
    [("Qwen/Qwen2.5-VL-3B-Instruct", "pixels"), ("Qwen/Qwen3-VL-8B-Instruct", "thousandths")],
)
@pytest.mark.parametrize("coordinates", [None, "pixels", "thousandths"])
def test_a_look_states_questions_in_the_unit_of_the_model_or_of_the_settings(boxes, model, unit, coordinates):
    overrides = ["data.answer_type=box", f"model.path={model}"]
    overrides += [f"conversation.coordinates={coordinates}"] if coordinates else []
    data, limits, shown = read_settings(str(boxes), overrides)
    assert shown == (coordinates or unit)
    inspection = inspect(data, limits, lambda sample, sizes: state_question(sample, sizes, shown), pictures=False)
    ((report,),) = [[look() for look in inspection.looks]]
    assert report.problem is None and report.examples
    assert all(example.text.endswith(f"in {coordinates or unit} of image 0.") for example in report.examples)
