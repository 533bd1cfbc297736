"""Memory preflight: the peak of a training step, found by going through it with tensors that have shapes and no data.

Each operation of the forward and backward pass runs on fake tensors, under transformers' own code for the model that its
config.json describes, and the storages that are alive are added up: LoRA or full, checkpointed or not, packed or padded,
nothing is fitted or guessed. No weights are needed, so that it can be asked before anything runs (analysis/forecast.py).

    weights       what the loaded model takes; known to be there in a job, so not part of the total
    trained       gradients and AdamW's two moments of what is trained: 3 x 4 bytes a parameter
    activations   what is alive at the widest point of forward and backward of one micro-batch: what the backward pass of each
                  layer needs, or with checkpointing each layer's input and what one layer needs; the head's logits, a slice
                  at a time; the concatenated features; the copies that autocast makes of weights
    vision        the same of the tower over the micro-batch's new images, where it is frozen: patches and one block
    images        features of a frozen tower that are kept, and on a CPU the patches
    gathered      FSDP2: two layers whole (the one at work and the next), and twice one layer's gradients;
                  4 bits: the largest matrix as the product takes it
"""

import copy
import ctypes
import logging
import platform
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinkimg.errors import UserError
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.checkpoint import Policy, adapt, train_only
from thinkimg.trainer.forward.flex import bucket
from thinkimg.trainer.forward.fsdp import local
from thinkimg.trainer.forward.logprobs import (
    FEATURE_BYTES,
    Scorer,
    base_model,
    batch_tensors,
    hidden_states,
    packed_states,
    token_logps,
    unwrap,
)
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.shared_prompts import Unit, pack, pad
from thinkimg.trainer.forward.vision import attend_several
from thinkimg.trainer.optimise import Ranks, computed
from thinkimg.trainer.rows import CACHE_BYTES, PATCH_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2_5_VLConfig

log = logging.getLogger(__name__)

GB = 2**30
MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
LARGE = 2**20
HOLES = 2.5  # what a process was seen to hold, by what its tensors took, before `return_memory`
MARGIN = 1.15  # refused is what needs more than this times what is free: so far off may a prediction be
SHAPES = "thinkimg_flash_shapes"
NF4_BYTES = 0.5 + 4 / 64  # of a weight in 4 bits, with a float32 scale for each 64


@dataclass(frozen=True)
class How:
    """What else than the micro-batch decides about a step's memory."""

    checkpointing: bool = False
    train_vision: bool = False
    entropy_grad: bool = False
    temperature: float = 1.0
    banned: bool = True
    """Whether tokens are banned from being sampled: their logits are filled in a copy."""
    cuda: bool = False
    processes: int = 1
    """Over which the layers are spread (FSDP2)."""


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a step; see the module."""

    weights: int
    trained: int
    activations: int
    vision: int
    images: int
    gathered: int

    @property
    def total(self) -> int:
        """Beside the weights."""
        return self.trained + self.images + self.gathered + max(self.activations, self.vision)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make while they live; peak: the most at a time.

    given: tensors that are there before and are counted elsewhere; operations return views of them, or change them in place.
    """

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._given = [tensor.untyped_storage() for tensor in given]  # kept, so that no other gets one's id
        self._known = {id(storage) for storage in self._given}

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
    config: "Qwen2_5_VLConfig",
    model: ModelConfig,
    rows: Sequence[Conversation],
    units: Sequence[Unit] | None,
    how: How,
    every_image: dict[str, np.ndarray] | None = None,
) -> Need:
    """Of a step whose largest micro-batch is this one. config: the base model's. units: how the rows are packed; None: a
    padded batch. every_image: key -> grid of all images of the job; None: those of the rows."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    images = {key: grid for row in rows for key, grid in zip(row.images, row.grids, strict=True)}
    patches, known = (sum(int(np.prod(grid)) for grid in some.values()) for some in (images, every_image or images))
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = shapes(config, model)
        parameters = train_only(policy, model, vision=how.train_vision)
        visual = base_model(policy).visual
        feature = visual.config.out_hidden_size * visual.dtype.itemsize
        kept = 0 if how.train_vision else min(FEATURE_BYTES, known // 4 * feature)
        return Need(
            weights=weights(policy, model, how),
            trained=sum(3 * 4 * held(name, p, how) for name, p in parameters.items()),
            images=kept + (0 if how.cuda else min(CACHE_BYTES, known * PATCH_BYTES)),
            gathered=gathered(policy, model, how),
            **peaks(policy, model, rows, units, how, patches),
        )


def shapes(config: "Qwen2_5_VLConfig", model: ModelConfig) -> "PreTrainedModel":
    """The model that would be loaded and adapted, within a FakeTensorMode: its parameters take no memory."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

    dtype = torch.float32 if model.adaptation == "full" else getattr(torch, model.dtype)
    with unset_fake_temporarily(), torch.device("meta"):
        made = Qwen2_5_VLForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
        AttentionInterface.register(SHAPES, attend_shapes)
        made.model.visual.config._attn_implementation = SHAPES
        use_packed_attention(made)
        if model.adaptation == "lora":
            made = adapt(made, model)
    on_cpu(made)
    return made.eval()


def attend_shapes(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float, **_: object):
    """vision.attend_chunks with chunks of two lengths: which they are depends on data, what they take does not."""
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)
    where = torch.arange(stacked.shape[1]).tensor_split(2)
    return attend_several(stacked, where, [len(index) for index in where], scaling)[None], None


def on_cpu(model: torch.nn.Module) -> None:
    """Parameters and buffers without data as those of a CPU: as far as shapes go a GPU's passes are a CPU's."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fresh = torch.nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad)
                module._parameters[name] = moved.setdefault(id(value), fresh)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device="cpu")


def peaks(
    policy: "PreTrainedModel",
    model: ModelConfig,
    rows: Sequence[Conversation],
    units: Sequence[Unit] | None,
    how: How,
    patches: int,
) -> dict[str, int]:
    """`vision` and `activations`: of the tower's forward pass, and of the step's, the tower's with it where it is trained."""
    base = base_model(policy)
    if how.checkpointing:
        base.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    given = [*policy.parameters(), *policy.buffers(), *(p.grad for p in policy.parameters() if p.requires_grad)]
    alive, tower = Alive(given), Alive(given)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == "bfloat16")
    with autocast:
        features = None
        if patches:
            with torch.set_grad_enabled(how.train_vision), alive if how.train_vision else tower:
                features = encode(base.visual, patches, cuda=how.cuda)
        with alive:
            states, targets = forward(policy, rows, units, features, how)
            logps, _ = token_logps(
                unwrap(policy).lm_head, states, targets, temperature=how.temperature, entropy=True,
                banned=torch.arange(1) if how.banned else None, entropy_grad=how.entropy_grad,
            )  # fmt: skip
            del states, features
    with alive:
        logps.sum().backward()
    return {"vision": tower.peak, "activations": alive.peak}


def encode(visual: torch.nn.Module, patches: int, *, cuda: bool) -> Tensor:
    """The tower's forward pass without the windows, which depend on data: (patches // 4, hidden)."""
    config = visual.config
    flat = torch.zeros(patches, PATCH_BYTES // 4, dtype=visual.dtype if cuda else torch.float32).to(visual.dtype)
    hidden = visual.patch_embed(flat)
    hidden = hidden.index_select(0, torch.arange(patches))  # by windows
    angles = torch.zeros(2, patches, config.hidden_size // config.num_heads).unbind(0)
    ends = torch.zeros(2, dtype=torch.int32)
    for block in visual.blocks:
        hidden = block(hidden, cu_seqlens=ends, max_seqlen=patches, position_embeddings=angles)
    return visual.merger(hidden).index_select(0, torch.arange(patches // 4))


def forward(
    policy: "PreTrainedModel",
    rows: Sequence[Conversation],
    units: Sequence[Unit] | None,
    features: Tensor | None,
    how: How,
) -> tuple[Tensor, Tensor]:
    """As Scorer makes it: states and targets of the scored tokens. features: of the unique images."""
    image_token = unwrap(policy).config.image_token_id
    packed = None if units is None else pack(rows, units, image_token)
    if features is not None:
        sequences = [packed.tokens] if packed else [row.tokens for row in rows]
        count = sum(int((tokens == image_token).sum()) for tokens in sequences)
        features = features.index_select(0, torch.zeros(count, dtype=torch.int64))
    if packed is None:
        batch = batch_tensors(rows, image_token, 0, "cpu")
        return hidden_states(policy, batch, features, image_token), batch["tokens"][batch["row"], batch["column"]]
    if how.cuda:
        packed = pad(packed, bucket(len(packed.tokens)), 0)
    return packed_states(policy, packed, features, image_token, grouped=how.cuda), torch.from_numpy(packed.targets)


def held(name: str, parameter: Tensor, how: How) -> int:
    """Elements of a parameter that one process holds."""
    return -(-parameter.numel() // how.processes) if ".language_model.layers." in name else parameter.numel()


def weights(policy: "PreTrainedModel", model: ModelConfig, how: How) -> int:
    small = {
        name
        for name, p in policy.named_parameters()
        if model.load_in_4bit and ".language_model.layers." in name and p.dim() == 2 and "lora_" not in name
    }
    sizes = {name: NF4_BYTES if name in small else p.itemsize for name, p in policy.named_parameters()}
    return int(sum(held(name, p, how) * sizes[name] for name, p in policy.named_parameters()))


def gathered(policy: "PreTrainedModel", model: ModelConfig, how: How) -> int:
    layer = list(base_model(policy).language_model.layers[0].parameters())
    if how.processes > 1:
        return 2 * sum(p.nbytes for p in layer) + 2 * sum(4 * p.numel() for p in layer if p.requires_grad)
    return max(2 * p.numel() for p in layer) if model.load_in_4bit else 0


def check(
    config: "Qwen2_5_VLConfig",
    model: ModelConfig,
    rows: Sequence[Conversation],
    units: Sequence[Unit] | None,
    how: How,
    *,
    token_budget: int,
    free: int,
    every_image: dict[str, np.ndarray] | None = None,
) -> Need:
    """The need of a job's largest micro-batch, as `need`. Raises UserError, naming what to lower, if that is clearly more
    than what is free (bytes); warns where it may be."""
    found = need(config, model, rows, units, how, every_image)
    if not how.cuda and found.total * HOLES > free:
        return_memory()
    if found.total <= free:
        return found
    if found.total <= MARGIN * free:
        log.warning("A training step may need %.1f GB, and %.1f are free.", found.total / GB, free / GB)
        return found
    raise UserError(
        f"A training step needs {found.total / GB:.1f} GB beside the weights ({found.activations / GB:.1f} for activations "
        f"of {computed(rows, units)} tokens, {found.trained / GB:.1f} for gradients and optimizer, "
        f"{found.images / GB:.1f} for images), and {free / GB:.1f} are free.",
        hint="Lower " + "; or ".join(ways(config, model, rows, units, how, found, token_budget, free)) + ".",
    )


def check_job(
    policy: Policy,
    scorer: Scorer,
    conversations: Sequence[Conversation],
    batches: Sequence[tuple[Sequence[Conversation], Sequence[Unit] | None]],
    ranks: Ranks,
    *,
    token_budget: int,
    checkpointing: bool,
    entropy_grad: bool = False,
) -> dict[str, float]:
    """Check the largest of this process's micro-batches (rows, units), if it is larger than what was checked before with
    this policy; returns metrics. conversations: all of the job, for their images."""
    rows, units = max(batches, key=lambda batch: computed(*batch), default=((), None))
    if not rows or computed(rows, units) <= policy.fits:
        return {}
    how = How(
        checkpointing=checkpointing, train_vision=scorer.features is None, entropy_grad=entropy_grad,
        temperature=scorer.temperature, banned=scorer.banned is not None, cuda=policy.device.type == "cuda",
        processes=ranks.count if policy.sharded else 1,
    )  # fmt: skip
    images = {key: grid for row in conversations for key, grid in zip(row.images, row.grids, strict=True)}
    config, free = unwrap(policy.model).config, free_bytes(policy)
    found = check(config, policy.config, rows, units, how, token_budget=token_budget, free=free, every_image=images)
    policy.fits = computed(rows, units)
    return {"predicted_memory_mb": found.total / 2**20}


def ways(config, model, rows, units, how: How, found: Need, token_budget: int, free: int) -> list[str]:
    """What a user can lower."""
    ways = []
    tokens, longest = computed(rows, units), max(len(row.tokens) for row in rows)
    room = free - found.trained - found.images - found.gathered
    lower = int(tokens * room / found.activations) if found.activations > room > 0 else 0
    if lower >= longest:
        ways.append(f"train.token_budget from {token_budget} to {lower}")
    if not how.checkpointing:
        less = need(config, model, rows, units, replace(how, checkpointing=True)).total
        ways.append(f"activations, with train.gradient_checkpointing=true, to {less / GB:.1f} GB in all")
    if lower < longest:
        ways.append("images.max_pixels, conversation.max_turns, conversation.max_tokens or rollout.group_size")
    if found.trained > free / 2:
        ways.append("what is trained, with model.adaptation=lora or a smaller model.lora_rank")
    return ways


def free_bytes(policy: Policy) -> int:
    """What this process can still take; what it holds of the optimizer already is counted as free."""
    states = policy.optimizer.state.values() if policy.optimizer else ()
    own = sum(local(value).nbytes for state in states for value in state.values())
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return free + cached + own

    return psutil.virtual_memory().available + own


def return_memory() -> None:
    """Let glibc give tensors of more than a megabyte back to the system when they are freed.

    Its own threshold grows up to 32 MB with the blocks that it sees freed, and what lies below stays with the process in
    holes: a step whose tensors took 340 MB held 760 to 800 MB. It is for where memory is short: pages that come and go
    made elementwise operations on 4 MB 2.3 times slower.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, LARGE)
