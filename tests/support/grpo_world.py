"""A tiny base, a data set with images, and rollouts of it, as the tests of the trainer want them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from thinkimg import records
from thinkimg.images.decode import pixel_hash
from thinkimg.images.view import count_patches
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.records import StopReason, Trajectory
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import encode_lossless, image_writer
from thinkimg.store.manifest import Artifact, Recipe
from thinkimg.trainer import checkpoint, grpo_job
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches, read_rows
from thinkimg.trainer.settings import ParityConfig, TrainConfig, WarmstartConfig

FULL = ModelConfig(dtype="float32", adaptation="full", train_vision=True)
LORA = ModelConfig(dtype="float32", adaptation="lora", lora_rank=4, lora_alpha=8)
TRAIN = TrainConfig(learning_rate=1e-2, parity=ParityConfig(trajectories=4), token_budget=400)
BANNED = (1, 5)
NAMES = {"trajectory_id": "", "sample_id": "s", "policy": "p", "answer": None, "error": None, "turns": ()}


class World:
    """A tiny base, a data set with images, and rollouts of it with the log-probabilities that the base gives them."""

    def __init__(self, root: Path, *, tied: bool = True):
        """tied: the head is the embeddings, as in Qwen2.5-VL-3B; in the 7B it is a matrix of its own."""
        self.root = root
        self.store = Store(root / "store")
        tiny = TinyModel(
            vocab_size=280, hidden_size=32, layers=2, heads=2, vision_layers=2, vision_hidden_size=32, vision_heads=2
        )
        create_tiny(root / "base", tiny, ["crop the image", "answer"], seed=0)
        if not tied:
            self.untie()
        self.base = Base("tiny", directory=str(root / "base"))
        rng = np.random.default_rng(0)
        pictures = [
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((56, 84), (28, 56), (84, 28))
        ]
        self.pictures = {pixel_hash(picture): picture for picture in pictures}
        self.images = self.image_table("dataset", self.pictures)
        self.policies: dict[str, Path] = {}
        for name, config in (("full", FULL), ("lora", LORA)):
            policy = checkpoint.start_from_base(self.base, config, "cpu", seed=0)
            self.policies[name] = root / name
            checkpoint.save(policy, self.policies[name], learning_rate=0.0, seed=0)
        image_token = policy.model.get_base_model().config.image_token_id
        self.trajectories = [self.trajectory(i, rng, image_token) for i in range(8)]
        rows = read_rows(self.rollouts("unscored", self.trajectories), image_token)
        pixels = Patches([self.images], min_pixels=784, max_pixels=7056)
        scorer = Scorer(policy.model, pixels, temperature=0.9, banned=BANNED, features={})
        passes = Passes(policy, Ranks(), scorer, pixels, rows, 400, packed=False)
        logps, _ = passes.score(range(len(rows)))
        pixels.close()
        self.trajectories = [
            dataclasses.replace(t, logprobs=tuple(map(float, logp)))
            for t, (_, logp) in zip(self.trajectories, sorted(logps.items()), strict=True)
        ]
        self.artifact = self.rollouts("rollouts", self.trajectories)

    def untie(self) -> None:
        """Give the base a head of its own."""
        path, weights = self.root / "base" / "config.json", self.root / "base" / "model.safetensors"
        settings = json.loads(path.read_text())
        settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
        path.write_text(json.dumps(settings))
        tensors = load_file(weights)
        head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
        save_file(tensors | {"lm_head.weight": head / 6}, weights, metadata={"format": "pt"})

    def trajectory(self, i: int, rng: np.random.Generator, image_token: int) -> Trajectory:
        keys = tuple(rng.choice(sorted(self.pictures), 1 + i % 2))
        tokens: list[int] = []
        roles: list[int] = []
        for _ in keys:
            tokens += [10, image_token, 11, *rng.integers(20, 200, 5 + i)]
            roles += [0, 0, 0, *[1] * (5 + i)]
        if len(keys) == 2:  # the second message is an observation
            roles[len(roles) // 2 : len(roles) // 2 + 3] = [2, 2, 2]
        return Trajectory(
            **NAMES | {"trajectory_id": f"t{i}"}, group_id=f"g{i // 2}", index=i % 2, tokens=tuple(map(int, tokens)),
            roles=tuple(roles), logprobs=(0.0,) * roles.count(1), images=keys,
            grids=tuple(count_patches(*self.pictures[key].size) for key in keys), stop=StopReason.ANSWER, weights="v0",
            sizes=tuple(self.pictures[key].size for key in keys),
        )  # fmt: skip

    def build(self, kind: str, name: str, write) -> Artifact:
        return self.store.build(kind, Recipe("test", 1, 1, {"name": name}), write)[0]

    def image_table(self, name: str, pictures: dict) -> Path:
        def write(work):
            with work.part("images.parquet") as path, image_writer(path) as add:
                for key, picture in pictures.items():
                    add(key, encode_lossless(picture), *picture.size)

        return self.build("dataset", name, write).directory

    def rollouts(self, name: str, trajectories: list[Trajectory]):
        table = pa.Table.from_pylist([records.to_row(t) for t in trajectories], records.trajectory_schema())
        return self.build("rollouts", name, lambda work: work.table("trajectories.parquet", table))

    def advantages(self, values: dict[str, float]) -> str:
        table = pa.table({"trajectory_id": list(values), "advantage": list(values.values())})
        path = self.root / f"{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}.parquet"
        pq.write_table(table, path)
        return str(path)

    def job(self, output: str, *, model: ModelConfig = FULL, train: TrainConfig = TRAIN, **changes) -> dict:
        values = {f"t{i}": (-1.0) ** i * (1 + i / 10) for i in range(6)}  # t6 and t7 are excluded
        base = dataclasses.asdict(self.base) if model.adaptation == "lora" else None
        return {
            "kind": "train", "policy": {"directory": str(self.policies[model.adaptation]), "digest": "v0"},
            "base": base, "model": model.model_dump(mode="json"), "train": train.model_dump(mode="json"),
            "rollouts": str(self.artifact.directory), "advantages": self.advantages(values), "reference": None,
            "images": {"tables": [str(self.images)], "min_pixels": 784, "max_pixels": 7056},
            "conversation": {"temperature": 0.9, "banned": list(BANNED), "max_tokens": 100},
            "output": str(self.root / output), "seed": 0,
        } | changes  # fmt: skip

    def warmstart_job(self, output: str, **changes) -> dict:
        config = WarmstartConfig(steps=6, batch=4, learning_rate=5e-3, warmup_steps=2)
        job = self.job(output) | {"kind": "warmstart", "base": dataclasses.asdict(self.base), "token_budget": 400}
        return job | {"warmstart": config.model_dump(mode="json")} | changes

    def train(self, job: dict, policy=None) -> dict:
        """As the worker, in this process."""
        if policy is None:
            base = Base(**job["base"]) if job["base"] else None
            policy = checkpoint.load(job["policy"]["directory"], ModelConfig.model_validate(job["model"]), "cpu", base)
        return grpo_job.run(job, policy, Ranks(), lambda _: None)
