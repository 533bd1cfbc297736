"""LoRA's linear layer with its scaling folded into B: fewer passes over the activations than peft's own.

    peft      out = W x + b,  part = B (A x),  part · s,  out + part        beside W's product: 6 passes over an output
    folded    out = W x + b,  out += (s B) (A x), within the product                            2

The backward pass adds the adapter's part to the input's gradient likewise. Parameters keep peft's names and values.
"""

import torch
from peft.tuners.lora import Linear
from torch import Tensor


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return W x + b + up (down x), (T, out), and down x, (T, rank), for x (T, in)."""
    out = torch.nn.functional.linear(x, weight, bias)
    low = x @ down.t()
    return out.addmm_(low, up.t()), low


def multiply_backward(
    grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, low: Tensor, *, inputs: bool
) -> list[Tensor]:
    """Return the gradients of down and up, and of x, (T, in), if `inputs`. grad: (T, out)."""
    low_grad = grad @ up
    grads = [low_grad.t() @ x, grad.t() @ low]
    return [*grads, (grad @ weight).addmm_(low_grad, down)] if inputs else grads


@torch.library.custom_op("thinkimg::adapted_product", mutates_args=())
def compiled_multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Call `multiply` from compiled code, opaque: a compiler would copy `out` rather than add to it in place."""
    return multiply(x, weight, bias, down, up)


@compiled_multiply.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])  # len() fixes a length


@torch.library.custom_op("thinkimg::adapted_product_backward", mutates_args=())
def compiled_multiply_backward(
    grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, low: Tensor, *, inputs: bool
) -> list[Tensor]:
    """Call `multiply_backward` from compiled code."""
    return multiply_backward(grad, x, weight, down, up, low, inputs=inputs)


@compiled_multiply_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, low: Tensor, *, inputs: bool) -> list[Tensor]:
    return [torch.empty_like(down), torch.empty_like(up), *([torch.empty_like(x)] if inputs else [])]


class AdaptedProduct(torch.autograd.Function):
    """Product with a frozen weight and an adapter; all arguments of one dtype.

    x (T, in), weight (out, in), bias (out,) or None, down (rank, in), up (out, rank) -> (T, out).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        call = compiled_multiply if torch.compiler.is_compiling() else multiply
        out, low = call(x, weight, bias, down, up)
        ctx.save_for_backward(x, weight, down, up, low)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        call = compiled_multiply_backward if torch.compiler.is_compiling() else multiply_backward
        inputs = ctx.needs_input_grad[0]
        down_grad, up_grad, *x_grad = call(grad, *ctx.saved_tensors, inputs=inputs)
        return x_grad[0] if inputs else None, None, None, down_grad, up_grad


class FoldedLinear(Linear):
    """peft's linear layer under an adapter, computed by AdaptedProduct where that is the same; see fold_scaling."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return (..., out) for x (..., in), in autocast's dtype if that is on."""
        base, device = self.base_layer, x.device.type
        names = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if base.weight.requires_grad or not (torch.is_autocast_enabled(device) or down.dtype == dtype):
            return super().forward(x)
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        scaled = (up * self.scaling[names[0]]).to(dtype)  # vLLM folds it, too
        out = AdaptedProduct.apply(x.flatten(0, -2).to(dtype), weight, bias, down.to(dtype), scaled)
        return out.unflatten(0, x.shape[:-1])


def fold_scaling(model: torch.nn.Module) -> int:
    """Let the adapted linear layers of a model compute with folded scaling, in place; return their number.

    Those in 4 bits, with dropout or with a variant of LoRA (DoRA and the like) stay as peft made them.
    """
    layers = [module for module in model.modules() if type(module) is Linear and can_fold(module)]
    for layer in layers:
        layer.__class__ = FoldedLinear
    return len(layers)


def can_fold(layer: Linear) -> bool:
    """Return True for plain LoRA over a plain linear layer."""
    dropouts, biases = layer.lora_dropout.values(), [up.bias for up in layer.lora_B.values()]
    return (
        type(layer.base_layer) is torch.nn.Linear
        and not layer.lora_variant
        and all(type(dropout) is torch.nn.Identity for dropout in dropouts)
        and all(bias is None for bias in biases)
    )
