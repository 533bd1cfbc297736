"""Write demonstrations: scripted conversations that the warm start imitates, in the form of rollouts."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.conversation import compare
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import Episode, question, scripted, size_statement, system_prompt
from thinkimg.conversation.picture import picture
from thinkimg.conversation.protocol import load_protocol
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import BaseSource
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.puzzles.demonstrations import script
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import Sample, StopReason, Trajectory, to_row
from thinkimg.resources import Resources, base_directory
from thinkimg.rewards.judges.attention import GENERIC
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.stage import Input, Job, Slice, Stage
from thinkimg.store import files
from thinkimg.store.artifacts import Reference, directory_digest
from thinkimg.store.image_table import ImageTable, encode, image_writer
from thinkimg.store.kinds import Dataset, Demonstrations, Pairs
from thinkimg.store.manifest import canonical

SCRIPT = "script"  # policy of the demonstrations' rows
# First image, second image, and which of them (0 or 1) is easier to answer with.
ORDERS = (("original", "right", 1), ("right", "original", 0), ("original", "wrong", 0), ("wrong", "original", 1))


class DemonstrateSettings(Slice):
    conversation: ConversationConfig
    images: ViewLimits
    tiny: TinyModel | None
    flaws: Flaws | None
    """None where a user's file holds the conversations."""
    seed: int
    base: BaseSource = Field(exclude=True)
    checkpoint: str | None = Field(exclude=True)
    """Directory of the model to start from in place of the base."""
    script: str | None = Field(exclude=True)
    """A user's file of conversations."""
    demonstrates: bool = Field(exclude=True)
    compares: bool = Field(exclude=True)
    """Whether pairs are compared, too."""

    def outside(self) -> dict[str, Reference]:
        """Return what the model to start from is, and the user's file."""
        inputs = {}
        if self.checkpoint is not None:
            inputs["checkpoint"] = Reference("checkpoint", directory_digest(checkpoint_directory(self.checkpoint)))
        elif not self.base.tiny:
            inputs["base"] = self.base.reference()
        if self.script is not None:
            inputs["script"] = Reference("script", script_digest(self.script))
        return inputs


def demonstrate_fields(config: Config) -> dict:
    """The fields of DemonstrateSettings."""
    return {
        "conversation": config.conversation,
        "images": ViewLimits.of(config.images),
        "tiny": config.model.tiny,
        "flaws": None if config.warmstart.demonstrations else config.warmstart.flaws,
        "seed": config.seed,
        "base": BaseSource.of(config.model),
        "checkpoint": config.warmstart.checkpoint,
        "script": config.warmstart.demonstrations,
        "demonstrates": config.has_demonstrations,
        "compares": config.compares_pairs,
    }


def settings_of(config: Config) -> DemonstrateSettings:
    return DemonstrateSettings(**demonstrate_fields(config))


def run(job: Job[DemonstrateSettings]) -> None:
    """Write them in the form of rollouts, so that the trainer reads both with the same code.

    `comparisons` are of the same form: one sampled token each, the rating of a pair of images.
    """
    settings, work, dataset = job.settings, job.work, job.inputs["dataset"]
    codec, images = Codec.load(start_directory(settings, dataset, job.resources)), ImageTable([dataset])
    rows: list[dict] = []
    made: dict[str, tuple[bytes, int, int]] = {}  # encoded at once: thousands of decoded pictures would not fit
    todo = list(scripts(settings, dataset))
    for number, (sample, index, turns) in enumerate(todo, 1):
        pictures = [picture(images.decoded(sha), settings.images) for sha in sample.images]
        episode = Episode(
            sample, pictures, settings.conversation, settings.images, codec,
            trajectory_id=f"{sample.sample_id}-{index}", group_id=sample.sample_id, index=index, policy=SCRIPT,
        )  # fmt: skip
        trajectory = scripted(episode, turns)
        if trajectory.stop is not StopReason.ANSWER:
            hint = "it must end with an answer, within conversation.max_turns, max_turn_tokens and max_tokens"
            why = trajectory.error or f"it ended for '{trajectory.stop}'"
            raise UserError(f"the demonstration for {sample.sample_id} does not work: {why}", hint=hint)
        rows.append(to_row(trajectory))
        made |= {sha: (encode(image), *image.size) for sha, image in episode.made_images.items() if sha not in made}
        job.progress(number, len(todo))
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(made):
                add(sha, *made[sha])
    if "pairs" in job.inputs and not work.has("comparisons.parquet"):
        compared = [to_row(row) for row in comparisons(job.inputs["pairs"], settings.images, codec)]
        work.table("comparisons.parquet", pa.Table.from_pylist(compared, records.trajectories()))
    if work.has("trajectories.parquet"):
        return
    work.table("trajectories.parquet", pa.Table.from_pylist(rows, records.trajectories()))


def comparisons(pairs: Pairs, view: ViewLimits, codec: Codec) -> Iterator[Trajectory]:
    """Every known pair four times: the original beside the right and beside the wrong image, in both orders."""
    images, ratings = ImageTable([pairs]), compare.rating_tokens(codec)
    prompts: dict[str, list[int]] = {}
    for row in pairs.rows():
        sample, asked = row["sample_id"], row["question"]
        prompt = prompts.setdefault(asked, compare.prompt(codec, asked))
        seen = {name: picture(images.decoded(row[name]), view) for name in ("original", "right", "wrong")}
        for index, (first, second, better) in enumerate(ORDERS):
            yield Trajectory(
                trajectory_id=f"{sample}-compared-{index}", sample_id=sample, group_id=sample, index=index, policy=SCRIPT,
                tokens=(*prompt, ratings[better]), roles=(0,) * len(prompt) + (1,), logprobs=(0.0,),
                images=(row[first], row[second]), grids=(seen[first].grid, seen[second].grid), turns=(),
                answer=compare.RATINGS[better], stop=StopReason.ANSWER, error=None, weights="scripted",
                sizes=(seen[first].view.size, seen[second].view.size),
            )  # fmt: skip


def scripts(settings: DemonstrateSettings, dataset: Dataset) -> Iterator[tuple[Sample, int, list[str]]]:
    """(sample, index, texts of the model's turns)."""
    samples = dataset.split("train")
    if settings.script is None:
        form, tools = load_protocol(settings.conversation.protocol), settings.conversation.tools != ()
        for number, sample in enumerate(samples):
            rng = np.random.default_rng([settings.seed, 3, number])  # of its own: the puzzles' are [seed, number]
            yield sample, 0, script(sample, form, settings.flaws, rng, tools=tools)
        return
    by_id = {sample.sample_id: sample for sample in samples}
    text = Path(settings.script).read_text(encoding="utf-8")
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
            sample_id, turns = row["sample_id"], row["turns"]
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            hint = 'each line is {"sample_id": …, "turns": ["<think>…</think><tool>…</tool>", …]}'
            raise UserError(f"demonstration {number} cannot be read", hint=hint) from None
        if sample_id not in by_id:
            raise UserError(f"demonstration {number} names sample {sample_id}, which is not in the training split",
                            hint="take the ids from `thinkimg prepare`'s samples.parquet")  # fmt: skip
        yield by_id[sample_id], number, turns


def script_digest(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"there is no demonstrations file {path}", hint="set warmstart.demonstrations to a JSONL file")
    return files.sha256_once(Path(path))


def checkpoint_directory(path: str) -> Path:
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"there is no checkpoint in {path}", hint="name a directory with config.json and model.safetensors"
        )
    return directory


def start_directory(settings: DemonstrateSettings, dataset: Dataset, resources: Resources) -> Path:
    """The directory of the model to start from; a tiny one is made when it is asked for, the same every time."""
    if settings.checkpoint is not None:
        return checkpoint_directory(settings.checkpoint)
    if settings.tiny is None:
        return base_directory(settings.base)

    shared = settings.model_dump(mode="json", include=set(DemonstrateSettings.model_fields))  # with the warm start
    defining = [dataset.digest, shared, settings.script, settings.compares]
    name = hashlib.sha256(canonical(defining).encode()).hexdigest()[:16]
    directory = resources.scratch / f"tiny-{name}"
    if not directory.exists():
        half = resources.scratch / f"half-{name}"
        half.mkdir()
        create_tiny(half, settings.tiny, corpus(settings, dataset), seed=settings.seed)
        half.rename(directory)
    return directory


def corpus(settings: DemonstrateSettings, dataset: Dataset) -> list[str]:
    """Texts that a tiny tokenizer should take few tokens for: system prompt, questions, scripted turns, observations."""
    images = ImageTable([dataset])
    texts = [system_prompt(settings.conversation)]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    if settings.compares:
        texts += [compare.REPLY, GENERIC]
    demonstrated = (
        {sample.sample_id: turns for sample, _, turns in scripts(settings, dataset)} if settings.demonstrates else {}
    )
    for sample in dataset.split("train"):
        pictures = [picture(images.decoded(sha), settings.images) for sha in sample.images]
        turns = demonstrated.get(sample.sample_id, [])
        texts += [part["text"] for part in question(sample, pictures) if part["type"] == "text"] + turns
        texts += [size_statement(number, pictures[0]) for number in range(1, len(turns))]
        texts += [compare.instruction(sample.question)] if settings.compares else []
    return texts


demonstrate = Stage(
    name="demonstrate",
    version=2,
    makes=Demonstrations,
    settings=settings_of,
    run=run,
    reads={
        "dataset": Input(Dataset),
        "pairs": Input(Pairs, origin=known_pairs, counts=lambda config: config.compares_pairs, shown=True),
    },
    packages=lambda settings: ("transformers", "tokenizers", "pillow", "numpy"),
    outside=DemonstrateSettings.outside,
    wanted=lambda config: config.has_demonstrations,
)
