"""A user's own loss, protocol, source, rule and judge outside of the clone: configured, run, fingerprinted."""

import ast
import json
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fingerprints import ROLLOUTS, fingerprints
from PIL import Image
from rewards_rows import call, final, trajectory
from rewards_rows import sample as sample_of
from users_files import BRACKETS, BREVITY, REINFORCE

import thinkimg
from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.protocol import PROTOCOLS, Answer, ToolCall, load_protocol
from thinkimg.data.settings import SCHEMAS, SOURCES
from thinkimg.dry_run import preview
from thinkimg.errors import UserError
from thinkimg.grpo.loss import Logps, compute_grpo_loss, compute_normaliser
from thinkimg.grpo.settings import LOSSES
from thinkimg.images.decode import pixel_hash
from thinkimg.models.settings import FAMILIES
from thinkimg.registry import source_digest
from thinkimg.resources import Resources
from thinkimg.rewards import judging
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.mix import Mix
from thinkimg.rewards.registry import load_components
from thinkimg.rewards.settings import JUDGES, RULES
from thinkimg.scheduler import Builder, Plan
from thinkimg.stages.prepare import prepare
from thinkimg.stages.score import judge_settings
from thinkimg.store.artifacts import Store

COLOURS = '''"""Pictures of one colour, made on the spot."""

import hashlib
import io

from PIL import Image

from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source, raw_row


class Settings(RowsConfig):
    count: int = 4


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def open_source(data, limits):
    def rows():
        for number in range(data.count):
            record = {"image": number, "question": "How red?", "answer": str(number), "mood": "calm"}
            yield raw_row(record, data, lambda value: lambda: png(value), id=f"c{number}", where=f"colour {number}")

    return Source("colours", hashlib.sha256(str(data.count).encode()).hexdigest(), rows)
'''
SCHEMA = '''"""Rows of mine."""
from thinkimg.data.fields import Fields

VERSION, TITLE, COLUMNS, READS = 1, "mine", ({"frage", "bild", "antwort"},), {"frage", "bild", "antwort"}

def convert(record):
    return Fields(record["frage"], record["bild"], record["antwort"])
'''
REDNESS = '''"""How red the processed image is."""

import thinkimg.settings
from thinkimg.rewards.judgement import Judgement


class Settings(thinkimg.settings.Settings):
    gain: float = 1.0


def judge(pairs, context):
    gain = context.settings.image.redness.gain
    reds = [context.images.decoded(pair.processed).getpixel((0, 0))[0] for pair in pairs]
    context.judged(len(pairs))
    return [Judgement(gain * red / 255, None, {"red": red}) for red in reds]
'''
MAGNIFY = '''"""Magnify the picture."""

from thinkimg.images.tool import ToolArgs, in_place

region = in_place


class Args(ToolArgs):
    pass


def apply(image, args):
    return image.resize((2 * image.width, 2 * image.height))
'''
MINE = '''"""A family of mine."""

from thinkimg.families.qwen3_vl import Qwen3_VL
from thinkimg.images.patches import ImageProcessor


class Mine(Qwen3_VL):
    model_types = ("mine_vl",)
    hub_names = "mine-vl-"
    processor = ImageProcessor(patch=10, merge=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


FAMILY = Mine()
'''
FILES = {
    "tools/magnify.py": MAGNIFY,
    "losses/reinforce.py": REINFORCE,
    "protocols/brackets.py": BRACKETS,
    "sources/colours.py": COLOURS,
    "rules/brevity.py": BREVITY,
    "rules/tool.py": BREVITY,
    "judges/redness.py": REDNESS,
    "judges/self.py": REDNESS,
    "schemas/rows.py": SCHEMA,
    "families/mine.py": MINE,
    "losses/broken.py": "1 / 0",
    "losses/empty.py": '"""No loss."""',
    "losses/alien.py": "class Settings: pass",
}
KINDS = {"losses": LOSSES, "protocols": PROTOCOLS, "sources": SOURCES, "rules": RULES, "judges": JUDGES,
         "schemas": SCHEMAS, "families": FAMILIES}  # fmt: skip
LOSS, PROTOCOL, SOURCE, RULE, JUDGE = (
    f"users_own.{name}"
    for name in ("losses.reinforce", "protocols.brackets", "sources.colours", "rules.brevity", "judges.redness")
)
UNJUDGED = ["image.types=[]", "mix={answer: 1.0}"]
JUDGED = [f"image.types=[embedding, {JUDGE}]", "image.weights.redness=0.5"]
TINY_IMAGES = "images: {min_pixels: 784, max_pixels: 12544}"


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A project of the user's, on the path and with entry points; not under this repository."""
    root = tmp_path_factory.mktemp("user")
    for name, source in FILES.items():
        (path := root / "users_own" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (info := root / "users_own-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users-own\nVersion: 1.0\n")
    modules = {kind: next(name for name in FILES if name.startswith(kind)).split("/")[1][:-3] for kind in KINDS}
    points = [f"[thinkimg.{kind}]\ninstalled_{kind} = users_own.{kind}.{name}\n" for kind, name in modules.items()]
    (info / "entry_points.txt").write_text("\n".join(points))
    sys.path.insert(0, str(root))
    for registry in KINDS.values():
        vars(registry).pop("_installed", None)  # looked up once
    yield root
    sys.path.remove(str(root))
    for registry in KINDS.values():
        vars(registry).pop("_installed", None)


def test_a_loss_with_a_setting_of_its_own():
    cfg = load_config(
        "tiny", [f"train.loss.loss_type={LOSS}", "train.loss.strength=3", "train.loss.epsilon=0.1"]
    ).train.loss
    cfg = cfg.model_copy(update={"vllm_importance_sampling_correction": False})
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    normaliser = compute_normaliser(cfg, [mask], max_completion_length=2)
    options = {"mask": mask, "entropies": None, "normaliser": normaliser}
    out = compute_grpo_loss(cfg, Logps(logps, logps.detach()), advantages=torch.tensor([1.0, -1.0]), **options)
    assert out.loss.item() == pytest.approx(3 * (1 + 2 - 3) / 3)
    out.loss.backward()
    assert logps.grad.tolist() == [[-1, -1], [1, 0]]


def test_a_protocol():
    config = load_config("tiny", [f"conversation.protocol={PROTOCOL}", "conversation.system=null"])
    protocol = load_protocol(config.conversation.protocol)
    action = ToolCall("crop_image", {"x": 1})
    assert protocol.parse(protocol.render_turn("So.", action)) == action
    assert protocol.parse("So.\n\n<answer>red</answer>") == Answer("red")
    assert '[[{"name"' in render_system_prompt(config.conversation)


def test_a_source_with_a_setting_of_its_own(project, tmp_path):
    """tests/cli/test_own_entries.py has one through the command line."""
    data = f"data: {{source: {SOURCE}, count: 5, train: 3, held_out: 2}}"
    (project / "mine.yaml").write_text(f"extends: tiny\n{data}\n{TINY_IMAGES}\n")

    def load(*more):
        return load_config(str(project / "mine.yaml"), [f"where.store={tmp_path}", *more])

    def look(config):
        plan = Plan(config)
        plan.require(prepare)
        return "\n".join(preview(plan, Store(tmp_path)))

    with Resources(load().where) as resources:
        dataset = Builder(load(), Store(tmp_path), resources).make(prepare)
    recipe = dataset.manifest["recipe"]
    assert recipe["config"]["data"]["count"] == 5 and recipe["sources"].keys() == {SOURCE}
    assert "path" not in recipe["config"]["data"] and "puzzles" not in recipe["config"]["data"]
    assert {"train": 3, "held_out": 2}.items() <= dataset.metrics.items()
    assert "Cached" in look(load()) and "missing" in look(load("data.count=6"))
    with pytest.raises(UserError, match=r"Did you mean data\.count\?"):
        load("data.cuont=6")


def test_a_rule_with_a_setting_of_its_own():
    config = load_config("tiny", [f"rewards.rules=[{RULE}]", "rewards.brevity.most=2", "mix.brevity=0.5"])
    scored = load_components(config.rewards, config.image)
    assert list(scored)[-1] == "brevity"
    Mix.from_config(config.mix, config.image).check(scored)
    rows = [trajectory(final(), answer="red"), trajectory(call(), final(), answer="red")]
    found = scored["brevity"](Batch(rows, {"s0": sample_of()}, config.rewards))
    assert [one.value for one in found] == [0.5, 0.0]


class Pictures(dict):
    decoded = dict.__getitem__


def test_a_judge_with_a_setting_of_its_own_and_its_weight():
    config = load_config("tiny", [*JUDGED, "image.redness.gain=0.5"])
    settings, pictures = judge_settings(config), Pictures()
    shown = [Image.new("RGB", (64, 64), (red, 0, 0)) for red in (0, 255)]
    for picture in shown:
        picture.putpixel((9, 9), (1, 2, 3))  # something can be seen
        pictures[pixel_hash(picture)] = picture
    original, processed = map(pixel_hash, shown)
    resources = SimpleNamespace(where=SimpleNamespace(workers=1, takes_turns=False))
    context = JudgeContext(settings, resources, None, None, None, (), pictures)
    pair, judgements = Pair("Which colour?", original, processed), {}
    judging.run_judges(["redness"], {pair}, context, lambda *_: {}, lambda name, found: judgements.update(found))
    (judgement,) = judgements.values()
    assert judgement.value == 0.5 and judgement.by.judge == "redness"
    assert judging.build_ledger(judgements).to_pylist()[0]["component"] == "redness"

    turn = call("crop_image", x=0, y=0, width=14, height=14)
    turn = type(turn)(**{**vars(turn), "image": processed})
    row = trajectory(turn, final(), answer="red", images=(original, processed), grids=((1, 4, 4),) * 2)
    sample = sample_of()
    sample = type(sample)(**{**vars(sample), "images": (original,)})
    batch = Batch([row], {"s0": sample}, config.rewards, image=config.image, judgements=judgements)
    assert [one.value for one in load_components(config.rewards, config.image)["redness"](batch)] == [0.5]

    assert Mix.from_config(config.mix, config.image).types == {"embedding": 0.2, "redness": 0.5}
    assert Mix.from_tree(json.loads(config.model_dump_json())).types == {"embedding": 0.2, "redness": 0.5}
    assert config.image.fingerprinted()["redness"] == {"gain": 0.5}


OWN = {
    "train": ("losses/reinforce.py", [f"train.loss.loss_type={LOSS}"], "train.loss.strength=2"),
    "prepare": ("sources/colours.py", [f"data.source={SOURCE}"], "data.count=9"),
    "score": ("rules/brevity.py", [f"rewards.rules=[{RULE}]"], "rewards.brevity.most=9"),
    "score of a judge": ("judges/redness.py", JUDGED, "image.redness.gain=2"),
}


@pytest.mark.parametrize("kind", OWN)
def test_its_settings_and_its_file_enter_the_fingerprint(project, kind):
    name, overrides, more = OWN[kind]
    stage, path = kind.split()[0], project / "users_own" / name
    plain = fingerprints(load_config("tiny", overrides))
    changed = fingerprints(load_config("tiny", [*overrides, more]))
    assert {name for name in plain if plain[name] != changed[name]} == {stage}
    text = path.read_text()
    path.write_text(text + "# another version\n")
    source_digest.cache_clear()
    edited = fingerprints(load_config("tiny", overrides))
    path.write_text(text)
    source_digest.cache_clear()
    assert {name for name in plain if plain[name] != edited[name]} == {stage}
    assert fingerprints(load_config("tiny", overrides)) == plain


def test_a_tools_file_enters_the_fingerprint_of_what_it_plays_in_and_of_the_judges_scores(project, monkeypatch):
    """Which part of a picture an image shows the tool says when the image is judged."""
    tools, path = ("users_own.tools.magnify",), project / "users_own" / "tools" / "magnify.py"
    monkeypatch.setattr(ROLLOUTS, "tools", tools)
    own = [f"conversation.tools=[{tools[0]}]"]
    plain = [fingerprints(load_config("tiny", more)) for more in ([*own, *JUDGED], [*own, *UNJUDGED])]
    text = path.read_text()
    path.write_text(text + "# another version\n")
    source_digest.cache_clear()
    edited = [fingerprints(load_config("tiny", more)) for more in ([*own, *JUDGED], [*own, *UNJUDGED])]
    path.write_text(text)
    source_digest.cache_clear()
    judged, unjudged = (
        {name for name in old if old[name] != new[name]} for old, new in zip(plain, edited, strict=True)
    )
    assert "rollout" in judged and judged - unjudged == {"score"}


def test_a_protocols_file_enters_the_fingerprint_of_what_is_played():
    plain, own = (fingerprints(load_config("tiny", more)) for more in ([], [f"conversation.protocol={PROTOCOL}"]))
    assert {"rollout", "evaluate", "demonstrate"} <= {name for name in plain if plain[name] != own[name]}
    assert load_config("tiny", [f"conversation.protocol={PROTOCOL}"]).sources().keys() == {PROTOCOL}


def test_an_installed_entry_goes_by_its_name_and_is_in_the_schema():
    assert all(f"installed_{kind}" in registry for kind, registry in KINDS.items())
    config = load_config("tiny", ["train.loss.loss_type=installed_losses", "train.loss.strength=2"])
    assert config.train.loss.strength == 2 and config.sources().keys() == {"installed_losses"}
    schema = json.dumps(Config.model_json_schema())
    assert all(f'"{name}"' in schema for name in ("strength", "count", "installed_protocols", "installed_judges"))


def test_the_resolved_config_survives_its_own_json():
    overrides = [f"train.loss.loss_type={LOSS}", f"data.source={SOURCE}", f"rewards.rules=[{RULE}]", *JUDGED]
    config = load_config("tiny", [*overrides, "train.loss.strength=2", "image.redness.gain=2"])
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    assert pickle.loads(pickle.dumps(config)) == config  # as Dask sends it
    assert config.sources().keys() == {LOSS, SOURCE, RULE, JUDGE}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.loss.loss_type=users_own.losses.nothing"], "There is no 'users_own.losses.nothing' among the losses"),
        (["train.loss.loss_type=users_own.losses.broken"], "can't be imported: ZeroDivisionError"),
        (["train.loss.loss_type=users_own.losses.empty"], "it defines no Settings"),
        (["train.loss.loss_type=users_own.losses.alien"], "is no subclass of LossConfig"),
        ([f"train.loss.loss_type={LOSS}", "train.loss.strenght=2"], "Did you mean train.loss.strength?"),
        ([f"train.loss.loss_type={LOSS}", "train.loss.strength=much"], "train.loss.strength"),
        (["train.loss.strength=2"], "belongs to loss_type installed_losses"),
        ([f"conversation.protocol={LOSS}"], "none of the protocols: it defines no PROTOCOL"),
        (["data.source=nowhere.at.all"], "among the sources"),
        ([f"image.types=[{JUDGE}]"], "a weight for each of image.types, and has none for redness"),
        ([*JUDGED, "image.redness.gian=2"], "Did you mean image.redness.gain?"),
        ([f"image.types=[{RULE}]"], "it defines no judge"),
    ],
)
def test_a_mistake_gets_one_sentence(overrides, said):
    with pytest.raises(UserError) as error:
        load_config("tiny", overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides", [["rewards.rules=[users_own.rules.tool]"], ["image.types=[users_own.judges.self]"]]
)
def test_no_entry_takes_the_name_of_another(overrides):
    config = load_config("tiny", overrides)
    with pytest.raises(UserError, match="the name is taken"):
        load_components(config.rewards, config.image)


def test_a_registry_looks_in_its_own_package_only():
    """A discovery by name is an import that the import-linter does not see: one that went up would be a hole."""
    folder = Path(thinkimg.__file__).parent
    found = {}
    for path in folder.rglob("*.py"):
        for kind, package in re.findall(r'= Registry\("(\w+)", "([\w.]+)"\)', path.read_text()):
            found[kind] = package
            home = "models" if kind == "families" else package.split(".")[1]  # a folder of its own, of the same layer
            assert home == path.relative_to(folder).parts[0], path
            entries = folder.parent / package.replace(".", "/")
            assert ast.get_docstring(ast.parse((entries / "__init__.py").read_text())), f"{package} says nothing"
            assert len(ast.parse((entries / "__init__.py").read_text()).body) == 1, f"{package} holds more than entries"
    assert found.keys() == {*KINDS, "tools"}
    for registry in KINDS.values():
        assert all(registry[name] for name in registry.shipped)
