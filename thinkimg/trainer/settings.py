"""Settings of the training process: warm start, GRPO steps, parity gate, and where the worker runs."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from thinkimg.devices import Cores, Devices
from thinkimg.errors import shorten
from thinkimg.grpo.settings import LossConfig
from thinkimg.puzzles.settings import Flaws
from thinkimg.settings import FilePath, Positive, Settings

Recomputation = Literal[False, True, "auto"]


class WarmstartConfig(Settings):
    """Supervised fine-tuning before the first iteration."""

    demonstrations: FilePath | None = None
    """JSONL of conversations {sample_id, turns: [text, …]}; null: scripted ones for the built-in puzzles.
    Without either the base model is taken as it is."""
    steps: int = Field(100, ge=0)
    """Optimizer steps; 0: the base model is taken as it is."""
    batch: Positive = 16
    """Conversations per step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate; it falls to a tenth by the last step."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises."""
    flaws: Flaws = Flaws()
    """Shares of scripted demonstrations that are wrong on purpose."""
    pairs: int = Field(0, ge=0)
    """Puzzles from which a tiny policy also learns to compare images, as the image reward `self` asks it to."""
    checkpoint: FilePath | None = None
    """Directory of a warm-started model to take instead of training one; with LoRA set model.path to it."""


class ParityConfig(Settings):
    """Comparison of engine and trainer before the first step of every iteration."""

    trajectories: Positive = 16
    """Trajectories that are compared, at most."""
    max_kl: float = Field(0.05, gt=0)
    """Mean of |log p(engine) - log p(trainer)| over sampled tokens, above which the stage refuses to train."""
    min_slope: float = Field(0.5, le=1)
    """Share of a LoRA adapter's effect on log-probabilities that the engine has to show. Where its whole interval lies
    below, the engine plays the base, and the stage refuses to train."""


class TrainConfig(Settings):
    """GRPO steps of an iteration."""

    loss: LossConfig = LossConfig()
    learning_rate: float = Field(1e-5, gt=0)
    """Learning rate of AdamW, constant after the warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps from the first iteration on over which the rate rises to learning_rate; constant afterwards."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the gradient of a step is clipped."""
    steps: Positive = 1
    """Optimizer steps per iteration and epoch: the groups are dealt into this many batches."""
    epochs: Positive = 1
    """Passes over the rows of an iteration."""
    min_std: float = Field(0.02, ge=0)
    """Groups whose total reward has a smaller standard deviation are silent: no advantage, no part in the loss."""
    token_budget: Positive = 16384
    """Tokens per micro-batch; a prompt that rows share counts once."""
    shared_prompts: bool = True
    """Pack micro-batches and compute the common prompt of a group once; off: padded batches. Where the model does not
    allow it (sliding windows, attention dropout, positions that depend on the length) it is off by itself, with a
    warning."""
    gradient_checkpointing: Recomputation = False
    """Compute activations again in the backward pass, which takes less memory and more time: of no decoder layer
    (false), of all (true), or of as few as the memory check finds room for (auto). Results are the same."""
    parity: ParityConfig = ParityConfig()

    @property
    def scores_again(self) -> bool:
        """True if rows pass the model more than once in an iteration, beside those of the parity gate."""
        return self.steps * self.epochs > 1 or self.loss.beta > 0 or self.loss.top_entropy_quantile < 1


class TrainerConfig(Settings):
    """Processes and machines of the trainer."""

    processes: Positive = 1
    """Training processes, one per GPU, over all nodes together; with `devices` it follows from these."""
    devices: Devices | None = None
    """GPUs of the trainer on each node, as [2, 3], with a process each; read as where.engine.devices. null: as many as
    there are processes, from the first on."""
    cpu_threads_bind: Cores | None = None
    """Cores of the trainer, as 1 or 0,2-3; null: all."""
    accelerate_config: FilePath | None = None
    """Several GPUs by `accelerate launch`: ddp (each holds the model), fsdp2 (each holds a part of every layer), or the
    path of a file of your own as `accelerate config` writes it, whose number of processes `processes` replaces."""
    nodes: Positive = 1
    """Machines with as many processes each: on every other than the loop's own `thinkimg trainer --rank 1` (2, …) has
    to run with the same settings, and they must see the store under the same path."""
    address: str | None = Field(None, pattern=r"^(\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):[0-9]{1,5}$")
    """host:port of the loop's machine, where the other nodes find it; the port must be free."""
    threads: Positive = 2
    """Threads of a trainer on a CPU: results are bit-equal at a fixed number."""
    keep: bool = True
    """Keep the worker between iterations; off where memory does not hold engine and trainer both."""

    @model_validator(mode="before")
    @classmethod
    def _a_process_each(cls, fields: Any) -> Any:
        """Set the number of processes where devices say it and nothing else does."""
        if not isinstance(fields, Mapping) or "processes" in fields:
            return fields
        devices, nodes = fields.get("devices"), fields.get("nodes", 1)
        counted = isinstance(devices, list | tuple) and devices and isinstance(nodes, int)
        return {**fields, "processes": len(devices) * nodes} if counted else fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.devices is not None and self.processes != len(self.devices) * self.nodes:
            raise ValueError(
                f"trainer.processes is {self.processes}, and trainer.devices are {len(self.devices)} "
                f"on each of {self.nodes} nodes: leave trainer.processes out"
            )
        if self.nodes > 1 and (self.address is None or self.processes % self.nodes):
            raise ValueError("several trainer.nodes need trainer.address, and trainer.processes in equal parts")
        if self.accelerate_file is not None and not self.accelerate_file.is_file():
            shipped = sorted(path.stem for path in self._accelerate_presets().glob("*.yaml"))
            raise ValueError(
                f"trainer.accelerate_config has to be {' or '.join(shipped)} or the path of a file, "
                f"and '{shorten(str(self.accelerate_config), 300)}' is none of these"
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
