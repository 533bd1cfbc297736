"""Settings of vLLM: what is sampled, and where the servers run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from thinkimg.devices import Devices, OneDevice
from thinkimg.settings import KeyVariable, Name, Positive, Settings, Share, Url


class RolloutConfig(Settings):
    """Rollouts of an iteration."""

    samples: Positive = 64
    """Samples per iteration, drawn without repetition within an epoch."""
    group_size: int = Field(8, ge=2)
    """Rollouts per sample; their mean reward is the baseline of the advantage."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling."""


class EvaluateConfig(Settings):
    """Measurement of held-out accuracy."""

    every: Positive = 1
    """Iterations between two evaluations; the first policy and the last are evaluated always."""
    samples: Positive = 100
    """Held-out samples per evaluation between the ends."""
    samples_ends: Positive = 300
    """Held-out samples before the first and after the last iteration."""
    k: int = Field(4, ge=0)
    """Samples per question for Avg@k at `temperature`; 0: greedy only."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the samples of Avg@k."""


class EngineSettings(Settings):
    """Limits and precision of a server that a stage asks for; its place on the machine is in `EngineConfig`."""

    dtype: Literal["bfloat16", "float32"]
    """Precision of the weights."""
    max_tokens: Positive
    """Tokens of a prompt and what follows, images expanded."""
    max_images: Positive
    """Images per prompt."""
    max_pixels: Positive
    """Pixels of an image, as the model sees it."""

    def covers(self, other: "EngineSettings") -> bool:
        """Tell whether a server that runs so gives what `other` asks for: the same precision, and limits as wide."""
        return self.dtype == other.dtype and self.widened(other) == self

    def widened(self, other: "EngineSettings") -> "EngineSettings":
        """Return `other` with the wider limits of both, so that two stages that take turns need one server."""
        limits = ("max_tokens", "max_images", "max_pixels")
        return other.model_copy(update={name: max(getattr(self, name), getattr(other, name)) for name in limits})


class EngineConfig(Settings):
    """Servers of vLLM and their use of the machine."""

    urls: tuple[Url, ...] = ()
    """Running vLLM servers; none: a loop starts its own on localhost and keeps them."""
    devices: Devices | None = None
    """GPUs of the loop's own servers, as [0, 1]: one server for each tensor_parallel_size of them. Numbers count those
    that CUDA_VISIBLE_DEVICES shows, where it is set; UUIDs are taken, too. null: one server, on the first GPUs."""
    adapters: Literal["auto", "always", "never"] = "auto"
    """Serve LoRA adapters beside the base model; else they are merged into it, and whole weights are loaded. `auto`: on
    a GPU, and by `urls` where every server takes them. (On a CPU vLLM's adapters are 46 times slower.)"""
    tensor_parallel_size: Positive = 1
    """GPUs over which one server splits the model."""
    gpu_memory_utilization: Share = 0.45
    """Share of the GPU that vLLM takes; the trainer needs the rest where both share one."""
    cpu_kvcache_gib: Positive = 2
    """Memory of the key-value cache on a CPU, in GiB."""
    cpu_threads_bind: Name | None = None
    """VLLM_CPU_OMP_THREADS_BIND: the cores of the loop's own servers on a CPU. As 0-7|8-15 it is two servers, or one of
    tensor_parallel_size 2."""
    max_num_seqs: Positive = 256
    """Sequences that a server works on at once."""
    keep: bool = True
    """Keep the loop's own server awake while training. Off where one GPU does not hold engine and trainer both: then it
    sleeps meanwhile, its weights in the machine's memory. (On a CPU it ends, and starts again.)"""
    concurrency: Positive = 256
    """Trajectories in flight."""
    timeout_s: Positive = 600
    """Seconds after which a request fails and is sent again."""
    image_cache_gib: Positive = 2
    """Memory for encoded images on their way to the engine, in GiB; its own server reads them in the scratch folder.
    What requests under way need comes on top, and the pictures of conversations in flight."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.devices is not None and self.urls:
            raise ValueError("engine.devices places the loop's own servers, and with engine.urls it has none")
        size = self.tensor_parallel_size
        for name, parts in (("devices", self.devices or ()), ("cpu_threads_bind", self._core_groups)):
            if len(parts) % size:
                raise ValueError(
                    f"engine.{name} has {len(parts)} parts, and each server takes {size} (engine.tensor_parallel_size)"
                )
        return self

    def split(self, *, cpu: bool) -> list["EngineConfig"]:
        """Return the settings of each of the loop's own servers, placed on its GPUs or, on a CPU, on its cores."""
        size = self.tensor_parallel_size
        if self.devices is not None:
            starts = range(0, len(self.devices), size)
            return [self.model_copy(update={"devices": self.devices[start : start + size]}) for start in starts]
        if cpu and self._core_groups:
            starts = range(0, len(self._core_groups), size)
            binds = ["|".join(self._core_groups[start : start + size]) for start in starts]
            return [self.model_copy(update={"cpu_threads_bind": bind}) for bind in binds]
        return [self]

    @property
    def _core_groups(self) -> list[str]:
        """Parts of cpu_threads_bind; [] where it is not in parts."""
        groups = (self.cpu_threads_bind or "").split("|")
        return groups if len(groups) > 1 else []


class TeacherEndpoint(Settings):
    """Endpoint of the teacher."""

    url: Url | None = None
    """Base URL of an OpenAI-compatible API, as http://host:8000/v1."""
    api_key_env: KeyVariable | None = None
    """Environment variable that holds the key for `url`; null: OPENAI_API_KEY for https://api.openai.com, none for
    others."""
    concurrency: Positive = 32
    """Requests in flight."""
    timeout_s: Positive = 20
    """Seconds for one request."""
    retries: int = Field(1, ge=0)
    """Repetitions of a request that failed or took too long, with growing pauses."""
    devices: OneDevice | None = None
    """GPU of the loop's own second server ("warmstart"), as [3]; null: the engine's first."""
    gpu_memory_utilization: Share = 0.3
    """Share of the GPU that the loop's own second server takes ("warmstart")."""
    cpu_threads_bind: Name | None = None
    """VLLM_CPU_OMP_THREADS_BIND of that server on a CPU."""
