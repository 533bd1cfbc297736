"""Forecast of the disk before anything runs: what a loop's policies take, as trainer/checkpoint.py writes them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinkimg.config.tree import Config
from thinkimg.disk import free_space
from thinkimg.stages.train import KEPT
from thinkimg.trainer.memory import FLOAT_BYTES, GIB
from thinkimg.trainer.policy import add_adapter, build_empty, train_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PolicySizes:
    """Bytes of a loop's policies in the store."""

    weights: int
    """Of one policy, float32: of the adapter with LoRA, else of the model."""
    optimizer: int
    """Both moments of the trained weights, float32."""
    count: int
    """Policies of which the weights are kept, the warm start among them."""

    @property
    def written(self) -> int:
        """Bytes that an iteration writes."""
        return self.weights + self.optimizer

    def total(self, count: int) -> int:
        """Return the bytes of so many policies, at the time when the last one has been written."""
        return count * self.weights + min(count, KEPT + 1) * self.optimizer


def predict_policies(config: Config, base: "PretrainedConfig") -> PolicySizes:
    """Return the sizes of a loop's policies. base: the base model's config.json."""
    import torch

    model = build_empty(base, config.model)
    if config.model.adaptation == "lora":
        with torch.device("meta"):
            model = add_adapter(model, config.model)
    trained = sum(p.numel() for p in train_only(model, config.model, vision=config.model.train_vision).values())
    stored = trained if config.model.adaptation == "lora" else sum(p.numel() for p in model.parameters())
    kept = config.where.keep_policies
    # The warm start, and one that is the most accurate, are kept beside the last ones.
    count = 1 + (config.iterations if kept is None else min(config.iterations, kept + 1))
    return PolicySizes(FLOAT_BYTES * stored, 2 * FLOAT_BYTES * trained, count)


def forecast_policies(config: Config, base: "PretrainedConfig") -> str:
    """Return one line: what an iteration writes and the loop keeps, and what to change if the disk is too small."""
    sizes, free = predict_policies(config, base), free_space(config.where.store)
    weights, optimizer, total = (_format(size) for size in (sizes.weights, sizes.optimizer, sizes.total(sizes.count)))
    line = f"policies       an iteration writes {weights} of weights and {optimizer} of the optimizer's state"
    line += f"; {sizes.count} policies take {total}"
    if sizes.total(sizes.count) <= free:
        return f"{line}: fits in {_format(free)}"
    fitting = [kept for kept in range(2, config.iterations) if sizes.total(kept + 2) <= free]
    change = f"set where.keep_policies={fitting[-1]}" if fitting else "free some, or set where.store to a larger disk"
    return f"{line}, but only {_format(free)} are free: {change}"


def _format(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
