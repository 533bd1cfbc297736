"""Each file of docs/extending.md, in a project outside of the clone, used with the settings of its command."""

import json
import re
import shlex
import shutil
import tomllib

import numpy as np
import pytest
import torch
from paths import REPOSITORY, SUPPORT
from PIL import Image
from single_stage import build_stage
from stock_forward import stock_logps

from thinkimg import registry
from thinkimg.config.load import load_config
from thinkimg.conversation.protocol import PROTOCOLS, Answer, Malformed, ToolCall, load_protocol
from thinkimg.data.settings import SOURCES
from thinkimg.grpo.loss import Logps, compute_grpo_loss, compute_normaliser
from thinkimg.grpo.settings import LOSSES
from thinkimg.images.toolbox import TOOLS, load_tools
from thinkimg.models.family import find_family
from thinkimg.models.settings import FAMILIES, ModelConfig
from thinkimg.models.tiny import create_tiny
from thinkimg.rewards.settings import JUDGES, RULES
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.prepare import prepare
from thinkimg.stages.score import score
from thinkimg.store.artifacts import Store
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.policy import load_model

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
REGISTRIES = (TOOLS, RULES, JUDGES, SOURCES, LOSSES, PROTOCOLS, FAMILIES)
SMALL = [
    "model.tiny={vocab_size: 288, hidden_size: 32, layers: 1, heads: 1, vision_layers: 1, vision_hidden_size: 4, "
    "vision_heads: 1}",
    "images={min_pixels: 784, max_pixels: 12544}", "conversation.max_tokens=900", "conversation.max_turn_tokens=128",
    "data.held_out_share=0.4", "where.tracking.enabled=false", "warmstart.demonstrations=demonstrations.jsonl",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """The user's folder with the page's files, the entry points of its pyproject.toml, and pictures with notes."""
    root, patch = tmp_path_factory.mktemp("project"), pytest.MonkeyPatch()
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "notes").mkdir()
    for number in range(6):
        picture = (
            Image.linear_gradient("L").convert("RGB").point(lambda level, top=20 * number: 80 + level * top // 255)
        )
        picture.save(root / "notes" / f"n{number}.jpg")
        (root / "notes" / f"n{number}.txt").write_text(f"How pale?\n{number}\n")
    meta = tomllib.loads(FILES["pyproject.toml"])["project"]
    (info := root / "my_project-1.0.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {meta['name']}\nVersion: {meta['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in entries.items())
        for group, entries in meta["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    patch.chdir(root)
    patch.syspath_prepend(str(root))
    for kind in REGISTRIES:
        vars(kind).pop("_installed", None)  # looked up once
    yield root
    patch.undo()
    for kind in REGISTRIES:
        vars(kind).pop("_installed", None)
    load_tools.cache_clear()
    registry.source_digest.cache_clear()


def settings(part: str) -> list[str]:
    """The overrides of the page's command that names the part."""
    (command,) = [command for command in COMMANDS if part in command]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "thinkimg" and words[2:4] == ["--preset", "tiny"], words
    return [value for flag, value in zip(words[4::2], words[5::2], strict=True) if flag == "--set"]


@pytest.fixture(scope="module")
def played(project):
    """(data set, scripted conversations): the page's source, tool and protocol."""
    store = Store(project / "artifacts")
    own = [*settings("sources.notes"), *settings("tools.stretch"), *settings("protocols.brackets"), *SMALL]
    dataset, _ = build_stage(prepare, config := load_config("tiny", own), store)
    turns = ['Pale.\n\n[[{"name": "stretch", "args": {"cut": 2}}]]', "So, perhaps.\n\n<answer>1</answer>"]
    rows = [{"sample_id": sample.sample_id, "turns": turns} for sample in dataset.split("train")]
    (project / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    demonstrations, _ = build_stage(demonstrate, config, store, dataset=dataset)
    return dataset, demonstrations


def test_the_page_has_a_file_of_about_twenty_lines_for_each_kind():
    modules = [name for name in FILES if name.endswith(".py")]
    assert [name.split("/")[1] for name in modules] == [
        "tools", "rules", "rewards.py", "judges", "sources", "losses", "protocols", "families",
    ]  # fmt: skip
    assert all(10 <= len(FILES[name].splitlines()) <= 32 for name in modules)
    for kind in REGISTRIES:
        assert f"| `{kind.kind}` |" in PAGE
    assert len(COMMANDS) == len(modules) + 1


def test_the_source_prepares_a_data_set(played):
    dataset, _ = played
    samples = {sample.sample_id: sample for sample in dataset.samples()}
    assert samples.keys() == {f"n{number}" for number in range(6)}
    assert all(sample.answers == (name[1:],) and sample.question == "How pale?" for name, sample in samples.items())
    assert dataset.manifest["recipe"]["sources"].keys() == {"my_project.sources.notes"}


def test_the_tool_and_the_protocol_play_a_conversation(played):
    dataset, demonstrations = played
    images, ranges = demonstrations.images(dataset), {}
    for row in demonstrations.trajectories():
        call = row.turns[0]
        if row.sample_id != "n0":
            assert (call.tool, call.args, row.answer) == ("stretch", '{"cut":2}', "1")
            ranges[row.sample_id] = images.decoded(call.image).convert("L").getextrema()
        else:  # of one brightness
            assert call.error == "stretch: the image has one brightness only."
    assert ranges and all(low < 5 and high > 250 for low, high in ranges.values())
    assert demonstrations.manifest["recipe"]["sources"].keys() == {
        "my_project.tools.stretch",
        "my_project.protocols.brackets",
    }


def test_the_protocol_parses_what_it_renders_and_refuses_the_rest():
    protocol = load_protocol(load_config("tiny", settings("protocols.brackets")).conversation.protocol)
    assert protocol.parse(protocol.render_turn("So.", ToolCall("x", {"y": 1}))) == ToolCall("x", {"y": 1})
    assert protocol.parse("So.\n\n<answer>red</answer>") == Answer("red")
    assert isinstance(protocol.parse("[[no]] blank line"), Malformed)


def test_rule_function_and_judge_score(project):
    """Rollouts that a version before this one has stored."""
    store = Store(shutil.copytree(SUPPORT / "golden" / "store_v1", project / "older"))
    rollouts = store.resolve("rollouts/decece")
    rewards = [*settings("rules.brevity"), *settings("rewards:hedging"), *settings("judges.sharpness")]
    mix = "mix={answer: 0.5, brevity: 0.2, hedging: 0.1, image: 0.2}"
    scores, _ = build_stage(score, load_config("tiny", [*SMALL, *rewards, mix]), store, rollouts=rollouts)
    values, rows = scores.values(), list(rollouts.trajectories())
    assert values["brevity"].tolist() == pytest.approx([1 - len(row.turns) / 6 for row in rows])
    answered = [row.answer is not None for row in rows]
    assert np.isfinite(values["hedging"]).tolist() == answered and any(answered)
    processed = [any(turn.image for turn in row.turns) for row in rows]
    assert [0 < value < 0.5 for value in values["sharpness"]] == processed and any(processed)
    assert scores.manifest["recipe"]["sources"].keys() == {
        "my_project.rules.brevity",
        "my_project.rewards:hedging",
        "my_project.judges.sharpness",
    }


def test_the_loss_computes():
    cfg = load_config("tiny", settings("losses.reinforce")).train.loss
    cfg = cfg.model_copy(update={"vllm_importance_sampling_correction": False})
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    options = {"entropies": None, "normaliser": compute_normaliser(cfg, [mask], max_completion_length=2)}
    out = compute_grpo_loss(
        cfg, Logps(logps, logps.detach()), advantages=torch.tensor([1.0, -1.0]), mask=mask, **options
    )
    assert out.loss.item() == pytest.approx(2 * (1 + 2 - 3) / 3)
    out.loss.backward()
    assert torch.allclose(logps.grad, torch.tensor([[-2.0, -2.0], [2.0, 0.0]]) / 3)


def test_the_family_computes_what_its_models_do(tmp_path):
    config = load_config("tiny", [*SMALL, *settings("family=qwen2_vl")])
    assert config.family() is find_family("qwen2_vl") and config.talk().coordinates == "thousandths"
    create_tiny(tmp_path, config.model.tiny, ["Why?"], seed=0)
    model = load_model(tmp_path, ModelConfig(dtype="float32", adaptation="full"), "cpu")
    token, grids = ImageToken.of(model.config), np.array([[1, 4, 6], [1, 2, 2]])
    tokens = np.array([5, *[token.id] * 6, 7, token.id, 8, 9])
    values = np.random.default_rng(0).standard_normal((24, config.family().processor.patch_values), dtype=np.float32)
    pixels = {"a": values, "b": values[:4]}.__getitem__
    row = Conversation(tokens, tokens > 7, ("a", "b"), grids)
    row.scored[tokens == token.id] = False
    with torch.no_grad():
        logps, _ = Scorer(model, pixels, temperature=1.0, banned=(), features={})([row])
        torch.testing.assert_close(logps, stock_logps(model, row, pixels), atol=1e-5, rtol=1e-5)


def test_an_installed_entry_goes_by_its_short_name():
    config = load_config("tiny", settings("loss_type=reinforce"))
    assert config.sources().keys() == {"stretch", "reinforce"}
    assert list(load_tools(config.conversation.tools)) == ["crop_image", "stretch"]
