"""An update by TRL's own GRPOTrainer and one by thinkimg, of the same tiny model on the same rollouts, side by side.

    python benchmarks/trl_step.py

TRL is given the rollouts of train_step.py's tiny workload in place of its generation: prompts with an image, and
completions with tool images. Log-probabilities are as from vLLM, so that it makes its pass for old ones. It does the
rest: image processing, padding, passes, loss, AdamW. Its defaults are kept (activation checkpointing is on), but for
bf16, which is slow on a CPU. thinkimg reads the same pictures from an artifact. Loss, LoRA and learning rate are the
same, so the norms of the gradients must agree: they are printed.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
from PIL import Image
from trl import import_utils
from workload import BEGIN, END, IMAGE, PROCESSOR, TINY, make_groups

import_utils.is_vllm_available = lambda *_, **__: False  # TRL would import vLLM, which nothing here calls

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from thinkimg.grpo.advantages import group_advantages  # noqa: E402
from thinkimg.images.decode import pixel_hash  # noqa: E402
from thinkimg.images.settings import ViewLimits  # noqa: E402
from thinkimg.models.settings import TinyModel  # noqa: E402
from thinkimg.models.tiny import create_tiny  # noqa: E402
from thinkimg.store.artifacts import Store  # noqa: E402
from thinkimg.store.image_table import encode_lossless, image_writer  # noqa: E402
from thinkimg.store.manifest import Recipe  # noqa: E402
from thinkimg.trainer.policy import match_language_linears  # noqa: E402

LIMITS = ViewLimits(min_pixels=784, max_pixels=10**7)
SIZE = 8
RATE = 1e-5


class Workload:
    """Groups in the ids of a real tiny model, with pictures, rewards, and the model itself."""

    def __init__(self, root: Path, groups: int):
        self.root = root
        create_tiny(root / "model", TinyModel(), ["crop the image", "the answer is here"] * 50, seed=0)
        model = AutoModelForImageTextToText.from_pretrained(root / "model", dtype=torch.float32)
        config = model.config
        self.image_token = config.image_token_id
        ids = {IMAGE: self.image_token, BEGIN: config.vision_start_token_id, END: config.vision_end_token_id}
        special = min(config.vision_start_token_id, config.image_token_id, config.text_config.eos_token_id) - 4
        rng = np.random.default_rng(3)
        self.groups, self.pictures = make_groups(TINY, groups=groups), {}
        self.rows = [row for group in self.groups for row in group]
        names: dict[str, str] = {}
        for row in self.rows:
            text = ~np.isin(row.tokens, list(ids))
            row.tokens[text] = 6 + row.tokens[text] % (special - 6)
            for old, new in ids.items():
                row.tokens[row.tokens == old] = -new
            np.abs(row.tokens, out=row.tokens)
            for key, (_, h, w) in zip(row.images, row.grids, strict=True):
                if key not in names:
                    picture = Image.fromarray(rng.integers(0, 256, (14 * h, 14 * w, 3), dtype=np.uint8))
                    names[key] = pixel_hash(picture)
                    self.pictures[names[key]] = picture
            object.__setattr__(row, "images", tuple(names[key] for key in row.images))
        self.rewards = rng.uniform(size=len(self.rows))

    def model(self):
        """The same LoRA each time; B is not zero, so that A has gradients."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = AutoModelForImageTextToText.from_pretrained(
            self.root / "model", dtype=torch.float32, attn_implementation="sdpa"
        )
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=match_language_linears(base))
        model = get_peft_model(base, lora)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=generator)
        return model

    def start(self, row) -> int:
        """Length of the prompt."""
        return int(np.flatnonzero(row.scored)[0])


class Laps(TrainerCallback):
    def __init__(self):
        self.seconds, self.busy, self.norms = [], [], []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.began[0])
        self.busy.append(time.process_time() - self.began[1])

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def trl(work: Workload, steps: int) -> Laps:
    count = len(work.groups)
    config = GRPOConfig(
        output_dir=str(work.root / "trl"), per_device_train_batch_size=SIZE, gradient_accumulation_steps=count,
        num_generations=SIZE, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, shuffle_dataset=False,
        max_completion_length=4096, disable_tqdm=True, max_grad_norm=1e9, weight_decay=0.0,
    )  # fmt: skip
    prompts = [[{"role": "user", "content": f"group {i}"}] for i in range(count)]
    trainer = GRPOTrainer(
        model=work.model(), args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
        reward_funcs=lambda completions, **_: work.rewards[: len(completions)].tolist(),
        processing_class=AutoProcessor.from_pretrained(work.root / "model", padding_side="left"),
    )  # fmt: skip
    laps = Laps()
    trainer.add_callback(laps)

    def generate(given: list) -> tuple:
        assert len(given) == len(work.rows)
        cut = [work.start(row) for row in work.rows]
        completions = [row.tokens[n:].tolist() for row, n in zip(work.rows, cut, strict=True)]
        images = [[work.pictures[key] for key in row.images] for row in work.rows]
        return (
            [row.tokens[:n].tolist() for row, n in zip(work.rows, cut, strict=True)], completions,
            [row.scored[n:].astype(int).tolist() for row, n in zip(work.rows, cut, strict=True)], [""] * len(given),
            [[-7.0] * len(c) for c in completions], {}, images, images,
        )  # fmt: skip

    trainer._generate = generate
    trainer.tools = [generate]  # completions with images of tools in them
    trainer.use_vllm = True  # log-probabilities of an engine are given, so old ones are needed
    trainer.vllm_importance_sampling_correction = False  # they are not this model's
    trainer.train()
    return laps


def thinkimg(work: Workload, steps: int) -> Laps:
    from thinkimg.grpo.settings import LossConfig
    from thinkimg.models.base import Base
    from thinkimg.models.settings import ModelConfig
    from thinkimg.trainer.forward.logprobs import Scorer
    from thinkimg.trainer.forward.packed_attention import use_packed_attention
    from thinkimg.trainer.forward.vision import batch_equal_chunks
    from thinkimg.trainer.grpo_job import Objective
    from thinkimg.trainer.passes import Passes
    from thinkimg.trainer.policy import PolicyModel, train_only
    from thinkimg.trainer.ranks import Ranks
    from thinkimg.trainer.rows import Patches, Row
    from thinkimg.trainer.stepper import Stepper

    store = Store(work.root / "store")

    def write(made) -> None:
        with made.part("images.parquet") as path, image_writer(path) as add:
            for key, picture in work.pictures.items():
                add(key, encode_lossless(picture), *picture.size)

    images = store.build("images", Recipe("benchmark", 1, 1, {}), write)[0]
    model = work.model()
    batch_equal_chunks(model.get_base_model())
    use_packed_attention(model.get_base_model())
    settings = ModelConfig(dtype="float32", adaptation="lora", lora_rank=8)
    policy = PolicyModel(model.eval(), settings, Base("tiny"), {})
    loss = LossConfig(vllm_importance_sampling_correction=False)
    names = np.repeat(np.arange(len(work.groups)), SIZE)
    found = group_advantages(work.rewards, names, np.ones(len(names), dtype=bool), scale_rewards="group").advantages
    rows = [
        Row(str(i), str(names[i]), "", row, np.zeros(int(row.scored.sum()), dtype=np.float32), float(found[i]))
        for i, row in enumerate(work.rows)
    ]
    laps, batch = Laps(), list(range(len(work.rows)))
    parameters = train_only(policy.model, settings, vision=False)
    stepper = Stepper(policy, parameters, policy.resume_optimizer(parameters, 0.0), Ranks(), 1e9)
    for _ in range(steps):
        laps.on_step_begin()
        # As at the beginning of a job: no picture is decoded and no feature known.
        with contextlib.closing(Patches([str(images.directory)], PROCESSOR, LIMITS)) as pixels:
            scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})
            passes = Passes(policy, Ranks(), scorer, pixels, rows, TINY.budget, packed=True)
            Objective(loss, 4096, {}, {}, {}).accumulate(passes, batch, batch)
            laps.norms.append(stepper.step(RATE))
        laps.on_step_end()
    return laps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4, help="of 8 rollouts each")
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        work = Workload(Path(root), args.groups)
        results = {"trl": trl(work, args.steps), "thinkimg": thinkimg(work, args.steps)}
    print(f"{'':9} {'s / update':>10} {'CPU s':>8} {'gradient norm of the first':>27}")
    median = {name: (statistics.median(r.seconds[1:]), statistics.median(r.busy[1:])) for name, r in results.items()}
    for name, laps in results.items():
        print(f"{name:9} {median[name][0]:10.3f} {median[name][1]:8.3f} {laps.norms[0]:27.6g}")
    ratios = [a / b for a, b in zip(median["trl"], median["thinkimg"], strict=True)]
    print(f"thinkimg is {ratios[0]:.2f} x as fast ({ratios[1]:.2f} x by CPU seconds)")


if __name__ == "__main__":
    main()
