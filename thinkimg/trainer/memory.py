"""Memory check: the peak of a training step, predicted with tensors that have shapes and no data.

The job's own forward pass (forward/logprobs.Scorer) and its backward pass run on fake tensors, under transformers' code
for the model that config.json describes. The storages that are alive are added up, so that nothing is fitted. It needs
no weights, and the dry run can ask before anything runs (analysis/forecast.py). Recurrent layers go through a few
chunks of a sequence only (recurrence.py). One pass tells the peak for each number of layers that recompute their
activations (layer_trace.py); `plan` takes the fewest that fit.

    weights        the loaded model; in a job it is there already, so not part of the total
    optimizer      gradients and AdamW's two moments of the trained parameters: 3 x 4 bytes each
    activations    most bytes alive in forward and backward of one micro-batch, with its images' features
    patches        on a CPU those of all images, up to the limit of their cache
    features       those of a frozen tower that are kept of the job's other images, if these come again
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
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.models.family import Family, find_family
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.attention import use_attention
from thinkimg.trainer.forward.free_memory import measure_free
from thinkimg.trainer.forward.fsdp import get_local
from thinkimg.trainer.forward.logprobs import CPU_SHARE, GPU_SHARE, Scorer
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.shared_prompts import Unit
from thinkimg.trainer.forward.vision import attend_lengths
from thinkimg.trainer.layer_trace import LayerTrace
from thinkimg.trainer.live_storages import LiveStorages
from thinkimg.trainer.micro_batches import count_tokens
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.policy import PolicyModel, add_adapter, build_empty, train_only
from thinkimg.trainer.recurrence import extrapolate
from thinkimg.trainer.rows import CACHE_BYTES, FLOAT_BYTES
from thinkimg.trainer.settings import Recomputation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

GIB = 2**30
MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
LARGE = 2**20
HOLES = 2.5  # memory of a process / that of its tensors, as seen without `return_memory`
# Predictions may be so far off. A step is refused if it needs more than this times what is free, and layers keep their
# activations while a step needs less than what is free divided by this.
MARGIN = 1.15
SHARDED = re.compile(r"\.language_model\.layers\.|embed_tokens\.weight$|lm_head\.weight$")  # see forward/fsdp.py
NF4_BYTES = 0.5 + 4 / 64  # of a weight in 4 bits, with a float32 scale for each 64


@dataclass(frozen=True)
class StepOptions:
    """Settings of a step that change its memory."""

    checkpointing: Recomputation = False
    images_again: bool = True
    """True if images come more than once, so that features of a frozen tower are worth their memory."""
    train_vision: bool = False
    entropy_grad: bool = False
    temperature: float = 1.0
    banned: bool = True
    """True if tokens are banned from being sampled: their logits are filled in a copy."""
    on_gpu: bool = False
    shards: int = 1
    """Processes over which the layers are spread (FSDP2)."""

    @property
    def feature_share(self) -> float:
        """Share of the memory beside a step that features of a frozen tower may take."""
        return GPU_SHARE if self.on_gpu else CPU_SHARE


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
    patches: int
    features: int
    unsharded: int
    layers: int
    """Decoder layers that recompute their activations."""

    @property
    def images(self) -> int:
        """Bytes of patches and kept features."""
        return self.patches + self.features

    @property
    def total(self) -> int:
        """Bytes beside the weights."""
        return self.optimizer + self.activations + self.images + self.unsharded


@dataclass(frozen=True)
class StepCosts:
    """Bytes of a step for each number of layers that recompute, and for any features that are kept."""

    weights: int
    optimizer: int
    activations: tuple[int, ...]
    """By the number of layers that recompute, from none to all."""
    patches: int
    features: int
    """Of a frozen tower, of all the job's other images; 0 if none comes again."""
    unsharded: int

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.activations) - 1

    def require(self, layers: int, features: int = 0) -> Requirement:
        """Return what a step takes if so many layers recompute. features: bytes that are kept of other images."""
        return Requirement(
            self.weights, self.optimizer, self.activations[layers], self.patches, features, self.unsharded, layers
        )


def collect_grids(rows: Sequence[Conversation]) -> dict[str, np.ndarray]:
    """Return the grids of the rows' images, by key."""
    return {key: grid for row in rows for key, grid in zip(row.images, row.grids, strict=True)}


def plan(costs: StepCosts, options: StepOptions, free: float) -> Requirement:
    """Return what a step takes with the fewest recomputing layers that the options allow and that fit, else with all.

    Kept features come first: a gigabyte of them saves more work than one of activations, if images come again.
    """
    choices: dict[Recomputation, Sequence[int]]
    choices = {False: [0], True: [costs.layers], "auto": range(costs.layers + 1)}
    numbers = choices[options.checkpointing]
    room = free - costs.require(numbers[-1]).total
    features = int(min(costs.features, max(0, options.feature_share * room)))
    steps = [costs.require(layers, features) for layers in numbers]
    return next((step for step in steps if step.total * MARGIN <= free), steps[-1])


def measure(step: Step) -> StepCosts:
    """Return the costs of a step. Draws nothing at random, so that a resumed job equals an uninterrupted one."""
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
        kept = options.images_again and not options.train_vision
        unsharded = max(2 * p.numel() for p in layer) if step.model.load_in_4bit else 0
        if options.shards > 1:
            tables = [get_base_model(model).get_input_embeddings().weight, unwrap(model).lm_head.weight]
            gradients = [sum(4 * p.numel() for p in group if p.requires_grad) for group in (layer, tables[1:])]
            unsharded = 2 * sum(p.nbytes for p in layer) + sum(p.nbytes for p in tables) + 2 * max(gradients)
        return StepCosts(
            weights=int(sum(count_weight_bytes(step, name, p) for name, p in model.named_parameters())),
            optimizer=sum(3 * 4 * count_local_elements(name, p, options.shards) for name, p in trained.items()),
            activations=measure_activations(step, model),
            patches=0 if options.on_gpu else min(CACHE_BYTES, every * step.patch_bytes),
            features=kept * max(0, every - own) // cell * feature,
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
    order = torch.arange(stacked.shape[1])
    return attend_lengths(stacked, halves, [len(half) for half in halves], order, scaling)[None], None


def measure_activations(step: Step, model: "PreTrainedModel") -> tuple[int, ...]:
    """Return the most bytes alive in forward and backward of the micro-batch, beside weights, gradients and patches.

    By the number of layers that recompute, from none to all.
    """
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
    trace, narrow = LayerTrace(live, get_base_model(model).language_model.layers), step.model.precision == "bfloat16"
    with live, extrapolate(step.family), trace.record():
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logps, _ = scorer(step.rows, step.units, entropy=True, entropy_grad=options.entropy_grad)
        trace.begin("computed")
        logps.sum().backward()
    return trace.peaks(cached=narrow)


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
    costs = measure(step)
    needed = plan(costs, step.options, free)
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
        hint="Lower " + "; or ".join(suggest(step, costs, needed, free)) + ".",
    )


def check_job(passes: Passes, shares: Sequence[Sequence[int]], options: StepOptions) -> tuple[int, dict[str, float]]:
    """Check the largest micro-batch of each process's shares; return how many layers recompute, and metrics.

    All processes call it. Layers recompute in all as many as in the one that asks for most. On a CPU, where nothing is
    to be chosen, a policy that has passed the check with a micro-batch as large is not checked again.
    options: checkpointing, entropy_grad and images_again. Raises UserError as `check`.
    """
    policy, ranks = passes.policy, passes.ranks
    needed = ranks.together(lambda: _check_own(passes, shares, options))
    layers = max(step.layers if step else 0 for step in ranks.gather(needed))
    if options.checkpointing is True:
        layers = len(get_base_model(policy.model).language_model.layers)
    metrics = {"recomputed_layers": float(layers)}
    return layers, metrics | ({"predicted_memory_mb": needed.total / 2**20} if needed else {})


def _check_own(passes: Passes, shares: Sequence[Sequence[int]], options: StepOptions) -> Requirement | None:
    """Check this process's largest micro-batch, and limit the features that its scorer keeps."""
    policy, scorer = passes.policy, passes.scorer
    batches = [batch for share in shares if share for batch in passes.split(share)]
    rows, units = max(batches, key=lambda batch: count_tokens(*batch), default=((), None))
    fixed = options.checkpointing != "auto" and not scorer.on_gpu
    if not rows or (fixed and count_tokens(rows, units) <= policy.checked_tokens):
        return None
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
    free = measure_free_bytes(policy)
    needed = check(step, free)
    policy.checked_tokens = max(step.tokens, policy.checked_tokens)
    scorer.feature_limit = needed.features + int(options.feature_share * max(0, free - MARGIN * needed.total))
    return needed


def suggest(step: Step, costs: StepCosts, needed: Requirement, free: int) -> list[str]:
    """Return the settings that a user can lower, each with its effect."""
    suggestions = []
    longest = max(len(row.tokens) for row in step.rows)
    room = free - (needed.total - needed.activations)
    budget = int(step.tokens * room / needed.activations) if needed.activations > room > 0 else 0
    if budget >= longest:
        suggestions.append(f"train.token_budget to {budget}")
    if step.options.checkpointing is False:
        less = plan(costs, replace(step.options, checkpointing=True), free).total
        suggestions.append(f"activations, with train.gradient_checkpointing=auto, to {less / GIB:.1f} GiB in all")
    if budget < longest:
        suggestions.append("images.max_pixels, conversation.max_turns, conversation.max_tokens or rollout.group_size")
    if needed.optimizer > free / 2:
        suggestions.append("the trained parameters, with model.adaptation=lora or a smaller model.lora_rank")
    return suggestions


def measure_free_bytes(policy: PolicyModel) -> int:
    """Return the bytes that this process can still take; its optimizer's own count as free."""
    states = policy.optimizer.state.values() if policy.optimizer else ()
    own = sum(get_local(value).nbytes for state in states for value in state.values())
    return measure_free(policy.device) + own


def return_memory() -> None:
    """Let glibc give tensors of more than a megabyte back to the system when they are freed.

    Its own threshold grows up to 32 MB with the blocks that it sees freed. Smaller blocks stay with the process in
    holes: a step whose tensors took 340 MB held 760 to 800 MB. Use it only if memory is short. Pages that come and go
    made elementwise operations on 4 MB 2.3 times slower.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, LARGE)
