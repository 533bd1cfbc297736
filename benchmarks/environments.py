"""Conversations per second of the same policy on the same puzzles: our rollouts, verifiers' loop, TRL's generation.

    .venv-verifiers/bin/python benchmarks/environments.py --store artifacts --policy 3f2a

The environment is that of make test-verifiers; without --policy the tiny preset's warm-started one plays.

    thinkimg    rollouts: tokens in, tokens out, against a vLLM server
    verifiers   thinkimg_env in vf-eval's runner: chat completions of the same server
    trl         GRPOTrainer's own generation (transformers) with environment_factory, in this process

Conversations are sampled at temperature 1. Times are those of generation and tools alone, without start, rewards and
training. A round plays all three in turn, so that what else the machine does meets them all: ratios are of one round.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from trl import import_utils

import_utils.is_vllm_available = lambda *_, **__: False  # TRL would import vLLM, which nothing here calls

from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from verifiers.v1.cli.eval.main import main as run_vf_eval  # noqa: E402

from thinkimg.config.load import load_config  # noqa: E402
from thinkimg.engine.play import EpisodeSpec, SamplingMode  # noqa: E402
from thinkimg.environments.trl import (  # noqa: E402
    environment,
    make_arguments,
    make_dataset,
    prepare_processor,
    reward_functions,
)
from thinkimg.resources import Resources  # noqa: E402
from thinkimg.scheduler import Builder  # noqa: E402
from thinkimg.stages.prepare import prepare  # noqa: E402
from thinkimg.stages.rollout import open_sampler, settings_of  # noqa: E402
from thinkimg.stages.warmstart import warmstart  # noqa: E402
from thinkimg.store.artifacts import Store  # noqa: E402

GROUP = 2  # rollouts of a sample, as few as TRL takes


class Race(TrainerCallback):
    """Rounds of the three ways. TRL's is a step of its training, before which the others play."""

    def __init__(self, overrides, config, resources, dataset, policy, samples):
        self.overrides, self.config, self.resources = overrides, config, resources
        self.dataset, self.policy, self.samples = dataset, policy, samples
        self.seconds = defaultdict(list)
        self.settings = settings_of(config)

    def on_step_begin(self, *_, **__):
        url = asyncio.run(self.play())
        self.seconds["verifiers"].append(self.evaluate(url))

    async def play(self) -> str:
        """Play our rollouts; return the server's address."""
        samples = self.dataset.split("train")[: self.samples]
        specs = [EpisodeSpec(sample, index, SamplingMode(1.0)) for sample in samples for index in range(GROUP)]
        async with open_sampler(self.settings, self.dataset, self.policy, self.resources) as sampler:
            started = time.perf_counter()
            async for _, episode in sampler.sample(specs):
                assert episode.error is None, episode.error
            self.seconds["thinkimg"].append(time.perf_counter() - started)
            return sampler.engine.urls[0]

    def evaluate(self, url: str) -> float:
        """Return the seconds from the first rollout's start to the last one's end, as the traces have them."""
        with tempfile.TemporaryDirectory() as folder:
            argv = [
                "thinkimg-env", "--no-push", "--no-rich", "--env.agent.runtime.type", "subprocess", "-o", folder,
                "--model", "policy", "--client.base-url", f"{url}/v1", "--client.api-key-var", "NONE",
                "--sampling.temperature", "1", "-n", str(self.samples), "-r", str(GROUP),
                "--env.taskset.preset", "tiny", "--env.taskset.set", json.dumps(self.overrides),
                "--env.taskset.dataset", str(self.dataset.directory), "--env.taskset.split", "train",
            ]  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                run_vf_eval(argv)
            (path,) = Path(folder).glob("*/traces.jsonl")
            traces = [trace for line in path.read_text().splitlines() for trace in json.loads(line)["traces"]]
        assert len(traces) == self.samples * GROUP and all(trace["ok"] for trace in traces)
        times = [trace["timing"] for trace in traces]
        return max(each["agent"]["end"] for each in times) - min(each["start"] for each in times)

    def train(self, rounds: int) -> None:
        """Run TRL's training, whose steps change nothing, and with it the rounds."""
        model = self.policy.model_directory
        processor = AutoProcessor.from_pretrained(model, padding_side="left")
        codec = prepare_processor(processor, self.config)
        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(
                output_dir=folder, per_device_train_batch_size=self.samples * GROUP, num_generations=GROUP,
                max_steps=rounds, learning_rate=0.0, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
                shuffle_dataset=False, disable_tqdm=True, gradient_checkpointing=False,
                **make_arguments(codec, self.config),
            )  # fmt: skip
            rows = make_dataset(self.dataset, self.config)
            trainer = GRPOTrainer(
                model=AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
                args=arguments,
                train_dataset=rows.select(range(self.samples)),
                reward_funcs=reward_functions(self.config),
                environment_factory=environment(self.config),
                processing_class=processor,
                callbacks=[self],
            )
            generate = trainer._generate

            def timed(prompts):
                started = time.perf_counter()
                output = generate(prompts)
                self.seconds["trl"].append(time.perf_counter() - started)
                return output

            trainer._generate = timed
            trainer.train()


def main(overrides: list[str], reference: str | None, samples: int, rounds: int) -> None:
    config = load_config("tiny", overrides)
    store = Store(config.where.store)
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        policy = store.resolve(reference, "policy") if reference else builder.make(warmstart, dataset=dataset)
        race = Race(overrides, config, resources, dataset, policy, samples)
        race.train(rounds + 1)
    count = samples * GROUP
    print(f"{count} conversations, {rounds} rounds after one that warms up, {os.cpu_count()} cores")
    print(f"{'':10} {'conversations/s':>15}  thinkimg is (range)")
    for name, seconds in race.seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(race.seconds["thinkimg"][1:], seconds[1:], strict=True)]
        speed = count / median(seconds[1:])
        print(f"{name:10} {speed:15.2f}  {median(ratios):6.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts", help="what it lacks (data set, policy) is made")
    parser.add_argument("--policy", help="beginning of its fingerprint")
    parser.add_argument("--samples", type=int, default=32, help=f"each is played {GROUP} times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset, as a.b=value")
    given = parser.parse_args()
    main([f"where.store={Path(given.store).resolve()}", *given.set], given.policy, given.samples, given.rounds)
