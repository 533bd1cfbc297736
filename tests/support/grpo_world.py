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
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import Base
from thinkimg.models.family import load_family
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.records import StopReason, Trajectory
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import encode_lossless, image_writer
from thinkimg.store.manifest import Artifact, Recipe
from thinkimg.trainer import checkpoint, grpo_job
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packing import ImageToken
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches, read_rows
from thinkimg.trainer.settings import ParityConfig, TrainConfig, WarmstartConfig

FULL = ModelConfig(dtype="float32", adaptation="full", train_vision=True)
LORA = ModelConfig(dtype="float32", adaptation="lora", lora_rank=4, lora_alpha=8)
TRAIN = TrainConfig(learning_rate=1e-2, parity=ParityConfig(trajectories=4), token_budget=400)
BANNED = (1, 5)
SMALL = TinyModel(
    vocab_size=280, hidden_size=32, layers=2, heads=2, vision_layers=2, vision_hidden_size=32, vision_heads=2
)
# Deep enough for two DeepStack levels, and for a layer of full attention after recurrent ones.
DEEP = {"heads": 4, "layers": 4, "vision_layers": 4, "hidden_size": 64}
NAMES = {"trajectory_id": "", "sample_id": "s", "policy": "p", "answer": None, "error": None, "turns": ()}


def shape_of(family: str) -> TinyModel:
    """Shape of a tiny model of a family for tests of the trainer."""
    return SMALL if family == "qwen2_5_vl" else SMALL.model_copy(update=DEEP | {"family": family})


class World:
    """A tiny base, a data set with images, and rollouts of it with the log-probabilities that the base gives them."""

    def __init__(self, root: Path, *, tied: bool = True, family: str = "qwen2_5_vl"):
        """tied: the head is the embeddings, as in Qwen2.5-VL-3B; in the 7B it is a matrix of its own."""
        self.root = root
        self.store = Store(root / "store")
        create_tiny(root / "base", shape_of(family), ["crop the image", "answer"], seed=0)
        if not tied:
            self.untie()
        self.base = Base("tiny", directory=str(root / "base"))
        self.processor = load_family(family).processor
        side = self.processor.token_side
        self.limits = ViewLimits(
            min_pixels=side**2, max_pixels=9 * side**2, patch=self.processor.patch, merge=self.processor.merge
        )
        rng = np.random.default_rng(0)
        pictures = [
            Image.fromarray(rng.integers(0, 256, (side * h, side * w, 3), dtype=np.uint8))
            for h, w in ((2, 3), (1, 2), (3, 1))
        ]
        self.pictures = {pixel_hash(picture): picture for picture in pictures}
        self.images = self.image_table("dataset", self.pictures)
        self.policies: dict[str, Path] = {}
        for name, config in (("full", FULL), ("lora", LORA)):
            policy = checkpoint.start_from_base(self.base, config, "cpu", seed=0)
            self.policies[name] = root / name
            checkpoint.save(policy, self.policies[name], learning_rate=0.0, seed=0)
        self.image_token = ImageToken.of(unwrap(policy.model).config)
        self.trajectories = [self.trajectory(i, rng, self.image_token.id) for i in range(8)]
        rows = read_rows(self.rollouts("unscored", self.trajectories), self.image_token)
        pixels = self.patches()
        scorer = Scorer(policy.model, pixels, temperature=0.9, banned=BANNED, features={})
        passes = Passes(policy, Ranks(), scorer, pixels, rows, 400, packed=False)
        logps, _ = passes.score(range(len(rows)))
        pixels.close()
        self.trajectories = [
            dataclasses.replace(t, logprobs=tuple(map(float, logp)))
            for t, (_, logp) in zip(self.trajectories, sorted(logps.items()), strict=True)
        ]
        self.artifact = self.rollouts("rollouts", self.trajectories)

    def patches(self) -> Patches:
        """Return the patches of the data set's images."""
        return Patches([self.images], self.processor, self.limits)

    def untie(self) -> None:
        """Give the base a head of its own."""
        path, weights = self.root / "base" / "config.json", self.root / "base" / "model.safetensors"
        settings = json.loads(path.read_text())
        settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
        path.write_text(json.dumps(settings))
        tensors = load_file(weights)
        (embeddings,) = (value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
        head = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
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
            grids=tuple(self.limits.count_patches(self.pictures[key].size) for key in keys),
            stop=StopReason.ANSWER, weights="v0",
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
            "images": {"tables": [str(self.images)], **self.limits.model_dump()},
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
