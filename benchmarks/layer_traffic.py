"""Bytes that a decoder layer's operations move beside its large products, and a layer's time.

    python benchmarks/layer_traffic.py            a layer of Qwen2.5-VL-7B with LoRA; two CPU cores, some minutes

    peft        the layer as transformers and peft wrote it
    folded      LoRA's scaling folded into B, added within the product (forward/lora.py)
    compiled    folded, and the layer compiled (forward/compilation.py)

One layer goes forward, forward again (activation checkpointing) and backward. Bytes are what each operation reads and
writes; products with the frozen weights are FLOPs, and count none. Attention counts none either, the same in all.
- Eager operations are counted as dispatched, on tensors without data.
- Compiled kernels are counted from the reads and writes that Inductor's scheduler gives, for two numbers of tokens
  each. Bytes are linear in these. The CPU's scheduler is asked: a GPU's may fuse otherwise.
The adapter's products are not compiled: theirs are those of `folded`.

Seconds are those of a CPU, of few tokens. Gradients are compared with peft's in float32.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from workload import SEVEN_B, config_of

from thinkimg.trainer.forward.attention import use_attention
from thinkimg.trainer.forward.compilation import use_compiled_layers
from thinkimg.trainer.forward.lora import fold_scaling
from thinkimg.trainer.forward.packed_attention import NAME, attend_packed

MODES = ("peft", "folded", "compiled")
RANK, ALPHA = 64, 128
GIB = 2**30
SMALL = 128  # a product with a side of at most so much is the adapter's
ALLOCATIONS = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "zeros")
FEW, MORE = 32, 64  # tokens for which compiled kernels are counted


class Traffic(TorchDispatchMode):
    """Counter of the bytes and operations of eager operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elementwise, self.adapter, self.operations, self.products, self.flops = 0, 0, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space != "aten" or function.is_view or name in ALLOCATIONS or "flash_attention" in name:
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        size = sum(x.nbytes for x in inputs + [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        self.operations += 1
        if name in ("mm", "addmm", "addmm_"):
            self.products += 1
            left, right = inputs[-2:]
            if min(*left.shape, *right.shape) > SMALL:
                self.flops += 2 * left.numel() * right.shape[1]
            else:
                self.adapter += size
        else:
            self.elementwise += size
        return out


class Kernels(NamedTuple):
    """Kernels of a compiled graph, and the bytes that they move."""

    backward: bool
    count: int
    size: int


@contextmanager
def count_kernels() -> Iterator[list[Kernels]]:
    """Yield a list of what Inductor compiles within this context; it leaves out kernels that are not its own."""
    lower, graphs = GraphLowering.codegen, []

    def codegen(graph: GraphLowering):
        code = lower(graph)
        nodes = [n for n in graph.scheduler.nodes if not (n.is_extern() or isinstance(n, NopKernelSchedulerNode))]
        graphs.append(
            Kernels(bool(graph.is_backward), len(nodes), sum(n.get_read_write_buffers_sizes() for n in nodes))
        )
        return code

    GraphLowering.codegen = codegen
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            yield graphs
    finally:
        GraphLowering.codegen = lower


class Layer:
    """A decoder layer of the 7B under an adapter, its last input and its gradients."""

    def __init__(self, mode: str, dtype: torch.dtype):
        self.mode, self.dtype, self.config = mode, dtype, config_of(SEVEN_B).text_config
        use_attention(self.config, NAME, attend_packed)
        torch.manual_seed(0)
        layer = Qwen2_5_VLDecoderLayer(self.config, 0).to(torch.bfloat16).to(dtype)  # the same values in both
        leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self.layer = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=leaves), layer)
        for name, parameter in self.layer.named_parameters():
            if parameter.requires_grad_("lora_" in name).requires_grad:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) / 64
        for module in self.layer.modules():
            if hasattr(module, "cast_input_dtype_enabled") and dtype == torch.bfloat16:
                module.cast_input_dtype_enabled = False
        if mode != "peft":
            fold_scaling(self.layer)

    def use(self):
        """Return the context in which the layer runs as its mode says."""
        if self.mode != "compiled":
            return nullcontext()
        language_model = SimpleNamespace(config=self.config, layers=[self.layer])
        model = SimpleNamespace(model=SimpleNamespace(language_model=language_model))
        return use_compiled_layers(model, autocast=self.dtype == torch.bfloat16)

    def step(self, tokens: int, *, recompute: bool = True, counter=nullcontext) -> list[torch.Tensor]:
        """Go forward and backward; return the gradients. counter: context of the layer's passes."""
        generator = torch.Generator().manual_seed(tokens)
        draw = partial(torch.randn, generator=generator)
        size = self.config.hidden_size // self.config.num_attention_heads
        x = draw(1, tokens, self.config.hidden_size).bfloat16().to(self.dtype).requires_grad_()
        angles = draw(1, tokens, size)
        positions = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        call = partial(self.layer, position_embeddings=positions)
        self.layer.zero_grad(set_to_none=True)
        with counter():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                out = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
            out.backward(torch.ones_like(out))
        return [x.grad, *(p.grad for p in self.layer.parameters() if p.requires_grad)]


def count_eager(mode: str, tokens: int) -> Traffic:
    """Return the counts of a layer that is not compiled."""
    traffic = Traffic()
    with torch.device("meta"):
        layer = Layer(mode, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.layer.to_empty(device="cpu")
        layer.step(tokens, counter=lambda: traffic)
    return traffic


def count_compiled(tokens: int) -> Kernels:
    """Return the kernels of a compiled layer's passes: forward twice, and backward."""
    totals = []
    for length in (FEW, MORE):
        torch._dynamo.reset()
        layer = Layer("compiled", torch.bfloat16)
        with layer.use(), count_kernels() as graphs:
            layer.step(length, recompute=False)
        totals.append([sum(k[field] * (1 if k.backward else 2) for k in graphs) for field in (1, 2)])
    (count, few), (_, more) = totals
    return Kernels(True, count, few + (more - few) * (tokens - FEW) // (MORE - FEW))


def print_traffic(tokens: int) -> None:
    """Print bytes and operations of each mode."""
    print(f"{tokens} tokens, bfloat16, rank {RANK}: bytes of a layer's forward, recomputation and backward pass")
    counts = {mode: count_eager(mode, tokens) for mode in MODES[:2]}
    rows = {mode: (c.elementwise, c.adapter, c.operations) for mode, c in counts.items()}
    kernels, folded = count_compiled(tokens), counts["folded"]
    rows["compiled"] = (kernels.size, folded.adapter, kernels.count + folded.products)
    before = sum(rows["peft"][:2])
    for mode, (elementwise, adapter, operations) in rows.items():
        total = elementwise + adapter
        print(
            f"  {mode:9} elementwise {elementwise / GIB:5.2f} GiB + adapter's products {adapter / GIB:4.2f} GiB = "
            f"{total / GIB:5.2f} GiB, {total / before:.2f} of peft's; {operations} operations"
        )
    print(f"  products with frozen weights: {folded.flops / 1e12:.2f} TFLOP")


def print_times(tokens: int, repeats: int) -> None:
    """Print each mode's seconds beside peft's, by turns, and how far its gradients are from peft's in float32."""
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        gradients = {}
        layers = {mode: Layer(mode, dtype) for mode in MODES}
        for turn in range(repeats + 1):
            for mode, layer in layers.items():
                with layer.use():
                    start = time.perf_counter()
                    gradients[mode] = [grad.float().clone() for grad in layer.step(tokens)]
                if turn:  # the first compiles
                    seconds[mode].append(time.perf_counter() - start)
        exact = exact or gradients["peft"]
        print(f"{tokens} tokens on the CPU, {dtype}, {torch.get_num_threads()} threads, median of {repeats}")
        for mode in MODES:
            ratio = statistics.median(b / a for a, b in zip(seconds["peft"], seconds[mode], strict=True))
            pairs = zip(exact, gradients[mode], strict=True)
            error = max(float((b - a).norm() / a.norm()) for a, b in pairs)
            print(f"  {mode:9} {statistics.median(seconds[mode]):6.2f} s, {ratio:.2f} of peft's; gradients {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6055, help="of the micro-batch whose bytes are counted")
    parser.add_argument("--timed", type=int, default=64, help="tokens of the timed passes")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    print_traffic(options.tokens)
    print_times(options.timed, options.repeats)


if __name__ == "__main__":
    main()
