"""One training step in a process of its own: the memory that memory.py predicts, and the kernel's measurement."""

import argparse
import ctypes
import json
from pathlib import Path

import numpy as np
import torch

from thinkimg.models.base import Base
from thinkimg.models.family import load_family
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.trainer import memory
from thinkimg.trainer.checkpoint import start_from_base
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.micro_batches import split
from thinkimg.trainer.policy import train_only
from thinkimg.trainer.stepper import checkpoint_activations

TINY = TinyModel(hidden_size=256, layers=6, heads=4)


def group(
    image_token: ImageToken, *, images: int, turns: int, size: int, words: int = 60, seed: int = 0
) -> list[Conversation]:
    """Return rows of one prompt with `images` pictures of 12 x 12 tokens, and `turns` turns of so many words.

    Each turn ends with a tool's picture, if the prompt has any.
    """
    rng = np.random.default_rng(seed)
    grid, tool = (1, 24, 24), (1, 16, 20)
    rows = []
    for number in range(size):
        tokens, scored, keys, grids = list(range(20, 60)), [False] * 40, [], []
        for k in range(images):
            tokens += [image_token.id] * image_token.count(grid)
            keys.append(f"prompt {k}")
            grids.append(grid)
        scored += [False] * (len(tokens) - len(scored))
        for turn in range(turns):
            tokens += rng.integers(20, 200, words).tolist()
            scored += [True] * words
            if images:
                tokens += [image_token.id] * image_token.count(tool)
                scored += [False] * image_token.count(tool)
                keys.append(f"tool {number} {turn}")
                grids.append(tool)
        tokens += rng.integers(20, 200, words).tolist()
        scored += [True] * words
        found = np.array(grids, dtype=np.int64).reshape(-1, 3)
        rows.append(Conversation(np.array(tokens), np.array(scored), tuple(keys), found))
    return rows


def status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("images", "turns", "size", "words"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("adaptation", "family"):
        parser.add_argument(f"--{name}")
    for name in ("padded", "train-vision"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--layers", type=int, default=0, help="that recompute their activations")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory.return_memory()
    create_tiny(
        args.model, TINY.model_copy(update={"family": args.family}), [f"word{i * i}" for i in range(2000)], seed=0
    )
    config = ModelConfig(
        dtype="float32", adaptation=args.adaptation, lora_rank=16, lora_alpha=16, train_vision=args.train_vision
    )
    policy = start_from_base(Base("tiny", directory=str(args.model)), config, "cpu", seed=0)
    parameters = train_only(policy.model, config, vision=args.train_vision)
    geometry = unwrap(policy.model).config
    image_token, values = ImageToken.of(geometry), load_family(args.family).processor.patch_values
    made: dict[str, np.ndarray] = {}

    def pixels(key: str) -> np.ndarray:
        if key not in made:
            made[key] = np.zeros((24 * 24 if key.startswith("prompt") else 16 * 20, values), dtype=np.float32)
            made[key] += 0.5
        return made[key]

    def one_batch(rows: list[Conversation]) -> tuple[list[Conversation], list | None]:
        batch = split(rows, None if args.padded else [0] * len(rows), 10**9, image_token)[0]
        return [rows[i] for i in batch.rows], batch.units

    def step(rows: list[Conversation], optimizer) -> None:
        features = None if args.train_vision else {}
        scorer = Scorer(policy.model, pixels, temperature=0.9, banned=(3,), features=features)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with checkpoint_activations(policy.model, args.layers):
            logps, _ = scorer(*one_batch(rows), entropy=True)
            logps.sum().backward()
        optimizer.step()

    shape = {"images": args.images, "turns": args.turns, "size": args.size, "words": args.words}
    small = {"images": args.images, "turns": 1, "size": 1}
    step(group(image_token, **small), torch.optim.SGD(list(parameters.values()), lr=0.0))
    rows = group(image_token, **shape, seed=1)
    options = memory.StepOptions(train_vision=args.train_vision, temperature=0.9)
    predicted = memory.measure(memory.Step(geometry, config, *one_batch(rows), options)).require(args.layers)
    made.clear()
    for parameter in parameters.values():
        parameter.grad = None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    optimizer = torch.optim.AdamW(list(parameters.values()), fused=True)
    for _ in range(2):  # the second has the moments of the first
        step(rows, optimizer)
    measured = status("VmHWM") - before
    print(json.dumps({"predicted": predicted.total, "measured": measured, "parts": vars(predicted)}))


if __name__ == "__main__":
    main()
