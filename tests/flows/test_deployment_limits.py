"""Limits on a deployment's run: what its overrides may set and name, decided before anything is imported."""

import os
import re
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

from flows._common import open_config, open_input
from flows.loop import loop
from flows.prepare import prepare
from thinkimg.config.deployment import CODE
from thinkimg.errors import UserError
from thinkimg.images.toolbox import TOOLS
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe

SPY = """
from pathlib import Path
Path("imported").touch()

def score(completions, **columns):
    return [1.0] * len(completions)
"""
OPEN = "extends: tiny\nrewards: {functions: ['trusted:score']}\nwhere: {functions_allow: [allowed]}\n"
NAMED = [
    "rewards.functions=['spy:score']",
    "rewards={functions: ['spy:score']}",
    "rewards.functions=[!!binary c3B5OnNjb3Jl]",
    "rewards.functions=!!set {'spy:score'}",
    "rewards.rules=[spy]",
    "image.types=[self, spy]",
    "image={types: [spy]}",
    "conversation.tools=[crop_image, spy]",
    "conversation.tools=[!!binary c3B5]",
    "conversation={tools: !!set {spy}}",
    "conversation.protocol=spy",
    "data.source=spy",
    "data={source: spy, train: 3}",
    "train.loss.loss_type=spy",
    "train={loss: {loss_type: spy}}",
    "conversation.tools=[allowed_not]",
    "data.source=trusted.more",
    "rewards.rules=['trusted:score']",
]
FIXED = {
    "where.functions_allow=[spy]": "where.functions_allow",
    "where={functions_allow: [spy]}": "where",
    "where.runner=tcp://elsewhere:8786": "where.runner",
    "where.teacher={url: 'http://elsewhere/v1', api_key_env: AWS_SECRET_ACCESS_KEY}": "where.teacher",
    "model.trust_remote_code=true": "model.trust_remote_code",
    "model={trust_remote_code: true, path: some/model}": "model.trust_remote_code",
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Folder of a user's with three modules that leave a trace when they are imported; the working directory."""
    for name in ("spy", "trusted", "allowed"):
        (tmp_path / f"{name}.py").write_text(SPY)
    (tmp_path / "open.yaml").write_text(OPEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    for name in ("spy", "trusted", "allowed"):
        sys.modules.pop(name, None)


@pytest.fixture
def deployed(monkeypatch, project) -> Path:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1f0e5d5c-0000-0000-0000-000000000000")
    return project


@pytest.mark.parametrize("override", NAMED)
def test_user_code_in_an_override_is_refused_before_it_is_imported(deployed, override):
    with pytest.raises(UserError, match=r"^The run of a deployment can't name .+ in \S+\. Hint: .*functions_allow"):
        open_config("tiny", ["seed=3", override])
    assert not (deployed / "imported").exists() and "spy" not in sys.modules


@pytest.mark.parametrize("override", ["seed=[3", "image.types=&a [*a]", "image=&a {types: *a}"])
def test_a_value_that_is_none_is_refused_in_a_sentence(deployed, override):
    with pytest.raises(UserError, match="is no YAML"):
        open_config("tiny", [override])


@pytest.mark.parametrize("override", FIXED)
def test_a_setting_of_the_workers_owner_is_refused(deployed, override):
    with pytest.raises(UserError) as error:
        open_config("tiny", [override])
    assert error.value.message == f"The run of a deployment can't set {FIXED[override]}."


def test_what_the_preset_file_names_or_allows_is_used(deployed):
    config, _ = open_config("open.yaml", ["rewards.functions=['trusted:score', 'allowed:score']"], seed=5)
    assert config.rewards.functions == ("trusted:score", "allowed:score") and config.seed == 5
    with pytest.raises(UserError, match="can't name spy:score in rewards.functions"):
        open_config("open.yaml", ["rewards.functions=['spy:score']"])


def test_shipped_and_installed_entries_are_anybodys(deployed, monkeypatch):
    overrides = ["conversation.tools=[crop_image]", "image.types=[embedding]", "train.loss.loss_type=dr_grpo"]
    assert open_config("tiny", overrides)[0].train.loss.loss_type == "dr_grpo"
    monkeypatch.setitem(vars(TOOLS), "_installed", {"loupe": "allowed"})
    with pytest.raises(UserError, match="The module allowed is no tool"):  # it was looked at
        open_config("tiny", ["conversation.tools=[loupe]"])


def test_with_remote_code_in_the_preset_a_run_can_not_choose_the_model(deployed):
    Path("remote.yaml").write_text("extends: development\nmodel: {trust_remote_code: true}\n")
    assert open_config("remote.yaml", ["iterations=2"])[0].model.trust_remote_code
    for override in ("model.path=another/model", "model={revision: main}", "warmstart.checkpoint=folder"):
        with pytest.raises(UserError, match="can't set (model|warmstart.checkpoint)"):
            open_config("remote.yaml", [override])


def test_a_preset_file_lies_in_the_working_directory(deployed, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "open.yaml"
    outside.write_text("extends: tiny\nmodel: {trust_remote_code: true}\n")
    for folder in ("artifacts/mlartifacts/0", "data"):  # others write there: MLflow's server, a download
        Path(folder).mkdir(parents=True)
        Path(folder, "open.yaml").write_text(outside.read_text())
    Path("link.yaml").symlink_to(outside)
    Path("folder").symlink_to(outside.parent / "..")
    below = ("artifacts/mlartifacts/0/open.yaml", "data/open.yaml")
    links = ("link.yaml", f"folder/{outside.parent.name}/open.yaml", f"folder/../{outside.name}")
    Path(outside.parent.parent.parent, outside.name).write_text(outside.read_text())
    for path in (str(outside), os.path.relpath(outside), *below, *links):
        with pytest.raises(UserError, match="does not lie in its working directory"):
            open_config(path, [])
    assert open_config(str(deployed / "open.yaml"), [])[0].rewards.functions == ("trusted:score",)


def test_an_artifact_lies_in_the_store(project, monkeypatch, tmp_path_factory):
    """A manifest names tools and a protocol, which are imported."""
    stores = [Store(root) for root in (project / "artifacts", tmp_path_factory.mktemp("outside"))]
    inside, outside = (
        store.build("dataset", Recipe("prepare", 1, 1, {}), lambda work: work.json("stats.json", {}))[0]
        for store in stores
    )
    assert open_input(stores[0], str(outside.directory), "dataset").digest == outside.digest
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1f0e5d5c-0000-0000-0000-000000000000")
    assert open_input(stores[0], inside.short, "dataset").digest == inside.digest
    with pytest.raises(UserError, match="is outside of its store"):
        open_input(stores[0], str(outside.directory), "dataset")


def test_a_command_names_and_sets_what_it_likes(project):
    overrides = ["rewards.functions=['spy:score']", "where.store=elsewhere", "model.trust_remote_code=true"]
    config, store = open_config("tiny", overrides)
    assert config.sources().keys() == {"spy:score"} and (project / "imported").exists()
    assert (store.root, config.model.trust_remote_code) == (Path("elsewhere"), True)


def test_every_kind_of_user_code_is_limited():
    text = "".join(path.read_text() for path in (REPOSITORY / "thinkimg").rglob("*.py"))
    kinds = set(re.findall(r'= Registry\("(\w+)", "[\w.]+"\)', text))
    assert kinds == {registry.kind for registry in CODE.values() if registry} and len(kinds) == 8
    assert [path for path, registry in CODE.items() if registry is None] == ["rewards.functions"]


@pytest.mark.parametrize("flow", [loop, prepare])
def test_a_flow_ends_with_the_sentence_before_it_does_anything(deployed, flow):
    """The real thing, with a server and a worker: tests/system/test_deployments.py."""
    with pytest.raises(UserError, match="can't name spy in data.source"):
        flow.fn(preset="tiny", overrides=["data.source=spy"])
    assert not (deployed / "imported").exists() and not (deployed / "artifacts").exists()
