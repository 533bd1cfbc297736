"""A family of nobody, installed beside thinkimg: all that the shipped ones are proven by but for the engine's part."""

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from family_loop import FamilyLoop
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT
from PIL import Image
from stock_forward import stock_logps

from thinkimg import registry
from thinkimg.analysis.export import export_policy
from thinkimg.analysis.forecast import forecast_needs
from thinkimg.config.load import load_config
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.protocol import IMAGE_PART, load_protocol, text_part
from thinkimg.conversation.question import state_question
from thinkimg.conversation.tokens import ROLES
from thinkimg.errors import UserError
from thinkimg.images.view import resize_to_view
from thinkimg.models.base import Base, BaseSource
from thinkimg.models.family import FAMILIES, family_at, family_of, find_family, list_model_types
from thinkimg.models.family_check import check_files
from thinkimg.models.settings import ModelConfig
from thinkimg.models.tiny import create_tiny
from thinkimg.records import Coordinates, Role, StopReason
from thinkimg.resources import Resources
from thinkimg.stages import rollout
from thinkimg.stages.demonstrate import collect_texts, demonstrate
from thinkimg.trainer import checkpoint
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packing import Conversation, ImageToken, compute_mrope_positions
from thinkimg.trainer.forward.shared_prompts import plan
from thinkimg.trainer.policy import train_only

PACKAGE = SUPPORT / "made_up"
TINY = "{family: made_up, vocab_size: 1024, hidden_size: 64, layers: 3, vision_layers: 3, vision_hidden_size: 32}"
SIDE = 30  # of a token, in pixels
SETTINGS = [
    "data.train=8", "data.held_out=2", "warmstart.steps=12", "warmstart.batch=8", "warmstart.pairs=0",
    "rollout.samples=4", "rollout.group_size=3", "train.steps=2", "train.min_std=0.0", "image.only_if_right=false",
    "mix={format: 0.3, tool: 0.3, answer: 0.3, image: 0.1}", "image.types=[attention]",
    "image.attention={layer: null, rows: last}", "where.workers=2", "where.tracking.enabled=false",
]  # fmt: skip
LORA = ["model.adaptation=lora", "model.lora_rank=4", "model.lora_alpha=8"]
MODELS = {
    "full": ModelConfig(dtype="float32", adaptation="full", train_vision=True),
    "lora": ModelConfig(dtype="float32", adaptation="lora", lora_rank=4, lora_alpha=8),
}


@pytest.fixture(scope="module", autouse=True)
def package():
    """The package as installed, for this process and for the trainer's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        vars(FAMILIES).pop("_installed", None)  # looked up once
        yield importlib.import_module("made_up_vl")
    vars(FAMILIES).pop("_installed", None)
    registry.source_digest.cache_clear()


@pytest.fixture(scope="module")
def loops(tmp_path_factory, package) -> Iterator[dict[str, FamilyLoop]]:
    """A loop with full weights, and one with an adapter, of one base whose tokens and template are its own."""
    root = tmp_path_factory.mktemp("loops")
    tiny = load_config("tiny", [*SETTINGS, f"model.tiny={TINY}", f"where.store={root / 'artifacts'}"])
    with pytest.MonkeyPatch.context() as patch, Resources(tiny.where, say=lambda line: None) as resources:
        patch.setattr(rollout, "open_sampler", importlib.import_module("stock_engine").open_sampler)
        first = FamilyLoop(root, "made_up", resources, [*SETTINGS, f"model.tiny={TINY}"])
        dataset = first.run("prepare")
        texts = collect_texts(demonstrate.settings(tiny), dataset)
        create_tiny(root / "base", tiny.model.tiny, texts, seed=0)
        package.give_own_vocabulary(root / "base")
        base = ["model.tiny=null", "model.dtype=float32", f"model.path={root / 'base'}"]
        loops = {}
        for name, own in (("full", []), ("lora", LORA)):
            loops[name] = loop = FamilyLoop(root, "made_up", resources, [*SETTINGS, *base, *own])
            for stage in ("prepare", "demonstrate", "warmstart", "rollout", "score", "train"):
                loop.run(stage)
                if stage == "warmstart":
                    loop.first = loop.artifacts["policy"]
        yield loops


@pytest.fixture(scope="module")
def base(tmp_path_factory, package) -> Path:
    """A tiny model of the family, with its own tokens and chat template."""
    directory = tmp_path_factory.mktemp("base") / "model"
    tiny = load_config("tiny", [f"model.tiny={TINY}"]).model.tiny
    create_tiny(directory, tiny.model_copy(update={"vocab_size": 300}), ["crop the image", "answer"], seed=0)
    package.give_own_vocabulary(directory)
    return directory


# Family and files


def test_it_is_one_of_the_families(package, base):
    family = package.FAMILY
    assert find_family("made_up_vl") is family_at("nobody/Made-Up-7B-Instruct") is family_at(base) is family
    config = load_config("tiny", [f"model.tiny={TINY}"])
    assert config.family() is family_of(config.model) is family
    view, talk = config.view(), config.talk()
    assert (view.patch, view.merge, view.token_side) == (10, 3, SIDE) and view.count_tokens((4 * SIDE, 3 * SIDE)) == 12
    assert (talk.protocol, talk.coordinates) == (family.protocols[0], Coordinates.PIXELS)
    with pytest.raises(UserError) as caught:
        find_family("made_up_v2")
    assert "made_up_v2" in caught.value.message and "made_up_vl" in caught.value.hint
    assert "qwen3_vl" in list_model_types()


def test_its_memory_is_forecast():
    assert "fits in" in forecast_needs(load_config("tiny", [f"model.tiny={TINY}", "train.token_budget=600"]))


def test_other_values_in_its_files_are_refused(base):
    check_files(base, MODELS["full"])
    for file, section, name, value in (
        ("preprocessor_config.json", None, "image_mean", [0.9, 0.3, 0.2]),
        ("preprocessor_config.json", None, "merge_size", 2),
        ("config.json", "vision_config", "patch_size", 14),
    ):
        before = (base / file).read_text()
        content = json.loads(before)
        (content[section] if section else content)[name] = value
        (base / file).write_text(json.dumps(content))
        try:
            with pytest.raises(UserError, match=rf"states {name} = .*, and models of the family made_up_vl have"):
                check_files(base, MODELS["full"])
        finally:
            (base / file).write_text(before)


@pytest.fixture(scope="module")
def processor(base):
    """transformers' image processor, as the model's own file describes it."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(base, use_fast=False)


@pytest.mark.parametrize("size", [(20, 20), (30, 60), (47, 211), (120, 120), (255, 190), (480, 61)])
def test_pixels_are_those_of_the_models_own_processor(package, processor, size):
    limits = load_config("tiny", [f"model.tiny={TINY}"]).view()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    seen = resize_to_view(picture, limits)
    pixels = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    expected = processor([picture], size=pixels, return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [list(limits.count_patches(seen.size))]
    assert package.FAMILY.processor.extract_patches(seen).tobytes() == expected["pixel_values"].tobytes()
    assert limits.count_tokens(seen.size) * SIDE**2 == seen.width * seen.height <= limits.max_pixels


# Forward passes

SIDES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4)


@pytest.fixture(scope="module")
def policies(base):
    """An untrained policy with full weights, and one under an adapter that changes something."""
    policies = {name: checkpoint.start_from_base(Base("b", directory=str(base)), model, "cpu", seed=0)
                for name, model in MODELS.items()}  # fmt: skip
    with torch.no_grad():
        for name, parameter in policies["lora"].model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    for policy in policies.values():
        train_only(policy.model, policy.config, vision=policy.config.train_vision)
    return policies


def converse(token: ImageToken, sides, seed: int, prompt: int = 1) -> Conversation:
    """Random text around images of (rows, columns) tokens; `prompt` images stand before what is sampled."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(0)
    tokens, scored = [20, 21], [False, False]
    for number, (rows, columns) in enumerate(sides):
        words = (shared if number < prompt else rng).integers(20, 250, 5).tolist()
        tokens += [*words, *[token.id] * (rows * columns), 19]
        scored += [number >= prompt] * 5 + [False] * (rows * columns + 1)
    tokens += rng.integers(20, 250, 6).tolist()
    grids = np.array([(1, rows * token.merge, columns * token.merge) for rows, columns in sides], dtype=np.int64)
    keys = tuple(f"{rows}x{columns}/{seed if number >= prompt else 0}" for number, (rows, columns) in enumerate(sides))
    return Conversation(np.array(tokens), np.array(scored + [True] * 6), keys, grids.reshape(-1, 3))


def pixels(key: str) -> np.ndarray:
    shape, seed = key.split("/")
    rows, columns = map(int, shape.split("x"))
    values = np.random.default_rng([rows, columns, int(seed)]).standard_normal((9 * rows * columns, 600))
    return values.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(sides=SIDES, seed=st.integers(0, 99))
def test_positions_are_those_of_get_rope_index(policies, sides, seed):
    model = get_base_model(policies["full"].model)
    token = ImageToken.of(model.config)
    row = converse(token, sides, seed)
    expected, _ = model.get_rope_index(
        torch.from_numpy(row.tokens)[None],
        mm_token_type_ids=torch.from_numpy((row.tokens == token.id).astype(np.int64))[None],
        image_grid_thw=torch.from_numpy(row.grids) if sides else None,
    )
    assert np.array_equal(compute_mrope_positions(row.tokens, token, row.grids), expected[:, 0].numpy())


def gradients(policy, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of all trained parameters, one after the other."""
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([value.flatten() for value in values if value is not None])


@pytest.mark.parametrize("name", MODELS)
def test_batches_packed_rows_and_single_ones_are_the_models_own_forward(policies, name):
    policy = policies[name]
    token = ImageToken.of(unwrap(policy.model).config)
    groups = {"a": [[(2, 3)], [(2, 3), (1, 2)], [(2, 3), (3, 1), (2, 2)]], "b": [[(4, 4)], [(4, 4), (4, 4)]], "c": [[]]}
    rows = [converse(token, sides, seed) for group in groups.values() for seed, sides in enumerate(group)]
    names = [key for key, group in groups.items() for _ in group]
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features=None if name == "full" else {})
    alone = [stock_logps(policy.model, row, pixels) for row in rows]
    expected = torch.cat(alone)
    weights = torch.linspace(-1, 1, len(expected)) + 0.1
    reference = gradients(policy, (weights * expected).sum())
    (units,) = plan(rows, names, 10**6, token)
    order = [i for unit in units for i in unit.rows]
    assert order == list(range(len(rows))) and max(unit.prefix for unit in units) > 16, "the prompts are shared"
    for logps in (scorer(rows)[0], scorer(rows, units)[0], torch.cat([scorer([row])[0] for row in rows])):
        torch.testing.assert_close(logps, expected, atol=2e-5, rtol=1e-5)
        assert float((gradients(policy, (weights * logps).sum()) - reference).norm() / reference.norm()) < 1e-4


def test_what_makes_it_different_changes_the_log_probabilities(policies):
    """So that a forward pass that left a part of it out would be seen."""
    policy = policies["full"]
    row = converse(ImageToken.of(policy.model.config), [(2, 3), (3, 2)], 1)

    def score() -> torch.Tensor:
        with torch.no_grad():
            return Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})([row])[0]

    before, inner = score(), get_base_model(policy.model)
    for level in inner.visual.deepstack_merger_list:
        value = level.linear_fc2.weight.data.clone()
        level.linear_fc2.weight.data.zero_()
        assert float((score() - before).abs().max()) > 0.01
        level.linear_fc2.weight.data.copy_(value)
    with chunked_sections(inner.language_model.rotary_emb):
        assert float((score() - before).abs().max()) > 0.01
    assert torch.equal(score(), before)


@contextmanager
def chunked_sections(turn) -> Iterator[None]:
    """Positions of Qwen2.5-VL in place of interleaved ones: time, height and width one after the other."""

    def chunk(frequencies):
        parts = frequencies.split(list(turn.mrope_section), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)] * 2, dim=-1)

    own = turn.recomposition_frequencies
    turn.recomposition_frequencies = chunk
    yield
    turn.recomposition_frequencies = own


# The loop


@pytest.mark.parametrize("name", MODELS)
def test_conversations_are_seen_and_written_as_the_family_does(loops, package, name):
    loop = loops[name]
    view, rows = loop.config().view(), list(loop.artifacts["rollouts"].trajectories())
    assert {row.stop for row in rows} == {StopReason.ANSWER} and {row.coordinates for row in rows} == {"pixels"}
    assert {size for row in rows for size in row.sizes} == {(4 * SIDE, 4 * SIDE)}
    boxes = [json.loads(turn.args) for row in rows for turn in row.turns if turn.tool == "crop_image"]
    assert boxes and all(value % SIDE == 0 and value < 4 * SIDE for box in boxes for value in box.values())
    codec = Codec.load(loop.artifacts["policy"].vocabulary)
    assert (codec.image, codec.end) == (package.TOKENS.index("<|image_pad|>"), package.TOKENS.index("<|im_end|>"))
    assert any(len(row.images) > 1 for row in rows)
    for row in rows:
        assert row.grids == tuple(map(view.count_patches, row.sizes)) and row.tokens.count(codec.image) == len(
            row.images
        )
        assert codec.decode(row.tokens).count(f"assistant\n{package.OPENING}") == len(row.turns)
        assert all(turn.text.startswith(package.OPENING) for turn in row.turns)
    artifacts = [loop.first, *loop.artifacts.values()]
    assert {artifact.family for artifact in artifacts} == {"made_up_vl"}
    codes = [artifact.manifest["recipe"]["sources"] for artifact in artifacts]
    assert all(code == codes[0] and code.keys() == {"made_up"} for code in codes), "its code is in the fingerprints"


@pytest.mark.parametrize("name", MODELS)
def test_rules_and_attention_score_and_the_trainer_agrees_with_transformers(loops, name):
    """The rollouts' log-probabilities are transformers' own (stock_engine.py)."""
    scores, policy = loops[name].artifacts["scores"], loops[name].artifacts["policy"]
    values = scores.values()
    assert scores.metrics["missing/attention"] == 0 and np.isfinite(values["attention"]).any()
    assert len(set(values["answer"].tolist())) > 1 and len(set(values["tool"].tolist())) > 1
    assert policy.metrics["parity/tokens"] > 50 and policy.metrics["parity/mean_abs"] < 1e-5
    assert policy.metrics["grad_norm"] > 0 and policy.metrics["packing/fallback"] == 0
    assert policy.digest != loops[name].first.digest and policy.json("policy/state.json")["updates"] == 2


def test_a_stored_policy_trains_on_bit_by_bit(loops):
    """From the artifacts alone, by a worker that has loaded another policy since."""
    loop = loops["full"]
    kept = dict(loop.artifacts)
    for stage in ("rollout", "score"):
        loop.run(stage, **({"iteration": 2} if stage == "rollout" else {}))
    after = loop.run("train")
    loop.artifacts["policy"] = kept["policy"]
    again = loop.run("train", force=True)
    loop.artifacts = kept
    assert again.digest == after.digest != kept["policy"].digest and again.attempt != after.attempt


@pytest.mark.parametrize("name", MODELS)
def test_the_export_renders_what_was_trained(loops, package, name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    loop = loops[name]
    export = export_policy(loop.store, loop.artifacts["policy"], tmp_path / "export")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export / "policy" / ("model" if name == "full" else "adapter"))
    talk = loop.config().talk()
    protocol, system = load_protocol(talk.protocol), render_system_prompt(talk)
    samples = {sample.sample_id: sample for sample in loop.artifacts["dataset"].split("train")}
    for row in loop.artifacts["rollouts"].trajectories():
        sample = samples[row.sample_id]
        question = text_part(state_question(sample, row.sizes[: len(sample.images)], row.coordinates))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": [IMAGE_PART, question]}]
        for turn in row.turns:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert prompt == list(row.tokens[: len(prompt)]) and ROLES[row.roles[len(prompt)]] is Role.SAMPLED
            messages.append({"role": "assistant", "content": turn.text})
            if turn.observation is not None:
                content = protocol.observation(turn.observation, image=turn.image is not None)
                messages.append({"role": "user", "content": content})
        assert tokenizer.apply_chat_template(messages, return_dict=False) == list(row.tokens)


def test_a_merged_adapter_is_the_policy(loops, tmp_path):
    policy = loops["lora"].artifacts["policy"]
    base = Base(**BaseSource.of(loops["lora"].config().model).entry(policy))
    checkpoint.export_merged(policy.directory / "policy", tmp_path / "merged", base=base)
    trained = checkpoint.load(policy.directory / "policy", MODELS["lora"], "cpu", base)
    merged = checkpoint.start_from_base(Base("m", directory=str(tmp_path / "merged")), MODELS["full"], "cpu", seed=0)
    start = checkpoint.start_from_base(base, MODELS["full"], "cpu", seed=0)
    row = converse(ImageToken.of(merged.model.config), [(2, 3), (1, 2)], 1)
    with torch.no_grad():
        logps = [Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})([row])[0]
                 for policy in (trained, merged, start)]  # fmt: skip
    torch.testing.assert_close(logps[1], logps[0], atol=1e-4, rtol=1e-4)
    assert float((logps[2] - logps[0]).abs().max()) > 1e-3
