"""Sampler in place of vLLM for a family that it can't serve: scripted turns, with transformers' log-probabilities.

Model, image processor and tokenizer are read from the policy's files by transformers alone. So the trainer's parity
gate compares with something that shares no code with it.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from thinkimg.conversation.episode import ConversationSpec, Episode, derive_seed
from thinkimg.conversation.picture import make_picture
from thinkimg.models.base import Base
from thinkimg.puzzles.demonstrations import write_script
from thinkimg.puzzles.settings import Flaws
from thinkimg.store.image_table import ImageTable

FLAWS = Flaws(guess=0.3, wrong_call=0.3)  # so that a group has good and bad rows


class StockModel:
    """A policy's model as transformers reads it, and peft its adapter."""

    def __init__(self, policy, base):
        """base: where a LoRA policy's base lies."""
        if policy.is_full:
            model = AutoModelForImageTextToText.from_pretrained(policy.model_directory, dtype=torch.float32)
        else:
            from peft import PeftModel

            start = AutoModelForImageTextToText.from_pretrained(Base(**base).locate(), dtype=torch.float32)
            model = PeftModel.from_pretrained(start, str(policy.adapter_directory)).merge_and_unload()
        self.model = model.eval()
        self.images = AutoImageProcessor.from_pretrained(policy.vocabulary, use_fast=False)
        self.token = self.model.config.image_token_id

    def expand(self, ids: list[int], pictures) -> tuple[list[int], dict]:
        """Return ids with a token for each square of patches, and the processor's tensors."""
        if not pictures:
            return ids, {}
        seen = self.images([picture.view for picture in pictures], return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(1) // self.images.merge_size**2).tolist())
        return [token for token in ids for _ in range(next(counts) if token == self.token else 1)], dict(seen)

    def score(self, episode: Episode, turn: list[int], temperature: float) -> list[float]:
        """Return the log-probabilities of a turn after what the episode has so far."""
        prompt, images = self.expand(episode.prompt_ids, episode.pictures)
        episode.stream.check(prompt)
        tokens = torch.tensor([prompt + turn])
        kinds = (tokens == self.token).int()
        with torch.no_grad():
            logits = self.model(input_ids=tokens, mm_token_type_ids=kinds, **images).logits[0, len(prompt) - 1 : -1]
        logits[:, list(episode.codec.banned)] = -torch.inf
        logps = (logits / temperature).log_softmax(-1)
        return logps.gather(1, torch.tensor(turn)[:, None]).squeeze(1).tolist()


class StockSampler:
    """Sampler of episodes whose turns are a script's."""

    def __init__(self, settings, dataset, policy, resources):
        self.engine, self.settings, self.policy = self, settings, policy
        self.images, self.pool = ImageTable([dataset]), ThreadPoolExecutor(1)
        self.spec = ConversationSpec.load(settings.conversation, settings.images, policy.vocabulary)
        self.stock = StockModel(policy, settings.base.entry(policy))

    async def releases(self):
        return {}

    async def sample(self, specs, progress):
        for number, spec in enumerate(specs, 1):
            yield spec, self.play(spec)
            progress(number)

    def play(self, spec) -> Episode:
        sample, policy = spec.sample, self.policy.digest
        pictures = [make_picture(self.images.decoded(sha), self.spec.view) for sha in sample.images]
        episode = Episode(sample, pictures, self.spec, policy=policy, group_id=sample.sample_id, index=spec.index)
        luck = np.random.default_rng(derive_seed(policy, sample.sample_id, spec.index, 0))
        for text in write_script(sample, self.settings.conversation, FLAWS, luck):
            turn = [*episode.codec.encode(episode.protocol.follow(text, episode.codec.turn_start)), episode.codec.end]
            logps = self.stock.score(episode, turn, spec.mode.temperature)
            if call := episode.feed(turn, logps, "stop", policy):
                episode.observe(call.run())
        return episode


@asynccontextmanager
async def open_sampler(settings, dataset, policy, resources):
    """Yield a sampler, as stages.rollout.open_sampler does."""
    sampler = StockSampler(settings, dataset, policy, resources)
    yield sampler
    sampler.pool.shutdown()
