"""Decoder layers compiled by torch.compile: norms, rotary positions, SiLU and additions as few kernels.

What a layer attends by, or recurs by, stays as it is: its Python depends on the batch's spans. A layer is so
compiled in parts, for any length. Whether it is right and possible on a machine is tried first (compile_check.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING

import torch

from thinkimg.trainer.forward.attention import use_attention
from thinkimg.trainer.forward.modules import get_base_model
from thinkimg.trainer.forward.packed_attention import attend_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "thinkimg_packed_opaque"
VARIANTS = 64  # torch's own limit is 8: with and without gradients, batches of one and of several, kinds of layers
BACKEND = "inductor"
RECURRENT = "linear_attn"  # transformers' name for the part of a layer that recurs


class CompiledForward:
    """Forward of a decoder layer: compiled under the autocast that it trains in, else as transformers wrote it.

    Other passes are few: of the base without its adapter, and in float32. They aren't worth a compilation.
    """

    def __init__(self, layer: torch.nn.Module, *, autocast: bool):
        self.eager, self.autocast = layer.forward, autocast
        self.compiled = torch.compile(layer.forward, dynamic=True, backend=BACKEND)
        self.adapted = next((module for module in layer.modules() if hasattr(module, "disable_adapters")), None)

    def __call__(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Return the layer's output."""
        own = torch.is_autocast_enabled(hidden_states.device.type) == self.autocast
        with_adapter = self.adapted is None or not self.adapted.disable_adapters
        if not (own and with_adapter):
            return self.eager(hidden_states, *args, **kwargs)
        # Here, as the settings are a thread's own, and a GPU computes again in autograd's thread.
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return self.compiled(hidden_states, *args, **kwargs)


@contextmanager
def use_compiled_layers(model: "PreTrainedModel", *, autocast: bool) -> Iterator[None]:
    """Run a language model's decoder layers compiled, within this context.

    autocast: True if passes in training are under autocast.
    """
    language_model = get_base_model(model).language_model
    config, before = language_model.config, language_model.config._attn_implementation
    use_attention(config, NAME, torch.compiler.disable(attend_packed))
    recurrent = [getattr(layer, RECURRENT) for layer in language_model.layers if hasattr(layer, RECURRENT)]
    # One function for all layers: another one would be compiled for anew.
    opaque = {kind: torch.compiler.disable(kind.forward) for kind in {type(part) for part in recurrent}}
    try:
        for part in recurrent:
            part.forward = MethodType(opaque[type(part)], part)
        for layer in language_model.layers:
            layer.forward = CompiledForward(layer, autocast=autocast)
        yield
    finally:
        config._attn_implementation = before
        for module in [*recurrent, *language_model.layers]:
            vars(module).pop("forward", None)
