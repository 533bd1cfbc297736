"""What a stage is handed is in its fingerprint, and what it is not handed reaches neither engine nor trainer.

First by the fingerprints alone, for every setting; then by a run of each stage against spies.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import inspect
import json
import sys
import threading
import typing
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from fingerprints import NO_DATA, Stand, unopened_sources
from fingerprints import settings as every_setting
from other_values import values
from pydantic import BaseModel
from recorded_stages import SETTINGS, CopyingTrainer, Recorded, RecordedResources

from thinkimg import records
from thinkimg.config.load import CHOOSERS, load_config
from thinkimg.config.tree import Config
from thinkimg.engine.errors import EngineError
from thinkimg.errors import UserError
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages import rollout, train_clip
from thinkimg.stages.build import build_artifact, complete_inputs
from thinkimg.stages.names import stage_names
from thinkimg.stages.prepare import puzzles
from thinkimg.stages.stage import Job, Slice, Stage, load_stage
from thinkimg.store import manifest
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe, directory_digest

STAGES: dict[str, Stage] = {name: load_stage(name) for name in stage_names()} | {"puzzles": puzzles}
JUDGED = [  # of two presets
    "image.types=[self, teacher, attention, embedding]",
    "image.weights={self: 1, teacher: 1, attention: 1, embedding: 1}",
    "mix={tool: 0.3, answer: 0.3, image: 0.4}",
]  # fmt: skip
BASES = {
    # A whole policy, made from nothing; an adapter of a Hub model; and one without demonstrations, of a user's data.
    "whole": ("tiny", [*(one for one in SETTINGS if "image.types" not in one), "warmstart.pairs=4", *JUDGED]),
    "adapter": ("balanced", ["images.min_pixels=784", "images.max_pixels=12544", "data.source=puzzles", *JUDGED]),
    "users": ("balanced", [*NO_DATA, *JUDGED, "image.embedding={model: warmstart, pretrained: null}"]),
}

# A slice may hold these without their being in its stage's fingerprint.
BASE = "the base model's digest, or its id and revision, is an input, and so is the digest of a policy made from it"
CODE = "decides whether the model's own code may run, not what it does"
WEIGHTS = "says how the weights were trained, whose digest is an input"
SCRIPTS = "decides what is demonstrated, and the demonstrations' digest is an input"
FAMILYS = "null is one of the other two, which counts"
UNTRAINED = "without demonstrations no step is taken"
EXCEPTIONS = {
    "prepare": {
        "data.path": "a user's files are known by their content",
        "data.images": "as data.path",
        "rewards.answer.judge": "only for a warning",
    }
    | dict.fromkeys(("images.max_bytes", "images.max_decoded_pixels"), "of files: the puzzles are made"),
    "demonstrate": {"model.path": BASE, "model.revision": BASE},
    "warmstart": {"model.path": BASE, "model.revision": BASE, "model.trust_remote_code": CODE}
    | dict.fromkeys(("conversation.*", "warmstart.flaws.*", "warmstart.pairs", "warmstart.demonstrations"), SCRIPTS)
    | dict.fromkeys(("model.lora_rank", "model.lora_alpha"), "of an adapter, where it is in")
    | {"train.gradient_checkpointing": "changes memory and time alone", "model.dtype": FAMILYS},
    "rollout": {"model.path": BASE, "model.revision": BASE},
    "evaluate": {"model.path": BASE, "model.revision": BASE},
    "score": {"model.path": BASE, "model.revision": BASE, "model.trust_remote_code": CODE}
    | dict.fromkeys(("model.tiny.*", "model.lora_*", "model.adaptation", "model.train_vision"), WEIGHTS)
    | {"image.only_if_right": "applied with the mix", "image.weights": "applied with the mix", "model.dtype": FAMILYS},
    "train": {"model.path": BASE, "model.revision": BASE, "model.trust_remote_code": CODE}
    | dict.fromkeys(("model.lora_rank", "model.lora_alpha"), "of an adapter, where it is in")
    | {"train.parity.*": "decides whether there is an output, not which", "model.dtype": FAMILYS},
}
EXCEPTIONS["puzzles"] = {name: reason for name, reason in EXCEPTIONS["prepare"].items() if name.startswith("images")}
WITHOUT_DEMONSTRATIONS = dict.fromkeys(
    ("images.*", "warmstart.steps", "warmstart.batch", "warmstart.learning_rate", "warmstart.warmup_steps",
     "train.token_budget"), UNTRAINED,
)  # fmt: skip


def exceptions(base: str, stage: str) -> set[tuple[str, str]]:
    """Those of a stage, as (stage, pattern of settings' names)."""
    found = EXCEPTIONS.get(stage, {})
    if (base, stage) == ("users", "warmstart"):
        found = found | WITHOUT_DEMONSTRATIONS
    return {(stage, pattern) for pattern in found}


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting with another value, and the config with it; None where it is refused."""

    name: str
    overrides: tuple[str, ...]
    config: Config | None


@pytest.fixture(scope="module", autouse=True)
def versions_looked_up_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "version", cache(manifest.version))
        yield


@pytest.fixture(scope="module", autouse=True)
def own_code(tmp_path_factory):
    """A package of a user's own: a copy of one entry of each registry."""
    import thinkimg

    shipped, root = Path(thinkimg.__file__).parent, tmp_path_factory.mktemp("user")
    (folder := root / "own_code").mkdir()
    for name, path, old in (
        ("flip", "images/tools/flip_image.py", ""),
        ("protocol", "conversation/protocols/think.py", ""),
        ("loss", "grpo/losses/grpo.py", "grpo"),
        ("source", "data/sources/jsonl.py", "jsonl"),
        ("family", "families/qwen2_5_vl.py", ""),
    ):
        text = (shipped / path).read_text()
        (folder / f"{name}.py").write_text(text.replace(f'"{old}"', f'"own_code.{name}"') if old else text)
    (folder / "rule.py").write_text("def score(batch): ...\ndef brevity(completions, **columns): ...\n")
    (folder / "judge.py").write_text("def judge(pairs, context): ...\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield folder
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_code"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def changes(tmp_path_factory, own_code):
    """changes(base): every setting with other values."""

    @cache
    def found(base: str) -> list[Change]:
        preset, overrides = BASES[base]
        special = values(base, tmp_path_factory.mktemp("values"))
        listed = [
            (name, [f"{name}={value if isinstance(value, str) else json.dumps(value)}"])
            for name, value in every_setting(load_config(preset, overrides))
        ]
        listed = [one for one in listed if one[0] not in (*special, "preset")]
        listed += [(name, option) for name, options in special.items() for option in options]
        if base != "whole":  # no stage knows whose policy it is when it asks where things run
            listed = [one for one in listed if not one[0].startswith("where.")]
        made = []
        for name, option in listed:
            try:
                made.append(Change(name, tuple(option), load_config(preset, [*overrides, *option])))
            except UserError:
                made.append(Change(name, tuple(option), None))
        return made

    return found


def fingerprint(stage: Stage, config: Config, **parameters) -> tuple[Slice, str]:
    """Return the slice, and the fingerprint with made-up inputs. Raises UserError where the settings do not fit."""
    with unopened_sources():
        settings = stage.settings(config, **parameters)
        inputs = {role: Stand(entry.kind.KIND, "a") for role, entry in stage.counting(config).items()}
        return settings, stage.recipe(settings, inputs).fingerprint


@pytest.fixture(scope="module")
def fingerprints(changes):
    """fingerprints(base, stage): each change that the stage takes with slice and fingerprint, None for the two where
    the pipeline does without it."""

    @cache
    def of(base: str, stage: str) -> list[tuple[Change, tuple[Slice, str] | None]]:
        taken = []
        for change in changes(base):
            if change.config is not None:
                with contextlib.suppress(UserError):
                    wanted = STAGES[stage].wanted(change.config)
                    taken.append((change, fingerprint(STAGES[stage], change.config) if wanted else None))
        return taken

    return of


# ----------------------------------------------------------------------------------------------------------------------


def test_where_a_slice_differs_the_fingerprint_does_and_only_there(fingerprints):
    used = set()
    for base in BASES:
        config = load_config(*BASES[base])
        for name, stage in STAGES.items():
            if not stage.wanted(config):
                continue
            before = fingerprint(stage, config)
            for change, after in fingerprints(base, name):
                if after is None:
                    continue
                same_slice, same_fingerprint = (one == other for one, other in zip(before, after, strict=True))
                if same_slice and not same_fingerprint:
                    raise AssertionError(f"{base} {name}: {change.overrides} is in the fingerprint beside the slice")
                if same_fingerprint and not same_slice:
                    reasons = {entry for entry in exceptions(base, name) if fnmatch.fnmatch(change.name, entry[1])}
                    assert reasons, f"{base} {name}: {change.overrides} is in the slice, and not in the fingerprint"
                    used |= reasons
    listed = {entry for base in BASES for name in STAGES for entry in exceptions(base, name)}
    assert listed - used == set(), "exceptions that none needs"


def test_a_stage_takes_some_other_value_of_every_setting(changes, fingerprints):
    configs = [load_config(*base) for base in BASES.values()]
    assert all(any(map(stage.wanted, configs)) for stage in STAGES.values())
    for base in BASES:
        loaded = {change.name for change in changes(base) if change.config is not None}
        for name in STAGES:
            assert {change.name for change, _ in fingerprints(base, name)} == loaded, name


def test_every_setting_was_given_another_value(changes):
    names = {change.name for base in BASES for change in changes(base)}
    tried = {change.name for base in BASES for change in changes(base) if change.config is not None}
    assert len(names) > 120 and names - tried == set()


def test_the_parameters_of_a_run_are_in_the_fingerprint():
    config = load_config(*BASES["whole"])
    others = {"iteration": 2, "samples": 1, "blind": True, "split": "held_out", "count": 2}
    for name, stage in STAGES.items():
        for parameter in stage.parameters:
            changed = fingerprint(stage, config, **{parameter: others[parameter]})
            assert changed[1] != fingerprint(stage, config)[1], f"{name} {parameter}"


CONVERSING = {"demonstrate", "warmstart", "rollout", "evaluate"}


@pytest.mark.parametrize(
    ("overrides", "path", "stages"),
    [
        (["conversation.tools=[own_code.flip]"], "own_code.flip", CONVERSING | {"score"}),
        (["conversation.protocol=own_code.protocol"], "own_code.protocol", CONVERSING),
        (["train.loss.loss_type=own_code.loss"], "own_code.loss", {"train"}),
        (["model.tiny.family=own_code.family"], "own_code.family", {"demonstrate", "warmstart", "score", "train"}),
        (["rewards.rules=[own_code.rule]"], "own_code.rule", {"score"}),
        (["rewards.functions=[own_code.rule:brevity]"], "own_code.rule:brevity", {"score"}),
        (["image.types=[own_code.judge]", "image.weights={judge: 1}"], "own_code.judge", {"score"}),
        (["data.source=own_code.source", "data.path=x"], "own_code.source", {"prepare"}),
    ],
)
def test_a_users_own_code_is_in_the_fingerprint_of_each_stage_that_may_run_it(overrides, path, stages, own_code):
    config = load_config(BASES["whole"][0], [*BASES["whole"][1], *overrides])
    expected = digest((own_code / f"{path.split('.')[1].split(':')[0]}.py").read_bytes())
    with unopened_sources():
        for name, stage in STAGES.items():
            rollouts = Stand("rollouts", "0")
            rollouts.tools = config.conversation.tools
            sources = stage.recipe(stage.settings(config), {"rollouts": rollouts}).sources
            assert sources == ({path: expected} if name in stages else {}), name


def test_a_stage_sees_its_slice_its_inputs_and_where_things_run_and_nothing_else():
    fields = {"settings", "inputs", "work", "store", "resources", "progress", "map", "early"}
    assert {field.name for field in dataclasses.fields(Job)} == fields
    assert typing.get_type_hints(Resources.__init__)["where"] is ResourcesConfig
    config = load_config(*BASES["whole"])
    for name, stage in STAGES.items():
        assert list(inspect.signature(stage.run).parameters) == ["job"], name
        settings = stage.settings(config)
        assert isinstance(settings, Slice) and settings.model_config["frozen"]
        assert not [one for one in parts(settings) if isinstance(one, Config | ResourcesConfig)], name


def parts(settings: BaseModel):
    """The settings and all that they hold."""
    yield settings
    for _, value in settings:
        if isinstance(value, BaseModel):
            yield from parts(value)


# runs -----------------------------------------------------------------------------------------------------------------


class Seen(Exception):
    """A spy has seen enough."""


class SpyEngine:
    """An engine client that plays nothing, and rates every image alike."""

    media, concurrency = "data", 1

    def __init__(self, see):
        self.see = see

    async def releases(self):
        return {}

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def generate(self, prompt, images, sampling):
        shown = [(one.uuid, digest(one.data)) for one in images]
        self.see("generate", prompt, shown, dataclasses.asdict(sampling))
        raise Seen

    async def next_token_logprobs(self, prompt, images, tokens):
        self.see("rate", prompt, [(one.uuid, digest(one.data)) for one in images], tokens)
        return [-1.0, -2.0]


class Spies(Resources):
    """Resources that note what they are asked for, and have a trainer that copies and no engine."""

    def __init__(self, where: ResourcesConfig):
        super().__init__(where)
        self.seen: list[str] = []
        self._noting = threading.Lock()

    def see(self, *what) -> None:
        with self._noting:
            self.seen.append(json.dumps(what, sort_keys=True, default=str))

    @property
    def trainer(self) -> SimpleNamespace:
        return SimpleNamespace(submit=self.submit)

    def submit(self, order: dict, progress) -> dict:
        self.see("trainer", self.normal({name: value for name, value in order.items() if name != "output"}))
        if order["kind"] != "attention":
            return CopyingTrainer().submit(order)
        rows = {
            f"{layer}/{rows}": {"question": 0.2, "generic": 0.1}
            for layer in order["layers"]
            for rows in ("text", "last")
        }
        return {"pairs": [rows for _ in order["pairs"]]}

    def normal(self, value):
        """The order with the content of what lies in our scratch folder in place of its path."""
        if isinstance(value, dict):
            return {name: self.normal(inner) for name, inner in value.items()}
        if not isinstance(value, str) or not value.startswith(str(self.scratch)):
            return value
        return directory_digest(Path(value)) if Path(value).is_dir() else digest(Path(value).read_bytes())

    async def engine(self, policy, settings, base):
        self.see("engine", policy.digest, settings.model_dump(), base.entry())
        return SpyEngine(self.see)

    def teacher(self, first, settings, base):
        self.see("teacher", first.digest, settings.model_dump(), base.entry())
        raise EngineError("It is a spy.")

    def encoder(self, settings, own):
        self.see("encoder", settings.model_dump(), own and own.digest)
        return super().encoder(settings, own)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Runs:
    """Tiny inputs of every stage, and runs of it against spies."""

    def __init__(self, root: Path):
        self.config, self.store, self.count = load_config(*BASES["whole"]), Store(root / "inputs"), 0
        with RecordedResources(self.config.where) as resources:
            builder = Builder(self.config, self.store, resources)
            data = builder.make(STAGES["prepare"])
            pairs = builder.make(STAGES["known_pairs"], dataset=data)
            scripts = builder.make(STAGES["demonstrate"], dataset=data, pairs=pairs)
            policy = builder.make(STAGES["warmstart"], dataset=data, demonstrations=scripts, pairs=pairs)
            rollouts = builder.make(STAGES["rollout"], policy=policy)
            clip = builder.make(STAGES["train_clip"], pairs=pairs)
        self.made = {
            "dataset": data, "pairs": pairs, "demonstrations": scripts, "policy": policy, "rollouts": rollouts,
            "clip": clip,
            "player": policy, "first": policy, "scores": self.scores(rollouts, data),
        }  # fmt: skip

    def scores(self, rollouts, data):
        """Scores of each component, drawn."""
        rng, names = np.random.default_rng(0), STAGES["score"].settings(self.config).components
        score = {"status": "ok", "reason": None, "evidence": None}
        rows = [
            row | {name: score | {"value": rng.uniform(0.1, 1)} for name in names}
            for row in rollouts.rows(["trajectory_id", "sample_id", "group_id"])
        ]
        table = pa.Table.from_pylist(rows, records.score_schema(list(names)))
        recipe = Recipe("score", 1, 1, {}, {"rollouts": rollouts.reference, "dataset": data.reference})
        return self.store.build("scores", recipe, lambda work: work.table("scores.parquet", table))[0]

    def see(self, stage: Stage, config: Config) -> tuple[list[str], str | None]:
        """Run it; returns what the spies saw, and the artifact's digest, None where a spy ended the run."""
        settings, inputs = stage.settings(config), complete_inputs(stage, config, self.made, self.store)
        self.count += 1
        store = Store(self.store.root.parent / f"{self.count}")  # else judgements of the run before would be taken
        with Spies(config.where) as resources, no_config(), contextlib.suppress(Seen):
            artifact, _ = build_artifact(stage, settings, inputs, store, resources)
            return sorted(resources.seen), artifact.digest
        return sorted(resources.seen), None


@contextlib.contextmanager
def no_config():
    """No config can be made meanwhile."""

    class Refusing:
        def __getattr__(self, name):
            raise AssertionError("a stage makes itself a config")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "__pydantic_validator__", Refusing())
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "open_sampler", Recorded)
        patch.setattr(train_clip, "STEPS", 2)
        made = Runs(tmp_path_factory.mktemp("runs"))
    return made


KEPT = {  # these are not changed
    "score": {"where.teacher.url": "a teacher answers there, the first policy by its name as well"},
}
ALONE = {  # these are refused beside others
    "where.engine.devices": "of servers of our own, and engine.urls are others'",
    "loop.lag": "needs the correction of the loss",
}
REACHED = {
    "warmstart": {"trainer"}, "train": {"trainer"}, "rollout": {"engine", "generate"},
    "evaluate": {"engine", "generate"},
    "score": {"engine", "rate", "teacher", "trainer", "encoder"},
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_what_is_outside_of_its_slice_reaches_neither_engine_nor_trainer(name, runs, changes, monkeypatch):
    """All at once: what differs is none of the stage's business, or where and how fast it runs."""
    monkeypatch.setattr(train_clip, "STEPS", 2)
    stage, config = STAGES[name], runs.config
    outside: dict[str, tuple[str, ...]] = {}
    for change in changes("whole"):
        if change.config is not None and change.name not in {
            *KEPT.get(name, ()),
            *CHOOSERS,
            *ALONE,
            "model.adaptation",
        }:
            with contextlib.suppress(UserError):
                if stage.settings(change.config) == stage.settings(config):
                    outside.setdefault(change.name, change.overrides)
    other = load_config(
        BASES["whole"][0], [*BASES["whole"][1], *(one for overrides in outside.values() for one in overrides)]
    )
    assert stage.settings(other) == stage.settings(config)
    assert len([one for one in outside if one.startswith("where.")]) > 20 and other.where != config.where
    seen, made = runs.see(stage, config)
    assert {json.loads(one)[0] for one in seen} == REACHED.get(name, set())
    assert (seen, made) == runs.see(stage, other)
