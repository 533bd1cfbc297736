"""Forecast of the memory preflight before anything runs: of a step over rows as long as the config lets them become."""

from typing import TYPE_CHECKING

import numpy as np
import psutil

from thinkimg.config.tree import Config
from thinkimg.conversation.episode import system_prompt
from thinkimg.errors import UserError
from thinkimg.images.patches import image_tokens
from thinkimg.models import tiny
from thinkimg.models.base import BaseSource
from thinkimg.trainer import memory
from thinkimg.trainer.client import accelerate_settings
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.optimise import computed, split

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

LETTERS = 3  # at least, of the system prompt in a token


def forecast(config: Config) -> str:
    """One line: what a step takes, what is free, and what to lower where that is less."""
    try:
        base = geometry(config)
    except OSError:
        return f"memory         not known: the config.json of {config.model.path} can't be had"
    found, tokens = worst(config, base)
    need, free = f"{found.total / memory.GB:.1f} GB", room(config)
    line = f"memory         a step of {tokens} tokens takes up to {need} beside {found.weights / memory.GB:.1f} GB of weights"
    left = free - found.weights
    if found.total <= left:
        return f"{line}: fits in {free / memory.GB:.1f} GB"
    lower = "train.token_budget, rollout.group_size, conversation.max_turns, images.max_pixels"
    lower += "" if config.train.gradient_checkpointing else "; or set train.gradient_checkpointing=true"
    return f"{line}, and {free / memory.GB:.1f} GB are free: lower {lower}"


def worst(config: Config, base: "Qwen2_5_VLConfig") -> tuple[memory.Need, int]:
    """The need of the largest micro-batch that there can be, and its tokens. base: as `geometry` gives it."""
    import torch

    rows, groups = conversations(config, base.image_token_id)
    batches = split(
        rows, groups if config.train.shared_prompts else None, config.train.token_budget, base.image_token_id
    )
    largest = max(batches, key=lambda batch: computed([rows[i] for i in batch.rows], batch.units))
    chosen = [rows[i] for i in largest.rows]
    how = memory.How(
        checkpointing=config.train.gradient_checkpointing, train_vision=config.model.train_vision,
        entropy_grad=config.train.loss.entropy_coef != 0, temperature=config.rollout.temperature,
        cuda=torch.cuda.is_available(), processes=processes_that_share(config),
    )  # fmt: skip
    made = min(config.conversation.max_turns, config.conversation.max_images) - 1  # images of tools in a row
    count = config.rollout.samples * (1 + config.rollout.group_size * made)
    images = dict.fromkeys(map(str, range(count)), picture(config))
    return memory.need(base, config.model, chosen, largest.units, how, images), computed(chosen, largest.units)


def geometry(config: Config) -> "Qwen2_5_VLConfig":
    """Of the base model, from its config.json; a tiny one's from its settings. OSError if it can't be had."""
    if config.model.tiny is not None:
        first = config.model.tiny.vocab_size - len(tiny.SPECIAL_TOKENS)
        return tiny.geometry(config.model.tiny, {token: first + i for i, token in enumerate(tiny.SPECIAL_TOKENS)})
    from transformers import AutoConfig

    base = BaseSource.of(config.model).entry()
    found = AutoConfig.from_pretrained(base["directory"] or base["name"], revision=base["revision"])
    if found.model_type != "qwen2_5_vl":
        raise UserError(f"{config.model.path} is a {found.model_type}, not a qwen2_5_vl.")
    return found


def picture(config: Config) -> np.ndarray:
    """Grid of the largest picture."""
    return np.array([1, 2, 2 * max(config.images.max_pixels // 28**2, 1)])


def conversations(config: Config, image_token: int) -> tuple[list[Conversation], list[int]]:
    """Rows of one process's share of a step, no more than a micro-batch can hold, and their groups: one image to a sample, and
    as many full turns with a tool's image each as turns, images and tokens allow."""
    talk, grid = config.conversation, picture(config)
    shown = image_tokens(grid)
    system = system_prompt(talk)
    per_process = -(-config.rollout.samples // config.train.steps // config.where.trainer.processes)
    rows, groups = [], []
    while len(groups) < per_process * config.rollout.group_size:
        number, index = divmod(len(rows), config.rollout.group_size)
        # Text ids are those of a row, so that a group shares its prompt and no more.
        parts = [(1 + len(system) // LETTERS, 0, False), (shown, image_token, False)]
        keys = [f"{number}"]
        for turn in range(talk.max_turns):
            parts.append((talk.max_turn_tokens, 1 + index, True))
            if turn + 1 < talk.max_turns and len(keys) < talk.max_images:
                parts.append((shown, image_token, False))
                keys.append(f"{number} {index} {turn}")
        while sum(length for length, _, _ in parts) > talk.max_tokens and len(parts) > 3:
            _, token, _ = parts.pop()
            keys = keys[:-1] if token == image_token else keys
        tokens = np.concatenate([np.full(length, token) for length, token, _ in parts])
        scored = np.concatenate([np.full(length, sampled) for length, _, sampled in parts])
        rows.append(Conversation(tokens, scored, tuple(keys), np.array([grid] * len(keys))))
        groups.append(number)
        if (
            sum(len(row.tokens) for row in rows) > 2 * config.train.token_budget
            and index + 1 == config.rollout.group_size
        ):
            break
    return rows, groups


def processes_that_share(config: Config) -> int:
    """Over how many the layers are spread."""
    where = config.where.trainer
    return where.processes if accelerate_settings(where).get("distributed_type") == "FSDP" else 1


def room(config: Config) -> int:
    """Bytes of this machine's GPU, or of its main memory, that are free beside the engine that a loop keeps."""
    import torch

    engine = config.where.engine
    kept = engine.keep and not engine.urls
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return min(free, int(total * (1 - engine.gpu_memory_utilization * kept)))
    return psutil.virtual_memory().available - kept * engine.cpu_kvcache_gib * memory.GB
