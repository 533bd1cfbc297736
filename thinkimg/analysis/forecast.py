"""Forecast before anything runs: memory of a training step, for rows as long as the config allows, and of the engine;
and the disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import psutil

from thinkimg.analysis.disk_forecast import forecast_policies
from thinkimg.analysis.engine_memory import CONTEXT, RESIDUE, predict_engine
from thinkimg.config.tree import Config
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.models import tiny
from thinkimg.models.family import find_family, load_family
from thinkimg.models.family_check import check_experts
from thinkimg.trainer import memory
from thinkimg.trainer.client import read_accelerate_settings
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.micro_batches import count_tokens, split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FRAGMENTED = 1.05  # what an allocator takes for what it is asked
LETTERS_PER_TOKEN = 3  # of the system prompt, at least


def forecast_needs(config: Config) -> str:
    """Return a line each for trainer, engine and disk: what they take, what there is, and the settings to change.

    Raises UserError where settings name a GPU that is not there.
    """
    if gpu_memory() is not None:
        config.where.check_devices()
    try:
        base = base_config(config)
    except OSError:
        return f"memory         unknown: the config.json of {config.model.path} is not available"
    lines, gpu = [forecast_trainer(config, base)], gpu_memory(config.where.engine.devices)
    if gpu is not None and not config.where.engine.urls:
        lines.append(forecast_engine(config, base, gpu[1]))
    return "\n".join([*lines, forecast_policies(config, base)])


def forecast_trainer(config: Config, base: "PretrainedConfig") -> str:
    """Return one line: the memory of a step, the free memory, and the settings to lower if it does not fit."""
    costs, step = measure_largest(config, base)
    free = free_memory(config)
    plan = memory.plan(costs, step.options, free - costs.weights)
    needed = int(plan.total * FRAGMENTED)
    total, weights = (f"{size / memory.GIB:.1f} GiB" for size in (needed, costs.weights))
    line = f"memory         a step of {step.tokens} tokens takes up to {total} beside {weights} of weights"
    line += f" ({plan.layers} of {costs.layers} layers computed again)" if plan.layers else ""
    there = f"{free / memory.GIB:.1f} GiB of {'main memory' if gpu_memory() is None else 'the GPU'}"
    if needed <= free - costs.weights:
        return f"{line}: fits in {there}"
    lower = "train.token_budget, rollout.group_size, conversation.max_turns, images.max_pixels"
    lower += "" if config.train.gradient_checkpointing else "; or set train.gradient_checkpointing=auto"
    return f"{line}, but only {there} are free: lower {lower}"


def forecast_engine(config: Config, base: "PretrainedConfig", gpu: int) -> str:
    """Return one line: what the engine's share of a GPU holds, or what to change if it holds no conversation."""
    engine = predict_engine(config, base, gpu)
    share, weights, cache = (f"{size / memory.GIB:.1f} GiB" for size in (engine.share, engine.weights, engine.cache))
    line = f"engine         a share of {share} holds {weights} of weights"
    if engine.conversations == 0:
        change = "raise where.engine.gpu_memory_utilization or where.engine.tensor_parallel_size"
        return f"{line}, and no conversation of {engine.max_tokens} tokens: {change}, or lower conversation.max_tokens"
    return f"{line} and {cache} of key-value cache: {engine.conversations} conversations of {engine.max_tokens} tokens"


def measure_largest(config: Config, base: "PretrainedConfig") -> tuple[memory.StepCosts, memory.Step]:
    """Return the costs of the largest possible micro-batch, and the step."""
    image_token = ImageToken.of(base)
    rows, groups = longest_rows(config, image_token)
    groups = groups if config.train.shared_prompts else None
    batches = [
        ([rows[i] for i in batch.rows], batch.units)
        for batch in split(rows, groups, config.train.token_budget, image_token)
    ]
    options = memory.StepOptions(
        checkpointing=config.train.gradient_checkpointing,
        images_again=config.train.scores_again,
        train_vision=config.model.train_vision,
        entropy_grad=config.train.loss.entropy_coef != 0,
        temperature=config.rollout.temperature,
        on_gpu=gpu_memory() is not None,
        shards=count_shards(config),
    )
    tool_images = min(config.conversation.max_turns, config.conversation.max_images) - 1  # of a row
    count = config.rollout.samples * (1 + config.rollout.group_size * tool_images)
    images = dict.fromkeys(map(str, range(count)), largest_grid(config))
    step = memory.Step(base, config.model, *max(batches, key=lambda batch: count_tokens(*batch)), options, images)
    return memory.measure(step), step


def base_config(config: Config) -> "PretrainedConfig":
    """Return the base model's config.json; a tiny one's from its settings.

    Raises OSError if it is not available, and UserError for a model that can't be trained as the config says.
    """
    if config.model.tiny is not None:
        first = config.model.tiny.vocab_size - len(tiny.SPECIAL_TOKENS)
        ids = {token: first + i for i, token in enumerate(tiny.SPECIAL_TOKENS)}
        return load_family(config.model.tiny.family).make_config(config.model.tiny, ids)
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    check_experts(find_family(model.model_type), model.model_type, config.model)
    return model


def largest_grid(config: Config) -> np.ndarray:
    """Return the grid of patches of the largest picture."""
    view = config.view()
    return np.array([1, view.merge, view.merge * view.most_tokens])


def longest_rows(config: Config, image_token: ImageToken) -> tuple[list[Conversation], list[int]]:
    """Return the longest rows of one process's share of a step, and their groups; no more than a micro-batch can hold.

    Each sample has one image, and as many full turns with a tool's image as turns, images and tokens allow.
    """
    talk, grid = config.talk(), largest_grid(config)
    shown = image_token.count(grid)
    system = render_system_prompt(talk)
    per_process = -(-config.rollout.samples // config.train.steps // config.where.trainer.processes)
    rows, groups = [], []
    while len(groups) < per_process * config.rollout.group_size:
        number, index = divmod(len(rows), config.rollout.group_size)
        # Rows have text ids of their own, so that a group shares its prompt and nothing else.
        parts = [(1 + len(system) // LETTERS_PER_TOKEN, 0, False), (shown, image_token.id, False)]
        keys = [f"{number}"]
        for turn in range(talk.max_turns):
            parts.append((talk.max_turn_tokens, 1 + index, True))
            if turn + 1 < talk.max_turns and len(keys) < talk.max_images:
                parts.append((shown, image_token.id, False))
                keys.append(f"{number} {index} {turn}")
        while sum(length for length, _, _ in parts) > talk.max_tokens and len(parts) > 3:
            _, token, _ = parts.pop()
            keys = keys[:-1] if token == image_token.id else keys
        tokens = np.concatenate([np.full(length, token) for length, token, _ in parts])
        scored = np.concatenate([np.full(length, sampled) for length, _, sampled in parts])
        rows.append(Conversation(tokens, scored, tuple(keys), np.array([grid] * len(keys))))
        groups.append(number)
        full = sum(len(row.tokens) for row in rows) > 2 * config.train.token_budget
        if full and index + 1 == config.rollout.group_size:
            break
    return rows, groups


def count_shards(config: Config) -> int:
    """Return the number of processes that share the layers."""
    where = config.where.trainer
    return where.processes if read_accelerate_settings(where).get("distributed_type") == "FSDP" else 1


def gpu_memory(devices: Sequence[int | str] | None = None) -> tuple[int, int] | None:
    """Return (free, total) bytes of the first of these GPUs, by default of the machine's first; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(devices[0] if devices and isinstance(devices[0], int) else 0)


def free_memory(config: Config) -> int:
    """Return the bytes that are left for a trainer: of its GPU, or of this machine's main memory.

    Left out are an engine that stays on the same GPU, what it leaves behind while it sleeps, and CUDA's context.
    """
    engine, gpu = config.where.engine, gpu_memory(config.where.trainer.devices)
    beside = not (engine.urls or config.where.apart)
    if gpu is None:
        return psutil.virtual_memory().available - (beside and engine.keep) * engine.cpu_kvcache_gib * memory.GIB
    free, total = gpu
    share = engine.gpu_memory_utilization if beside and engine.keep else 0
    return min(free, int(total * (1 - share))) - CONTEXT - RESIDUE * (beside and not engine.keep)
