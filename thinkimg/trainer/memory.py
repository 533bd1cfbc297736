"""Memory check: the peak of a training step, predicted with tensors that have shapes and no data.

The job's own forward pass (forward/logprobs.Scorer) and its backward pass run on fake tensors, under transformers' code
for the model that config.json describes. The storages that are alive are added up, so that nothing is fitted. It needs
no weights, and the dry run can ask before anything runs (analysis/forecast.py). Recurrent layers go through a few
chunks of a sequence only (recurrence.py).

    weights        the loaded model; in a job it is there already, so not part of the total
    optimizer      gradients and AdamW's two moments of the trained parameters: 3 x 4 bytes each
    activations    most bytes alive in forward and backward of one micro-batch, with its images' features
    images         features of a frozen tower that the job's other images keep, and on a CPU all patches
    unsharded      FSDP2: two layers gathered (at work and next), embeddings and head gathered, and twice one layer's
                   gradients or those of the head; 4 bits: the largest matrix as the product takes it

torch's own MemTracker (torch.distributed._tools) gives the same peaks, but fails on frozen parameters as LoRA has them.
"""

import copy
import ctypes
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.models.family import Family, find_family
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.attention import use_attention
from thinkimg.trainer.forward.fsdp import get_local
from thinkimg.trainer.forward.logprobs import FEATURE_BYTES, Scorer
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.shared_prompts import Unit
from thinkimg.trainer.forward.vision import attend_lengths
from thinkimg.trainer.live_storages import LiveStorages
from thinkimg.trainer.micro_batches import count_tokens
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.policy import PolicyModel, add_adapter, build_empty, train_only
from thinkimg.trainer.recurrence import extrapolate
from thinkimg.trainer.rows import CACHE_BYTES, FLOAT_BYTES
from thinkimg.trainer.stepper import checkpoint_activations

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

GIB = 2**30
MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
LARGE = 2**20
HOLES = 2.5  # memory of a process / that of its tensors, as seen without `return_memory`
MARGIN = 1.15  # a step is refused if it needs more than this times what is free: predictions may be so far off
SHARDED = re.compile(r"\.language_model\.layers\.|embed_tokens\.weight$|lm_head\.weight$")  # see forward/fsdp.py
NF4_BYTES = 0.5 + 4 / 64  # of a weight in 4 bits, with a float32 scale for each 64


@dataclass(frozen=True)
class StepOptions:
    """Settings of a step that change its memory."""

    checkpointing: bool = False
    train_vision: bool = False
    entropy_grad: bool = False
    temperature: float = 1.0
    banned: bool = True
    """True if tokens are banned from being sampled: their logits are filled in a copy."""
    on_gpu: bool = False
    shards: int = 1
    """Processes over which the layers are spread (FSDP2)."""


@dataclass(frozen=True)
class Step:
    """A training step, by its largest micro-batch."""

    geometry: "PretrainedConfig"
    """Config of the base model."""
    model: ModelConfig
    rows: Sequence[Conversation]
    units: Sequence[Unit] | None
    """Packing of the rows; None: a padded batch."""
    options: StepOptions = StepOptions()
    job_grids: Mapping[str, np.ndarray] | None = None
    """Grids of all images of the job, by key; None: the rows' images are all."""

    @property
    def family(self) -> Family:
        """Family of the model."""
        return find_family(self.geometry.model_type)

    @property
    def patch_bytes(self) -> int:
        """Bytes of a patch, float32."""
        return FLOAT_BYTES * self.family.processor.patch_values

    @property
    def grids(self) -> dict[str, np.ndarray]:
        """Grids of the rows' images, by key."""
        return collect_grids(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, those of a shared prompt once and padding included."""
        return count_tokens(self.rows, self.units)


@dataclass(frozen=True)
class Requirement:
    """Bytes at the peak of a step; the module's docstring says of each part what it is."""

    weights: int
    optimizer: int
    activations: int
    images: int
    unsharded: int

    @property
    def total(self) -> int:
        """Bytes beside the weights."""
        return self.optimizer + self.activations + self.images + self.unsharded


def collect_grids(rows: Sequence[Conversation]) -> dict[str, np.ndarray]:
    """Return the grids of the rows' images, by key."""
    return {key: grid for row in rows for key, grid in zip(row.images, row.grids, strict=True)}


def predict(step: Step) -> Requirement:
    """Return the memory of a step. Draws nothing at random, so that a resumed job equals an uninterrupted one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = step.options
    images = (step.grids, step.grids if step.job_grids is None else step.job_grids)
    own, every = (sum(int(np.prod(grid)) for grid in grids.values()) for grids in images)  # patches
    model = build_meta(step)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # as far as shapes go a GPU's passes are a CPU's
        unwrap(model).tie_weights()
        trained = train_only(model, step.model, vision=options.train_vision)
        visual, layers = get_base_model(model).visual, get_base_model(model).language_model.layers
        layer = max((list(layer.parameters()) for layer in layers), key=lambda own: sum(p.nbytes for p in own))
        feature = step.family.feature_width(step.geometry) * visual.dtype.itemsize  # of a token
        cell = step.family.processor.merge**2  # patches of a token
        features = 0 if options.train_vision else min(FEATURE_BYTES, every // cell * feature) - own // cell * feature
        unsharded = max(2 * p.numel() for p in layer) if step.model.load_in_4bit else 0
        if options.shards > 1:
            tables = [get_base_model(model).get_input_embeddings().weight, unwrap(model).lm_head.weight]
            gradients = [sum(4 * p.numel() for p in group if p.requires_grad) for group in (layer, tables[1:])]
            unsharded = 2 * sum(p.nbytes for p in layer) + sum(p.nbytes for p in tables) + 2 * max(gradients)
        return Requirement(
            weights=int(sum(count_weight_bytes(step, name, p) for name, p in model.named_parameters())),
            optimizer=sum(3 * 4 * count_local_elements(name, p, options.shards) for name, p in trained.items()),
            activations=measure_activations(step, model),
            images=max(features, 0) + (0 if options.on_gpu else min(CACHE_BYTES, every * step.patch_bytes)),
            unsharded=unsharded,
        )


def build_meta(step: Step) -> "PreTrainedModel":
    """Return the model that would be loaded and adapted, on the meta device."""
    model = build_empty(copy.deepcopy(step.geometry), step.model)
    step.family.prepare(model)
    if step.model.adaptation == "lora":
        with torch.device("meta"):
            model = add_adapter(model, step.model)
    replace_tower(get_base_model(model).visual, step.family)
    use_packed_attention(unwrap(model))
    return model.eval()


def replace_tower(visual: torch.nn.Module, family: Family) -> None:
    """Replace what depends on data in a vision tower: chunks of attention, whose number hardly changes the memory."""
    use_attention(visual.config, "thinkimg_flash_halves", attend_halves)
    forward = visual.forward

    def run(patches: Tensor, grid_thw: Tensor):
        return forward(patches, None, **family.tower_inputs(visual, len(patches)))

    visual.forward = run


def attend_halves(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float, **_: object):
    """Attend as vision.attend_chunks, in chunks of two lengths; the true lengths depend on data."""
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)
    halves = torch.arange(stacked.shape[1]).tensor_split(2)
    return attend_lengths(stacked, halves, [len(half) for half in halves], scaling)[None], None


def measure_activations(step: Step, model: "PreTrainedModel") -> int:
    """Return the most bytes alive in forward and backward of the micro-batch, beside weights, gradients and patches."""
    options = step.options
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    dtype = get_base_model(model).visual.dtype if options.on_gpu else torch.float32
    pixels = {
        k: torch.zeros(int(np.prod(grid)), step.family.processor.patch_values, dtype=dtype)
        for k, grid in step.grids.items()
    }
    features, banned = None if options.train_vision else {}, (0,) if options.banned else ()
    scorer = Scorer(model, pixels.__getitem__, temperature=options.temperature, banned=banned, features=features)
    scorer.on_gpu = options.on_gpu
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live = LiveStorages([*model.parameters(), *model.buffers(), *gradients, *pixels.values()])
    with live, extrapolate(step.family), checkpoint_activations(model, options.checkpointing):
        with torch.autocast("cpu", torch.bfloat16, enabled=step.model.precision == "bfloat16"):
            logps, _ = scorer(step.rows, step.units, entropy=True, entropy_grad=options.entropy_grad)
        logps.sum().backward()
    return live.peak


def count_local_elements(name: str, parameter: Tensor, shards: int) -> int:
    """Return the elements of a parameter that one process holds."""
    return -(-parameter.numel() // shards) if SHARDED.search(name) else parameter.numel()


def count_weight_bytes(step: Step, name: str, parameter: Tensor) -> float:
    """Return the bytes of a parameter that one process holds."""
    in_4bit = ".language_model.layers." in name and parameter.dim() == 2 and "lora_" not in name
    itemsize = NF4_BYTES if step.model.load_in_4bit and in_4bit else parameter.itemsize
    return count_local_elements(name, parameter, step.options.shards) * itemsize


def check(step: Step, free: int) -> Requirement:
    """Return the memory of a step. free: bytes.

    Raises UserError, naming what to lower, if the step needs clearly more than is free; warns if it may.
    """
    needed = predict(step)
    if not step.options.on_gpu and needed.total * HOLES > free:
        return_memory()
    if needed.total <= free:
        return needed
    if needed.total <= MARGIN * free:
        log.warning("A training step may need %.1f GiB, and %.1f GiB are free.", needed.total / GIB, free / GIB)
        return needed
    raise UserError(
        f"A training step needs {needed.total / GIB:.1f} GiB beside the weights, and {free / GIB:.1f} GiB are free: "
        f"{needed.activations / GIB:.1f} GiB for activations of {step.tokens} tokens, "
        f"{needed.optimizer / GIB:.1f} GiB for gradients and optimizer, {needed.images / GIB:.1f} GiB for images.",
        hint="Lower " + "; or ".join(suggest(step, needed, free)) + ".",
    )


def check_job(passes: Passes, shares: Sequence[Sequence[int]], options: StepOptions) -> dict[str, float]:
    """Check the largest micro-batch of this process's shares, if its policy has passed the check with none as large.

    options: checkpointing and entropy_grad. Returns metrics. Raises UserError as `check`.
    """
    policy, scorer = passes.policy, passes.scorer
    batches = [batch for share in shares if share for batch in passes.split(share)]
    rows, units = max(batches, key=lambda batch: count_tokens(*batch), default=((), None))
    if not rows or count_tokens(rows, units) <= policy.checked_tokens:
        return {}
    options = replace(
        options,
        train_vision=scorer.features is None,
        temperature=scorer.temperature,
        banned=scorer.banned is not None,
        on_gpu=scorer.on_gpu,
        shards=passes.ranks.count if policy.sharded else 1,
    )
    every_image = collect_grids([row.conversation for row in passes.rows])
    step = Step(unwrap(policy.model).config, policy.config, rows, units, options, every_image)
    needed = check(step, measure_free_bytes(policy))
    policy.checked_tokens = step.tokens
    return {"predicted_memory_mb": needed.total / 2**20}


def suggest(step: Step, needed: Requirement, free: int) -> list[str]:
    """Return the settings that a user can lower, each with its effect."""
    suggestions = []
    longest = max(len(row.tokens) for row in step.rows)
    room = free - (needed.total - needed.activations)
    budget = int(step.tokens * room / needed.activations) if needed.activations > room > 0 else 0
    if budget >= longest:
        suggestions.append(f"train.token_budget to {budget}")
    if not step.options.checkpointing:
        less = predict(replace(step, options=replace(step.options, checkpointing=True))).total
        suggestions.append(f"activations, with train.gradient_checkpointing=true, to {less / GIB:.1f} GiB in all")
    if budget < longest:
        suggestions.append("images.max_pixels, conversation.max_turns, conversation.max_tokens or rollout.group_size")
    if needed.optimizer > free / 2:
        suggestions.append("the trained parameters, with model.adaptation=lora or a smaller model.lora_rank")
    return suggestions


def measure_free_bytes(policy: PolicyModel) -> int:
    """Return the bytes that this process can still take; its optimizer's own count as free."""
    states = policy.optimizer.state.values() if policy.optimizer else ()
    own = sum(get_local(value).nbytes for state in states for value in state.values())
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return free + cached + own
    return psutil.virtual_memory().available + own


def return_memory() -> None:
    """Let glibc give tensors of more than a megabyte back to the system when they are freed.

    Its own threshold grows up to 32 MB with the blocks that it sees freed. Smaller blocks stay with the process in
    holes: a step whose tensors took 340 MB held 760 to 800 MB. Use it only if memory is short. Pages that come and go
    made elementwise operations on 4 MB 2.3 times slower.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, LARGE)
