"""Qwen3.5, 3.6 and 3.8: three of four decoder layers are recurrent (Gated DeltaNet), calls are XML."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thinkimg.families.qwen3_vl import interpolation_inputs, spread_vectors, text_config, vision_config
from thinkimg.images.patches import ImageProcessor
from thinkimg.importing import importing
from thinkimg.models.family import Family, Recurrence
from thinkimg.models.settings import Precision, TinyModel
from thinkimg.models.tiny_config import token_ids
from thinkimg.records import Coordinates

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FULL, RECURRENT = "full_attention", "linear_attention"
INTERVAL = 4  # every fourth layer attends
DELTA_HEAD = 128  # width of a DeltaNet head, the only one that vLLM's kernel for CPUs takes
SLOW, FAST = 0.003, 0.1  # decays of a tiny model's heads: they remember from 300 to 10 tokens
SHARPER = 0.5  # added to norms of queries and keys where one layer attends: else it hardly sees positions


class Qwen3_5(Family):
    """Qwen3.5, 3.6 and 3.8: one architecture, 0.8B to 27B."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    hub_names = r"qwen3\.[568]-"
    processor = ImageProcessor(patch=16, merge=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    processor_class = "Qwen3VLProcessor"
    coordinates = Coordinates.THOUSANDTHS
    recurrence = Recurrence(
        module="transformers.models.qwen3_5.modeling_qwen3_5",
        rule="torch_chunk_gated_delta_rule",
        convolution="causal_conv1d_fn",
    )
    openings = ("<think>\n", "<think>\n\n</think>\n\n")
    protocols = ("qwen_xml", "qwen", "think")

    def attention_layers(self, text_config: "PretrainedConfig") -> tuple[int, ...]:
        return tuple(number for number, kind in enumerate(text_config.layer_types) if kind == FULL)

    def packing_obstacle(self, text_config: "PretrainedConfig") -> str | None:
        if any(kind != FULL for kind in text_config.layer_types):
            return "most of its layers are recurrent: a row's state can't start from a prompt within one sequence"
        return None

    def state_bytes(self, text_config: "PretrainedConfig", itemsize: int) -> int:
        c = text_config
        values = c.linear_num_value_heads * c.linear_value_head_dim
        state = 4 * values * c.linear_key_head_dim  # float32
        window = itemsize * (c.linear_conv_kernel_dim - 1)  # of the convolution over keys, queries and values
        channels = 2 * c.linear_num_key_heads * c.linear_key_head_dim + values
        return sum(kind != FULL for kind in c.layer_types) * (state + window * channels)

    def tower_inputs(self, visual: Any, patches: int) -> dict[str, Any]:
        return super().tower_inputs(visual, patches) | interpolation_inputs(patches)

    def engine_options(self, *, cpu: bool) -> Mapping[str, object]:
        # With prefix caching vLLM wants chunked prefill for recurrent states, which seeds do not survive on a CPU.
        return {"enable-prefix-caching": None, "no-enable-prefix-caching": True} if cpu else {}

    def precisions(self, *, cpu: bool) -> tuple[Precision, ...]:
        return ("bfloat16",) if cpu else super().precisions(cpu=cpu)  # "CPU GDN attention requires BF16."

    def make_config(self, tiny: TinyModel, ids: Mapping[str, int]) -> "PretrainedConfig":
        with importing:
            from transformers import Qwen3_5Config

        head_dim = tiny.hidden_size // tiny.heads
        text = text_config(tiny, ids, rotary_dim=head_dim // 2)
        text["rope_parameters"]["partial_rotary_factor"] = 0.5  # a quarter of a real head of 256 leaves more axes
        return Qwen3_5Config(
            text_config=text
            | {
                "head_dim": head_dim,
                "linear_key_head_dim": DELTA_HEAD,
                "linear_value_head_dim": DELTA_HEAD,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "layer_types": choose_layers(tiny.layers),
                "mamba_ssm_dtype": "float32",  # vLLM keeps the recurrent states so, as for the real models
            },
            vision_config=vision_config(tiny, self.processor),
            tie_word_embeddings=True,
            **token_ids(ids),
        )

    def init_tiny(self, model: "PreTrainedModel") -> None:
        """transformers draws decays after which nothing is left of the token before: e^-10 and less."""
        import torch

        spread_vectors(model)
        sharper = SHARPER if model.config.text_config.layer_types.count(FULL) == 1 else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".A_log"):
                    parameter.zero_()
                elif name.endswith(".dt_bias"):  # softplus of it is the decay per token
                    steps = torch.logspace(math.log10(SLOW), math.log10(FAST), len(parameter))
                    parameter.copy_(steps.expm1().log())
                elif name.endswith((".q_norm.weight", ".k_norm.weight")):
                    parameter.add_(sharper)


def choose_layers(count: int) -> list[str]:
    """Return the kinds of a tiny model's layers: every fourth attends, and the last one.

    Of four layers the first attends, too. Without it a tiny model is still blind when its warm start ends
    (docs/results.md).
    """
    attending = {number for number in range(count) if (number + 1) % INTERVAL == 0 or number == count - 1}
    if count == INTERVAL:
        attending.add(0)
    return [FULL if number in attending else RECURRENT for number in range(count)]


FAMILY = Qwen3_5()
