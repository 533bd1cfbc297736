"""What comes from the Hub is known by its commit, also offline; a model of which none is known is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from thinkimg import hub
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.models.base import Base, BaseSource
from thinkimg.models.clip import hub_repository, load_encoder, weights_digest
from thinkimg.models.settings import ModelConfig
from thinkimg.pipeline import outside_inputs

MODEL, CLIP, DATA = "someone/a-model", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "someone/a-set"
CONFIG = {"config.json": b'{"model_type": "qwen2_5_vl"}', "model.safetensors": b"weights"}
READ_DATA = """
import json, sys
from thinkimg.config.load import load_config
from thinkimg.data.source import open_source
from thinkimg.images.decode import ImageLimits
config = load_config("tiny", ["data.source=hub", "data.path=" + sys.argv[1]])
source = open_source(config.data, ImageLimits())
print(json.dumps([source.name, source.digest, [row.answers for row in source.rows()]]))
"""


def source(path: str = MODEL, revision: str | None = None) -> BaseSource:
    hub._resolve.cache_clear()  # as in another process
    return BaseSource.of(ModelConfig(path=path, revision=revision))


def test_a_model_without_a_revision_is_the_commit_that_its_branch_is_now(hub_server):
    first = hub_server.commit("models", MODEL, CONFIG)
    assert source().reference().digest == f"{MODEL}@{first}"
    asked = len(hub_server.asked)
    kept = source()
    assert kept.entry() == {"name": MODEL, "revision": first, "directory": None}
    assert Base(**kept.entry()).locate().name == first
    assert len([path for path in hub_server.asked[asked:] if path.startswith(f"/api/models/{MODEL}/revision")]) <= 1
    second = hub_server.commit("models", MODEL, CONFIG | {"chat_template.jinja": b"another"})
    assert BaseSource.of(ModelConfig(path=MODEL)).reference().digest == f"{MODEL}@{first}", "a process keeps to one"
    assert source().reference().digest == f"{MODEL}@{second}"
    assert source(revision=first).reference().digest == f"{MODEL}@{first}", "a commit is asked of nobody"
    assert Base(**source(revision=first).entry()).locate().name == first


def test_offline_it_is_the_commit_of_the_cache(hub_server, monkeypatch):
    commit = hub_server.commit("models", MODEL, CONFIG)
    Base(**source().entry()).locate()
    hub_server.close()
    assert source().reference().digest == f"{MODEL}@{commit}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert source().reference().digest == f"{MODEL}@{commit}"
    assert Base(**source().entry()).locate().name == commit


def test_a_cache_made_by_another_program_is_enough(hub_server, tmp_path, monkeypatch):
    """As transformers or `hf download` leave it: a branch's file with the commit, and the snapshot's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache" / f"models--{MODEL.replace('/', '--')}"
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("c" * 40) / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    assert source().reference().digest == f"{MODEL}@{'c' * 40}"
    assert Base(**source().entry()).locate() == folder / "snapshots" / ("c" * 40)


@pytest.mark.parametrize(("path", "revision"), [("someone/nothing", None), (MODEL, "nothing")])
@pytest.mark.parametrize("reachable", [True, False])
def test_where_no_commit_can_be_known_it_may_be_planned_and_not_run(hub_server, path, revision, reachable):
    hub_server.commit("models", MODEL, CONFIG)
    if not reachable:
        hub_server.close()
    assert source(path, revision).reference().digest == f"{path}@{revision or 'main'}"
    with pytest.raises(UserError, match=f"The commit of {path} on the Hub can't be found: ") as error:
        Base(**source(path, revision).entry()).locate()
    assert "\n" not in str(error.value)


class Trained:
    """A policy's state.json."""

    def __init__(self, name, revision):
        self.base = {"name": name, "revision": revision}

    def json(self, name):
        assert name == "policy/state.json"
        return {"base": self.base}


def test_a_policy_keeps_the_commit_that_it_was_trained_on(hub_server):
    first, second = (hub_server.commit("models", MODEL, CONFIG | {"x": text}) for text in (b"1", b"2"))
    policy = Trained(MODEL, first)
    base = Base(**source().entry(policy)).checked({"base": policy.base})
    assert base.locate().name == first
    with pytest.raises(UserError, match=f"trained on {MODEL}@{first}, not on {MODEL}@{second}"):
        Base(**source(revision=second).entry(policy)).checked({"base": policy.base})
    for revision in (None, "v1"):  # of policies of version 0.2, which recorded what the settings said
        old = Trained(MODEL, revision)
        assert Base(**source(revision=revision).entry(old)).checked({"base": old.base}).revision == revision


@pytest.mark.parametrize("recorded", ["c" * 40, None])
def test_an_unknown_commit_is_not_that_of_a_policy(hub_server, recorded):
    """The settings ask for a tag, and the Hub does not answer: the policy's commit may be another."""
    hub_server.close()
    base = Base(**source(revision="v2").entry(Trained(MODEL, recorded)))
    assert base.revision == "v2"
    with pytest.raises(UserError, match=f"trained on {MODEL}.*, not on {MODEL}@v2"):
        base.checked({"base": {"name": MODEL, "revision": recorded}})


def test_a_failure_is_asked_again_in_the_same_process(hub_server):
    assert hub.find_commit(MODEL) is None
    commit = hub_server.commit("models", MODEL, CONFIG)
    assert hub.find_commit(MODEL) == commit == hub.require_commit(MODEL)


@pytest.mark.parametrize("missing", [MODEL, CLIP])
def test_no_loop_is_opened_under_a_name_without_its_commit(hub_server, missing):
    """Until then a loop's identity would be `name@main`, and another one as soon as the Hub answers."""
    embedding = ["image.types=[embedding]", "mix={embedding: 1.0}"]
    embedding += ["image.embedding={model: ViT-B-32, pretrained: laion2b_s34b_b79k}"]
    pixels = ["images.min_pixels=784", "images.max_pixels=12544"]
    config = load_config("development", [f"model.path={MODEL}", *pixels, *embedding])
    commits = {name: hub_server.commit("models", name, CONFIG) for name in (MODEL, CLIP) if name != missing}
    with pytest.raises(UserError, match=f"The commit of {missing} on the Hub can't be found: "):
        outside_inputs(config)
    commits[missing] = hub_server.commit("models", missing, CONFIG)
    outside = outside_inputs(config)
    assert outside["base"].endswith(commits[MODEL]) and outside["clip"].endswith(commits[CLIP])


class Weights:
    """Settings of image.embedding."""

    def __init__(self, model, pretrained):
        self.model, self.pretrained = model, pretrained


@pytest.mark.parametrize(
    ("model", "pretrained", "repository"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", CLIP),
        ("ViT/B/32", "laion2b_s34b_b79k", CLIP),
        ("hf-hub:someone/clip", None, "someone/clip"),
        ("ViT-B-32", "no-such-tag", None),
        ("local-dir:x", None, None),
        ("warmstart", None, None),
    ],
)
def test_a_clip_of_the_hub_has_a_commit(hub_server, model, pretrained, repository):
    hub._resolve.cache_clear()
    assert hub_repository(model, pretrained) == repository
    if repository is None:
        if not model.startswith("local-dir:"):
            assert weights_digest(Weights(model, pretrained), None) == f"{model}/{pretrained}"
        return
    for text in (b"1", b"2"):
        hub._resolve.cache_clear()
        commit = hub_server.commit("models", repository, {"open_clip_config.json": text})
        assert weights_digest(Weights(model, pretrained), None) == f"{model}/{pretrained}@{commit}"
    hub_server.close()
    hub._resolve.cache_clear()
    assert weights_digest(Weights(model, pretrained), None) == f"{model}/{pretrained}@{commit}"


def test_a_clip_that_changes_between_the_plan_and_the_run_is_refused(hub_server, tmp_path):
    from thinkimg.models.clip import CONFIG as NAME
    from thinkimg.models.clip import WEIGHTS, train_tiny

    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    train_tiny(tmp_path / "clip", [("Which?", *pictures)], seed=0, steps=1)
    files = {name: (tmp_path / "clip" / name).read_bytes() for name in (NAME, WEIGHTS)}
    name = "hf-hub:someone/clip"
    with pytest.raises(UserError, match="The commit of someone/clip on the Hub can't be found"):
        load_encoder(name, None)
    hub._resolve.cache_clear()
    hub_server.commit("models", "someone/clip", files)
    planned = weights_digest(Weights(name, None), None)
    hub_server.commit("models", "someone/clip", files | {"README.md": b"new"})
    with pytest.raises(UserError, match=f"The CLIP model {name} has changed on the Hub"):
        load_encoder(name, None)
    hub._resolve.cache_clear()
    assert weights_digest(Weights(name, None), None) != planned
    assert load_encoder(name, None).texts(["a"]).shape == (1, 64)


def parquet(answer: str) -> bytes:
    picture, table = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    image = {"bytes": picture.getvalue(), "path": "a.png"}
    pq.write_table(pa.table({"image": [image], "question": ["?"], "answer": [answer]}), table)
    return table.getvalue()


def test_a_data_set_is_its_commit_online_and_off(hub_server, tmp_path):
    def read(**offline) -> list:
        own = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **offline}
        done = subprocess.run(
            [sys.executable, "-c", READ_DATA, DATA], env=os.environ | own, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    for answer in ("yes", "no"):
        commit = hub_server.commit("datasets", DATA, {"data/train-00000-of-00001.parquet": parquet(answer)})
        assert read() == [DATA, commit, [[answer]]]
    assert read(HF_HUB_OFFLINE="1") == [DATA, commit, [["no"]]]
    assert Path(tmp_path / "home").is_dir()
