"""Memory preflight: the peak of a training step, found by going through it with tensors that have shapes and no data.

Each operation of the forward and backward pass runs on fake tensors, under the model's own code, and the storages that are
alive are added up: LoRA or full, checkpointed or not, whatever transformers does, nothing is guessed but what the vision
tower takes, whose operations depend on data.
"""

import copy
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinkimg.errors import UserError
from thinkimg.grpo.checkpoint import Policy
from thinkimg.grpo.flex import bucket
from thinkimg.grpo.packing import Conversation
from thinkimg.grpo.policy import FEATURE_BYTES, base_model, packed_states, token_logps, unwrap
from thinkimg.grpo.rows import CACHE_BYTES, PATCH_BYTES
from thinkimg.grpo.sharing import Packed, Unit, pack, pad

log = logging.getLogger(__name__)

GB = 2**30
MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
LARGE = 2**20
HOLES = 2.5  # what a process was seen to hold, by what its tensors took, before `return_memory`
MARGIN = 1.25  # refused is what needs more than this times what is free: so far off was the worst prediction
VISION_ATTENTION = 12  # tensors of hidden width alive within a block's attention: queries, keys, values, copies
VISION_MLP = 3  # of intermediate width within its MLP


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a step, beside the weights that are loaded."""

    trained: int
    """Gradients and AdamW's two moments of what is trained, float32."""
    activations: int
    """At the peak of forward and backward of the largest micro-batch."""
    vision: int
    """At the peak of the frozen tower over the largest micro-batch's new images, before the forward pass begins."""
    images: int
    """Patches (in main memory) and features that are kept."""

    @property
    def total(self) -> int:
        return self.trained + self.images + max(self.activations, self.vision)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make while they live; peak: the most at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def need(
    policy: Policy,
    rows: Sequence[Conversation],
    units: Sequence[Unit],
    *,
    checkpointing: bool,
    train_vision: bool = False,
    entropy_grad: bool = False,
    every_image: dict[str, np.ndarray] | None = None,
) -> Need:
    """Of a step whose largest micro-batch is this one. every_image: key -> grid of all images of the job."""
    inner = unwrap(policy.model)
    packed = pack(rows, units, inner.config.image_token_id)
    cuda = policy.device.type == "cuda"
    if cuda:
        packed = pad(packed, bucket(len(packed.tokens)), 0)
    trained = sum(3 * 4 * p.numel() for p in policy.model.parameters() if p.requires_grad)
    patches = patches_of(packed)
    images = every_image or dict(zip(packed.images, packed.grids, strict=True))
    known = {key: int(np.prod(grid)) for key, grid in images.items()}
    width = inner.config.text_config.hidden_size * base_model(policy.model).visual.dtype.itemsize
    features = 0 if train_vision else min(FEATURE_BYTES, sum(known.values()) // 4 * width)
    kept = 0 if cuda else min(CACHE_BYTES, sum(known.values()) * PATCH_BYTES)
    return Need(
        trained=trained,
        activations=activations(policy, packed, checkpointing=checkpointing, entropy_grad=entropy_grad)
        + (vision_activations(policy, patches) if train_vision else 0),
        vision=vision_peak(policy, patches),
        images=features + kept,
    )


def activations(policy: Policy, packed: Packed, *, checkpointing: bool, entropy_grad: bool) -> int:
    """Bytes at the peak of one forward and backward pass, beside weights, gradients and optimizer."""
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    image_token = unwrap(policy.model).config.image_token_id
    cuda = policy.device.type == "cuda"
    alive = Alive()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with FakeCopyMode(mode):
            model = copy.deepcopy(policy.model)
        if cuda:
            on_cpu(model)  # as far as shapes go a GPU's passes are a CPU's
        text = base_model(model).language_model
        model.train(checkpointing)
        if checkpointing:
            text.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            text.gradient_checkpointing_disable()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        patches = patches_of(packed)
        dtype = base_model(model).visual.dtype
        features = torch.zeros(patches // 4, text.config.hidden_size, dtype=dtype) if patches else None
        with alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=policy.config.dtype == "bfloat16"):
                states = packed_states(model, packed, features, image_token, grouped=cuda)
                targets = torch.from_numpy(packed.targets)
                logps, _ = token_logps(
                    unwrap(model).lm_head, states, targets, temperature=1.0, entropy=True, entropy_grad=entropy_grad
                )
            del states
            logps.sum().backward()
    return alive.peak


def on_cpu(model: torch.nn.Module) -> None:
    """Fake parameters and buffers of a GPU as those of a CPU; Module.to can't swap what has no data."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fresh = torch.nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad)
                module._parameters[name] = moved.setdefault(id(value), fresh)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device="cpu")


def patches_of(packed: Packed) -> int:
    return int(np.prod(packed.grids, axis=1).sum()) if len(packed.grids) else 0


def vision_peak(policy: Policy, patches: int) -> int:
    """Bytes at the widest point of a block without gradients: attention, or the gated MLP; and the patches."""
    visual = base_model(policy.model).visual
    config, size = visual.config, visual.dtype.itemsize
    widest = max(VISION_ATTENTION * config.hidden_size, VISION_MLP * config.intermediate_size + 2 * config.hidden_size)
    return patches * (widest * size + PATCH_BYTES)


def vision_activations(policy: Policy, patches: int) -> int:
    """Bytes that a tower which is being trained keeps for its backward pass; an estimate."""
    visual = base_model(policy.model).visual
    config, size = visual.config, visual.dtype.itemsize
    return patches * size * config.depth * (VISION_ATTENTION * config.hidden_size + 4 * config.intermediate_size)


def check(
    policy: Policy,
    conversations: Sequence[Conversation],
    plan: Sequence[Sequence[Unit]],
    *,
    token_budget: int,
    checkpointing: bool,
    free: int | None = None,
    **options,
) -> Need:
    """The need of a job's largest micro-batch. Raises UserError, naming what to lower, if that is clearly more than what is
    free; warns where it may be.

    plan: as sharing.plan gives it. free: bytes; None: what the device has. options: of `need`.
    """
    units = plan[0]
    rows = [conversations[i] for unit in units for i in unit.rows]
    place = iter(range(len(rows)))
    local = [Unit(tuple(next(place) for _ in unit.rows), unit.prefix) for unit in units]
    images = {key: grid for row in conversations for key, grid in zip(row.images, row.grids, strict=True)}
    options = {"every_image": images} | options
    found = need(policy, rows, local, checkpointing=checkpointing, **options)
    free = free_bytes(policy) if free is None else free
    if policy.device.type == "cpu" and found.total * HOLES > free:
        return_memory()
    if found.total <= free:
        return found
    if found.total <= MARGIN * free:
        log.warning("A training step may need %.1f GB, and %.1f are free.", found.total / GB, free / GB)
        return found
    tokens = sum(unit.prefix + sum(len(conversations[i].tokens) - unit.prefix for i in unit.rows) for unit in units)
    longest = max(len(row.tokens) for row in conversations)
    ways = []
    room = free - found.trained - found.images
    lower = int(tokens * room / found.activations) if found.activations > room > 0 else 0
    if lower >= longest:
        ways.append(f"train.token_budget from {token_budget} to {lower}")
    if not checkpointing:
        less = need(policy, rows, local, checkpointing=True, **options).total
        ways.append(f"activations, with train.gradient_checkpointing=true, to {less / GB:.1f} GB in all")
    if lower < longest:
        ways.append("images.max_pixels, conversation.max_turns, conversation.max_tokens or rollout.group_size")
    if found.trained > free / 2:
        ways.append("what is trained, with model.adaptation=lora or a smaller model.lora_rank")
    raise UserError(
        f"A training step needs {found.total / GB:.1f} GB beside the weights ({found.activations / GB:.1f} for activations "
        f"of {tokens} tokens, {found.trained / GB:.1f} for gradients and optimizer, {found.images / GB:.1f} for images), and "
        f"{free / GB:.1f} are free.",
        hint="Lower " + "; or ".join(ways) + ".",
    )


def free_bytes(policy: Policy) -> int:
    """What this process can still take; what it holds of the optimizer already is counted as free."""
    held = sum(
        value.nbytes
        for state in (policy.optimizer.state.values() if policy.optimizer else ())
        for value in state.values()
    )
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return free + cached + held
    import psutil

    return psutil.virtual_memory().available + held


def return_memory() -> None:
    """Let glibc give tensors of more than a megabyte back to the system when they are freed.

    Its own threshold grows up to 32 MB with the blocks that it sees freed, and what lies below stays with the process in
    holes: a step whose tensors took 340 MB held 760 to 800 MB. It is for where memory is short: pages that come and go
    made elementwise operations on 4 MB 2.3 times slower.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, LARGE)


def applies(policy: Policy) -> bool:
    """Not to weights of 4 bits or in shards: their operations have no shapes to go by."""
    return not (policy.config.load_in_4bit or policy.sharded)
