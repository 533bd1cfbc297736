"""A loop is its config, its data, its models and its code: what differs in one of them is another run of MLflow."""

import json
import shutil
import sys

import pytest
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.pipeline import outside_inputs
from thinkimg.rewards.user_function import load_function
from thinkimg.store.artifacts import Store
from thinkimg.tracking.loop import open_loop
from thinkimg.tracking.records import load_records, loop_id


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "own_loop.py").write_text("import own_part\ndef mine(completions, **columns): return own_part.VALUES\n")
    (tmp_path / "own_part.py").write_text("VALUES = [1]\n")
    write_data(tmp_path, "yes")
    write_script(tmp_path, "yes")
    load_function.cache_clear()
    yield tmp_path
    load_function.cache_clear()
    for name in ("own_loop", "own_part"):
        sys.modules.pop(name, None)


def write_data(folder, answer):
    (folder / "d.jsonl").write_text(json.dumps({"image": "a.png", "question": "?", "answer": answer}))


def write_script(folder, answer):
    (folder / "script.jsonl").write_text(json.dumps({"sample_id": "s", "turns": [f"<answer>{answer}</answer>"]}))


def config_of(project, *more):
    own = ["data.source=jsonl", f"data.path={project / 'd.jsonl'}", "rewards.functions=['own_loop:mine']"]
    tracking = ["where.tracking.enabled=false", f"where.store={project / 'store'}"]
    script = [f"warmstart.demonstrations={project / 'script.jsonl'}"]
    return load_config("tiny", [*own, *tracking, *script, *more])


CHANGES = {
    "data": lambda project: write_data(project, "no"),
    "picture": lambda project: Image.new("RGB", (60, 40), "blue").save(project / "a.png"),
    "conversations": lambda project: write_script(project, "no"),
    "code": lambda project: (project / "own_part.py").write_text("VALUES = [0]\n"),
}


CHANGED = {"data": "source", "picture": "source", "conversations": "script", "code": "code of own_loop:mine"}


@pytest.mark.parametrize("changed", CHANGES)
def test_an_equal_config_with_other_contents_is_another_loop(project, changed, caplog):
    config, store = config_of(project), Store(project / "store")
    ids = []
    for _ in range(2):
        with open_loop(config, store, outside_inputs(config)) as tracker:
            ids.append(tracker.record.loop_id)
    assert not caplog.messages
    CHANGES[changed](project)
    load_function.cache_clear()
    with open_loop(config, store, outside_inputs(config)) as tracker:
        ids.append(tracker.record.loop_id)
    (warning,) = caplog.messages
    assert ids[0] in warning and warning.endswith(f": {CHANGED[changed]}.")
    assert ids[0] == ids[1] != ids[2] and len(list(load_records(store))) == 2


def test_what_may_change_in_a_loop_does_not_make_it_another(project):
    outside = outside_inputs(config_of(project))
    assert {"source", "script", "code of own_loop:mine"} <= outside.keys()
    longer = config_of(project, "iterations=9", "on_alarm=warn")
    assert loop_id(longer, outside_inputs(longer)) == loop_id(config_of(project), outside)


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "weights.safetensors").write_bytes(b"1")


STARTS = {
    "base": ["model.tiny=null", "model.path={root}/model", "warmstart.demonstrations=null"],
    "checkpoint": ["warmstart.checkpoint={root}/model", "warmstart.demonstrations=null"],
    "script": ["warmstart.demonstrations={root}/script.jsonl"],
}
CLIP = [
    "image.types=[embedding]",
    "mix={{embedding: 1.0}}",
    "image.embedding={{model: 'local-dir:{root}/clip', pretrained: null}}",
]


@pytest.mark.parametrize("role", STARTS)
def test_where_the_contents_lie_does_not_count(project, role, monkeypatch):
    """A copy and a relative path are the same loop, other settings beside them are not."""
    for name in ("model", "clip"):
        (project / name).mkdir()
        (project / name / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    shutil.copytree(project, copy := project.parent / f"{project.name}-copy")
    monkeypatch.chdir(project)
    ids = []
    for root in (project, copy, "."):
        for more in ([], ["seed=5"]):
            texts = [text.format(root=root) for text in ["data.path={root}/d.jsonl", *CLIP, *STARTS[role]]]
            config = config_of(project, *texts, *more)
            outside = outside_inputs(config)
            assert {"source", "clip", role} <= outside.keys()
            ids.append(loop_id(config, outside))
    assert len(set(ids)) == 2 and ids[::2] == [ids[0]] * 3, ids


def test_a_loop_on_built_in_data_is_its_config():
    config = load_config("tiny", [])
    assert outside_inputs(config) == {} and loop_id(config, {}) == loop_id(config)
