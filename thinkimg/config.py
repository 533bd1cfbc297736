"""One frozen tree of settings: sparse YAML presets, dotted overrides, JSON Schema; a key that it does not know is refused.

Each stage takes the slices that determine its output (see thinkimg/stages). `where` says on what machines and how fast
things run: it is recorded in manifests and never part of a fingerprint.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from thinkimg.errors import UserError
from thinkimg.grpo.loss_config import LossConfig
from thinkimg.rewards.settings import ImageConfig
from thinkimg.settings import Positive, Settings, Share


class TinyModel(Settings):
    """Shape of a Qwen2.5-VL made from nothing, for machines without a GPU and without a hub."""

    vocab_size: Positive = 2048
    """Upper limit of the tokenizer's vocabulary, special tokens included."""
    hidden_size: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    rope_theta: float = 20.0
    """Base of the rotary frequencies; Qwen's 1e6 leaves a tiny model blind to columns."""
    vision_layers: Positive = 4
    vision_hidden_size: Positive = 64
    vision_heads: Positive = 2


class ModelConfig(Settings):
    path: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id or directory of the base model. Not read where `tiny` is set."""
    revision: str | None = None
    """Commit or tag on the Hub."""
    tiny: TinyModel | None = None
    """Make a tiny model instead of loading one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the base weights in engine and trainer; trained weights and optimizer are float32."""
    load_in_4bit: bool = False
    """Keep the frozen base weights of the trainer's language model in 4 bits (NF4; needs the package bitsandbytes). vLLM 0.32
    has no such weights, so that the engine's differ: raise train.parity.max_kl to what the gate then measures."""
    trust_remote_code: bool = False
    """Run code that comes with the model repository."""
    adaptation: Literal["lora", "full"] = "lora"
    lora_rank: Positive = 64
    lora_alpha: Positive = 128
    train_vision: bool = False
    """Train the vision tower, too (only with adaptation: full)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.adaptation == "lora" and self.tiny:
            raise ValueError(
                "model.tiny needs model.adaptation: full: an adapter needs a base model that is kept somewhere"
            )
        if self.adaptation == "lora" and self.train_vision:
            raise ValueError("model.train_vision needs model.adaptation: full")
        if self.adaptation == "full" and self.load_in_4bit:
            raise ValueError("model.load_in_4bit needs model.adaptation: lora")
        return self


class Columns(Settings):
    """Which column of the source holds what; null where there is none."""

    image: str = "image"
    """A path inside the data set, {bytes, path} as the Hub stores it, raw bytes, or a list of these."""
    question: str = "question"
    answer: str = "answer"
    choices: str | None = None
    id: str | None = None
    group: str | None = None
    """Rows that share this value (the photograph, say) stay on one side of the split; else the image's content decides."""
    answers: str | None = None
    """A list of further right answers: the best counts."""
    target: str | None = None
    """What has to be looked at, for the alarm on missed regions: [x, y, width, height] in pixels of the (only) picture."""


class Puzzles(Settings):
    families: tuple[Literal["detail", "dark", "turned", "both"], ...] = ("detail", "dark", "turned", "both")


class DataConfig(Settings):
    source: Literal["puzzles", "folder", "jsonl", "parquet", "hub"] = "puzzles"
    path: str | None = None
    """Folder, JSONL file, Parquet file or folder, or the id of a data set on the Hub."""
    hub_config: str | None = None
    """Configuration name of a Hub data set."""
    hub_split: str = "train"
    revision: str | None = None
    columns: Columns = Columns()
    answer_type: Literal["choice", "number", "text", "box", "maths"] = "text"
    """How answers are compared (the built-in puzzles are choices)."""
    train: Positive = 100
    """Samples in the training split, at most."""
    held_out: Positive = 300
    """Samples in the held-out split, at most."""
    held_out_share: Share = 0.3
    """Share of the photographs (or groups) that is held out."""
    max_refused: Share = 0.05
    """More bad rows than this share fail the stage."""
    url_hosts: tuple[str, ...] = ()
    """Hosts from which images named by URL may be fetched; none by default."""
    puzzles: Puzzles = Puzzles()
    seed: int = 0


class ImagesConfig(Settings):
    """The picture as the model sees it has between min_pixels and max_pixels; tools work on the full resolution."""

    min_pixels: Positive = 56 * 56
    max_pixels: Positive = 1280 * 28 * 28
    max_bytes: Positive = 32 * 2**20
    """Larger files are refused before they are decoded."""
    max_decoded_pixels: Positive = 50_000_000


class ConversationConfig(Settings):
    protocol: Literal["think", "qwen"] = "think"
    tools: tuple[str, ...] | None = None
    """Names of the tools on offer; null: all eleven, []: none."""
    system: str | None = None
    """System prompt; null: a description of the protocol and of every tool, made from their code."""
    max_turns: Positive = 5
    max_images: Positive = 8
    """Images in one conversation, the sample's own included."""
    max_turn_tokens: Positive = 512
    max_tokens: Positive = 8192
    """Tokens of a conversation, images expanded."""


class Flaws(Settings):
    """How the scripted demonstrations are wrong on purpose, so that something is left for reinforcement learning."""

    guess: Share = 0.25
    """Answers at once with a random choice, no tool."""
    wrong_call: Share = 0.4
    """Makes one systematically wrong call (the neighbouring cell, too little light, the wrong way round), then guesses."""


class WarmstartConfig(Settings):
    demonstrations: str | None = None
    """JSONL of conversations {sample_id, turns: [text, …]}; null: scripted ones for the built-in puzzles.
    Without either the base model is taken as it is."""
    steps: int = Field(100, ge=0)
    batch: Positive = 16
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(10, ge=0)
    flaws: Flaws = Flaws()
    pairs: int = Field(0, ge=0)
    """Puzzles from which a tiny policy also learns to compare images, as the image reward `self` asks it to."""
    checkpoint: str | None = None
    """Directory of a warm-started model to take instead of training one; with LoRA set model.path to it."""


class RolloutConfig(Settings):
    samples: Positive = 64
    """Samples per iteration, drawn without repetition within an epoch."""
    group_size: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)


class RewardsConfig(Settings):
    number_tolerance: float = Field(0.01, ge=0)
    """Relative tolerance of numeric answers."""
    functions: tuple[str, ...] = ()
    """A user's own rewards by import path, `package.module:function`, as fn(completions, **columns) -> list[float]."""


class ParityConfig(Settings):
    trajectories: Positive = 16
    """How many are compared before the first step of an iteration."""
    max_kl: float = Field(0.05, gt=0)
    """Mean of |log p(engine) - log p(trainer)| over sampled tokens, above which the stage refuses to train."""


class TrainConfig(Settings):
    loss: LossConfig = LossConfig()
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps from the first iteration on over which the rate rises to learning_rate; constant afterwards."""
    max_grad_norm: float = Field(1.0, gt=0)
    steps: Positive = 1
    """Optimizer steps per iteration and epoch: the groups are dealt into this many batches."""
    epochs: Positive = 1
    min_std: float = Field(0.02, ge=0)
    """Groups whose total reward varies less are silent."""
    token_budget: Positive = 16384
    """Tokens per micro-batch; a prompt that rows share counts once."""
    shared_prompts: bool = True
    """Pack micro-batches and compute the common prompt of a group once; off: padded batches. Where the model does not allow
    it (sliding windows, attention dropout, positions that depend on the length) it is off by itself, with a warning."""
    gradient_checkpointing: bool = False
    parity: ParityConfig = ParityConfig()


class EvaluateConfig(Settings):
    samples: Positive = 100
    """Held-out samples per iteration."""
    samples_ends: Positive = 300
    """Held-out samples before the first and after the last iteration."""
    k: int = Field(4, ge=0)
    """Samples per question for Avg@k at `temperature`; 0: greedy only."""
    temperature: float = Field(1.0, gt=0)


class EngineConfig(Settings):
    """Where and how vLLM runs."""

    urls: tuple[str, ...] = ()
    """Running vLLM servers; none: a loop starts one on localhost and keeps it."""
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Share = 0.45
    """Share of the GPU that vLLM takes; the trainer needs the rest where both share one."""
    cpu_kvcache_gib: Positive = 2
    cpu_threads_bind: str | None = None
    """VLLM_CPU_OMP_THREADS_BIND: the cores of a server on a CPU."""
    max_num_seqs: Positive = 256
    keep: bool = True
    """Keep the loop's own server awake while training; off where one GPU does not hold engine and trainer both: then it
    sleeps meanwhile, its weights in the machine's memory. (On a CPU it ends, and starts again.)"""
    concurrency: Positive = 256
    """Trajectories in flight."""
    timeout_s: Positive = 600
    """A request that takes longer fails and is sent again."""


class TeacherEndpoint(Settings):
    """Where the teacher answers."""

    url: str | None = None
    """Base URL of an OpenAI-compatible API, as http://host:8000/v1."""
    api_key_env: str | None = None
    """Environment variable that holds the key for `url`; null: OPENAI_API_KEY for https://api.openai.com, none for others."""
    concurrency: Positive = 32
    """Requests in flight."""
    timeout_s: Positive = 20
    """For one request."""
    retries: int = Field(1, ge=0)
    """Of a request that failed or took too long, with growing pauses."""
    gpu_memory_utilization: Share = 0.3
    """Share of the GPU that the loop's own second server takes ("warmstart")."""
    cpu_threads_bind: str | None = None
    """VLLM_CPU_OMP_THREADS_BIND of that server on a CPU."""


class TrainerConfig(Settings):
    """Where and how the trainer runs."""

    processes: Positive = 1
    """In all, over all nodes."""
    accelerate_config: str | None = None
    """Several GPUs by `accelerate launch`: ddp (each holds the model), fsdp2 (each holds a part of every layer), or the path
    of a file of your own as `accelerate config` writes it, whose number of processes `processes` replaces."""
    nodes: Positive = 1
    """Machines with as many processes each: on every other than the loop's own `thinkimg trainer --rank 1` (2, …) has to run
    with the same settings, and they must see the store under the same path."""
    address: str | None = None
    """host:port of the loop's machine, where the other nodes find it; the port must be free."""
    threads: Positive = 2
    """Threads of a trainer on a CPU: results are bit-equal at a fixed number."""
    keep: bool = True
    """Keep the worker between iterations; off where memory does not hold engine and trainer both."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nodes > 1 and (self.address is None or self.processes % self.nodes):
            raise ValueError("several trainer.nodes need trainer.address, and trainer.processes in equal parts")
        if self.accelerate_file is not None and not self.accelerate_file.is_file():
            shipped = sorted(path.stem for path in self._accelerate_presets().glob("*.yaml"))
            raise ValueError(
                f"trainer.accelerate_config has to be {' or '.join(shipped)} or the path of a file, "
                f"and '{self.accelerate_config}' is none of these"
            )
        return self

    @property
    def accelerate_file(self) -> Path | None:
        """The file that accelerate_config names: a bare name is one of the package's."""
        if self.accelerate_config is None:
            return None
        path = Path(self.accelerate_config)
        if path.name == self.accelerate_config and path.suffix not in (".yaml", ".yml", ".json"):
            return self._accelerate_presets() / f"{path}.yaml"
        return path

    @staticmethod
    def _accelerate_presets() -> Path:
        return Path(str(resources.files("thinkimg.presets"))) / "accelerate"


class TrackingConfig(Settings):
    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; null: sqlite at <store>/mlflow.db."""
    traces: int = Field(8, ge=0)
    """Trajectories per iteration that are logged as traces with their images."""


class WhereConfig(Settings):
    """On what machines and how fast: recorded, never fingerprinted."""

    store: str = "artifacts"
    """Root of the artifact store."""
    engine: EngineConfig = EngineConfig()
    teacher: TeacherEndpoint = TeacherEndpoint()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    workers: Positive = 4
    """Threads for decoding images, image tools and scoring."""
    runner: str = Field("threads", pattern=r"^(threads|dask|(tcp|tls)://\S+)$")
    """Who scores: threads of this process, Dask with so many processes of this machine, or the Dask scheduler at an
    address such as tcp://10.0.0.1:8786, whose workers must see the store under the same path."""

    def public(self) -> dict[str, Any]:
        """As JSON for manifests and people: without the passwords in URIs."""
        tree = self.model_dump(mode="json")
        for section, name in (("tracking", "uri"), ("teacher", "url")):
            tree[section][name] = tree[section][name] and without_password(tree[section][name])
        tree["engine"]["urls"] = [without_password(url) for url in tree["engine"]["urls"]]
        return tree


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()


class Config(Settings):
    """Everything that a loop needs."""

    preset: str = "development"
    """Name of the preset or path of the YAML file that this came from."""
    iterations: Positive = 10
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    images: ImagesConfig = ImagesConfig()
    conversation: ConversationConfig = ConversationConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    image: ImageConfig = ImageConfig()
    mix: dict[str, Annotated[float, Field(ge=0)]] = {"format": 0.2, "tool": 0.3, "answer": 0.3, "image": 0.2}
    """Weight of each reward component; applied when advantages are computed, so that another mix needs no new scores."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    on_alarm: Literal["warn", "stop"] = "warn"
    """What an alarm does to the loop (see thinkimg/analysis/alarms.py): tell, or tell and end it. Not part of what the loop is."""
    where: WhereConfig = WhereConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmstart.checkpoint is not None and self.model.adaptation == "lora":
            raise ValueError("warmstart.checkpoint is for full fine-tuning: with LoRA set model.path to the checkpoint")
        return self


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("thinkimg.presets").iterdir() if p.name.endswith(".yaml")
    )


def load(preset: str = "development", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The resolved config of a preset (a name or the path of a YAML file) with overrides like "train.loss.beta=0.01".

    Raises UserError with one sentence for an unknown preset or key and for a value that does not fit.
    """
    tree = {"preset": Path(preset).stem if preset.endswith((".yaml", ".yml")) else preset} | read_preset(preset)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"The override '{override}' has no value.", hint="Write it as a.b=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"The value of '{override}' is no YAML.", hint="Quote texts with special characters."
            ) from None
        if key.startswith("mix."):  # one weight of the mix, and not a mix of this one alone
            tree.setdefault("mix", dict(Config.model_fields["mix"].default))
        if key.startswith("image.weights."):
            tree["image"] = merge({"weights": ImageConfig().weights}, tree.get("image", {}))
        assign(tree, key.strip().split("."), value)
    return validate(tree)


def read_preset(preset: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a preset, merged over the one that it extends (by name, or by a path relative to its own file)."""
    path = Path(preset)
    if preset in seen:
        raise UserError(f"The preset {preset} extends itself: {' -> '.join([*seen, preset])}.")
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"There is no preset file {preset}.", hint=f"Presets by name: {', '.join(presets())}.")
        text = path.read_text(encoding="utf-8")
    elif preset in presets():
        text = resources.files("thinkimg.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(preset, presets(), 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(presets())}, or the path of a .yaml file."
        raise UserError(f"There is no preset named '{preset}'.", hint=hint)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"The preset {preset} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"The preset {preset} is no mapping of settings.", hint="Start from `thinkimg schema`.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if str(base).endswith((".yaml", ".yml")):
        base = str(path.parent / base)
    return merge(read_preset(str(base), (*seen, preset)), tree)


def merge(base: dict, top: dict) -> dict:
    """top over base, mappings merged key by key; `mix` is replaced whole, since half of another mix is no mix."""
    merged = dict(base)
    for key, value in top.items():
        deep = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "mix"
        merged[key] = merge(base[key], value) if deep else value
    return merged


def assign(tree: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = tree.get(key)
        tree[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        tree = inner
    tree[keys[-1]] = value


def validate(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error.errors()[0])) from None


def explain(error: dict[str, Any]) -> tuple[str, str | None]:
    """One sentence and a hint for pydantic's first complaint."""
    where = [str(part) for part in error["loc"]]
    name = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = known_keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, 1)
        place = ".".join(where[:-1]) or "the top level"
        hint = (
            f"Did you mean {'.'.join([*where[:-1], near[0]])}?" if near else f"At {place} there are {', '.join(known)}."
        )
        return f"There is no setting '{name}'.", hint
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return (message if message.endswith(".") else message + "."), None
    given = json.dumps(error["input"], default=str)
    return f"The setting '{name}' does not fit ({given}): {message}.", "See `thinkimg schema`."


def known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)
