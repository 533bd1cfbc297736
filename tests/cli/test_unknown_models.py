"""A model of no known family, or of none that can be known: one sentence, before anything starts."""

import json
import subprocess
import sys

import pytest

from flows import _server
from thinkimg.cli.main import app
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.models.family import list_families, load_family

COMMANDS = (["run", "--dry-run"], ["run"], ["prepare", "--dry-run"], ["prepare"], ["rollout", "--policy", "0123"])
UNKNOWN, UNREADABLE, UNSTATED = "There is no model family for the model_type", "can't be read", "states no model_type"
FILES = {
    b'{"model_type": "llama"}': UNKNOWN,
    b'{"model_type": "gemma3"}': UNKNOWN,
    b'{"model_type": "qwen2_vl"}': UNKNOWN,
    b'{"model_type": "QWEN3_VL"}': UNKNOWN,
    b'{"model_type": ""}': UNKNOWN,
    json.dumps({"model_type": "x\n" * 9999}).encode(): UNKNOWN,
    b"{": UNREADABLE,
    b"": UNREADABLE,
    b"\xff": UNREADABLE,
    b"[" * 200_000: UNREADABLE,
    b"{}": UNSTATED,
    b"null": UNSTATED,
    b"[1]": UNSTATED,
    b'{"model_type": null}': UNSTATED,
    b'{"model_type": ["qwen3_vl"]}': UNSTATED,
}
NAMES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Thinking": "qwen3_vl",
    "someone/qwen3-vl-4b-tuned": "qwen3_vl",
    "Qwen/Qwen3.5-9B": "qwen3_5",
    "Qwen/Qwen3.6-27B": "qwen3_5",
}
"""Id on the Hub -> family that its name tells."""
TELLING_NOTHING = ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-8B", "someone/a-model", "not-Qwen/my-Qwen3-VL-8B")


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """refuse(*overrides): the sentence with which each command refuses them; nothing is started or written."""
    (folder := tmp_path / "folder").mkdir()
    monkeypatch.chdir(folder)
    started = []
    monkeypatch.setattr(_server, "start_server", lambda: started.append(1))

    def refuse(*overrides: str) -> str:
        said = set()
        for command in COMMANDS:
            with pytest.raises(UserError) as error:
                app([*command, "--preset", "tiny", *(f"--set={override}" for override in overrides)])
            said.add(str(error.value))
        assert len(said) == 1 and not started and list(folder.iterdir()) == []
        (sentence,) = said
        assert "\n" not in sentence and len(sentence) < 1000
        return sentence

    return refuse


@pytest.mark.parametrize("setting", ["model.path", "warmstart.checkpoint"])
@pytest.mark.parametrize("content", FILES, ids=lambda content: ascii(content[:24]))
def test_a_directory_whose_family_is_not_known_is_refused(refuse, tmp_path, content, setting):
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_bytes(content)
    sentence = refuse("model.tiny=null", f"{setting}={model}")
    assert FILES[content] in sentence
    assert FILES[content] == UNKNOWN or str(model) in sentence
    if FILES[content] != UNREADABLE:
        types = [name for family in list_families().values() for name in family.model_types]
        assert f"Known are {', '.join(types)}." in sentence and {"qwen2_5_vl", "qwen3_vl", "qwen3_5"} <= set(types)


def test_a_directory_that_is_no_model_is_refused_as_such(refuse, tmp_path):
    (empty := tmp_path / "Qwen3-VL-8B").mkdir()
    assert "holds no model: there is no config.json" in refuse("model.tiny=null", f"model.path={empty}")
    assert "There is no model directory" in refuse("model.tiny=null", f"model.path={tmp_path}/Qwen3-VL-4B")
    assert "There is no checkpoint in" in refuse(f"warmstart.checkpoint={empty}")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_tells_the_family_needs_no_network(hub_server, name):
    hub_server.down = True
    assert load_config("balanced", [f"model.path={name}"]).family().name == NAMES[name]
    assert hub_server.asked == []


@pytest.mark.parametrize("name", TELLING_NOTHING)
def test_a_name_that_tells_nothing_is_looked_up_or_refused(hub_server, refuse, name):
    hub_server.down = True
    sentence = refuse("model.tiny=null", f"model.path={name}")
    assert name in sentence and "that the Hub can be reached" in sentence
    hub_server.down = False
    hub_server.commit("models", name, {"config.json": b'{"model_type": "llama"}'})
    assert f"{UNKNOWN} 'llama'" in refuse("model.tiny=null", f"model.path={name}")


def test_what_the_files_say_counts_for_more_than_the_name(hub_server):
    name = "someone/Qwen3-VL-like"
    commit = hub_server.commit("models", name, {"config.json": b'{"model_type": "qwen2_5_vl"}'})
    settings = [f"model.path={name}", f"model.revision={commit}"]
    assert load_config("balanced", settings).family().name == "qwen3_vl"
    from huggingface_hub import hf_hub_download

    hf_hub_download(name, "config.json", revision=commit)
    assert load_config("balanced", settings).family().name == "qwen2_5_vl"


def test_a_family_that_states_too_little_is_refused(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        """from thinkimg.families.qwen2_5_vl import FAMILY as OTHER
from thinkimg.models.family import Family

class Half(Family):
    model_types, processor, processor_class = ("half",), OTHER.processor, OTHER.processor_class
    make_config = None

FAMILY = Half()
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="FAMILY of halves states no hub_names and no coordinates and no protocols"):
        load_family("halves")
    assert all(load_family(name) for name in list_families())


def test_a_family_is_known_without_a_heavy_import_or_a_network():
    """What `thinkimg schema`, a form and a dry run ask of the settings, several times."""
    code = (
        "import sys; from thinkimg.config.load import load_config\n"
        "from thinkimg.stages.rollout import rollout\n"
        "from thinkimg.tracking.loop import open_loop\n"
        "for overrides in [], ['model.tiny=null'], ['model.tiny.family=qwen3_5']:\n"
        "    config = load_config('tiny', overrides)\n"
        "    assert config.conversation.protocol is None and rollout.settings(config).conversation.protocol\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    names = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "thinkimg" in names and not {"torch", "transformers", "vllm", "mlflow"} & set(names)
