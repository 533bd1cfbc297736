"""GPU memory of the loop's own engine before it starts: what its share holds, and how many conversations play at once.

Weights, adapter and key-value cache are counted from config.json. What vLLM takes beside them is an estimate.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinkimg.config.tree import Config
from thinkimg.engine.server import ADAPTERS, round_rank
from thinkimg.models.family import find_family
from thinkimg.trainer.forward.modules import get_head_dim
from thinkimg.trainer.memory import GIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ITEMSIZE = {"bfloat16": 2, "float32": 4}
ACTIVATIONS = 2 * GIB  # of a prefill and of the vision tower
GRAPHS = GIB  # CUDA graphs
CONTEXT = 6 * GIB // 10  # of each process on a GPU: CUDA's context, and the workspaces of its libraries
RESIDUE = 2 * GIB  # what a sleeping engine keeps: its context and what else is not offloaded (vllm#53888, vllm#56373)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU's share of a server."""

    share: int
    """Part of the GPU that `gpu_memory_utilization` grants."""
    weights: int
    adapters: int
    """Room for ADAPTERS of them."""
    per_token: int
    """Key-value cache of one token."""
    per_sequence: int
    """Recurrent states of one conversation. vLLM keeps more of them where it caches prefixes."""
    max_tokens: int
    """Tokens of the longest conversation."""

    @property
    def cache(self) -> int:
        """Bytes that are left for the key-value cache; negative if the rest does not fit."""
        return self.share - self.weights - self.adapters - ACTIVATIONS - GRAPHS

    @property
    def conversations(self) -> int:
        """Number of conversations of the greatest length that play at once."""
        return max(0, self.cache // (self.per_token * self.max_tokens + self.per_sequence))


def predict_engine(config: Config, base: "PretrainedConfig", gpu: int) -> EngineMemory:
    """Return the memory of the engine on a GPU of so many bytes."""
    import torch

    from thinkimg.trainer.policy import build_empty

    family = find_family(base.model_type)
    engine, text = config.where.engine, base.text_config
    model = build_empty(base, config.model)
    itemsize = ITEMSIZE[config.model.precision]  # also of a policy that is trained in full
    weights = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    layers = [module for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear)]
    width = sum(layer.in_features + layer.out_features for layer in layers)
    adapter = width * round_rank(config.model.lora_rank) * itemsize
    ranks = engine.tensor_parallel_size
    heads = max(1, text.num_key_value_heads // ranks)  # each rank holds one at least
    return EngineMemory(
        share=int(gpu * engine.gpu_memory_utilization),
        weights=weights // ranks,
        adapters=ADAPTERS * adapter // ranks if config.model.adaptation == "lora" else 0,
        per_token=2 * len(family.attention_layers(text)) * heads * get_head_dim(text) * itemsize,
        per_sequence=family.state_bytes(text, itemsize) // ranks,
        max_tokens=config.conversation.max_tokens,
    )
