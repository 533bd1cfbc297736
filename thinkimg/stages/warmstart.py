"""The warm start: a first policy that knows the protocol, from scripted demonstrations that leave something to learn."""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from thinkimg import process, records
from thinkimg.config import Config
from thinkimg.conversation import compare
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import Episode, default_system, offered_tools, question, scripted, size_statement
from thinkimg.conversation.picture import picture
from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.errors import UserError
from thinkimg.models.base import base_entry, base_reference
from thinkimg.puzzles.demonstrations import script
from thinkimg.records import SCHEMA_VERSION, Sample, StopReason, Trajectory, to_row
from thinkimg.resources import Machines, machines
from thinkimg.rewards.judges.attention import GENERIC
from thinkimg.rollout import view_limits
from thinkimg.stages.pairs import pairs, read_pairs
from thinkimg.store import files
from thinkimg.store.artifacts import Artifact, Recipe, Reference, Store, Work, directory_digest, package_versions
from thinkimg.store.image_table import ImageTable, encode, image_writer, load_samples

STAGE, VERSION, KIND = "warmstart", 2, "policy"
SCRIPT = "script"  # policy of the demonstrations' rows
# First image, second image, and which of them (0 or 1) is easier to answer with.
ORDERS = (("original", "right", 1), ("right", "original", 0), ("original", "wrong", 0), ("wrong", "original", 1))


def recipe(config: Config, dataset: Artifact, demonstrations: Artifact | None) -> Recipe:
    settings = config.warmstart
    inputs, learning = {"dataset": dataset.reference}, {}
    if demonstrations is not None:
        inputs["demonstrations"] = demonstrations.reference
        learning = settings.model_dump(mode="json", include={"steps", "batch", "learning_rate", "warmup_steps"})
        learning |= {"images": view_limits(config), "token_budget": config.train.token_budget}
    elif config.model.tiny is not None:
        learning = {"conversation": config.conversation.model_dump(mode="json")}  # the tokenizer is made for its texts
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={"model": model_slice(config), "warmstart": learning, "seed": config.seed},
        inputs=inputs | base_inputs(config),
        packages=package_versions("torch", "transformers", "tokenizers", "peft"),
    )  # fmt: skip


def script_recipe(config: Config, dataset: Artifact, known: Artifact | None = None) -> Recipe:
    """Of the demonstrations, which are an artifact of their own in the form of rollouts."""
    inputs = {"dataset": dataset.reference} | base_inputs(config)
    if known is not None:
        inputs["pairs"] = known.reference
    if config.warmstart.demonstrations is not None:
        inputs["script"] = Reference("script", demonstrations_digest(config.warmstart.demonstrations))
    return Recipe(
        "demonstrate", VERSION, SCHEMA_VERSION,
        config={
            "conversation": config.conversation.model_dump(mode="json"),
            "images": view_limits(config),
            "tiny": config.model.tiny and config.model.tiny.model_dump(mode="json"),
            "flaws": None if config.warmstart.demonstrations else config.warmstart.flaws.model_dump(mode="json"),
            "seed": config.seed,
        },
        inputs=inputs,
        packages=package_versions("transformers", "tokenizers", "pillow", "numpy"),
    )  # fmt: skip


def model_slice(config: Config) -> dict:
    """What defines how weights are trained; which weights these are is told by the inputs' digests, not by a path."""
    fields = {"tiny", "dtype", "load_in_4bit", "adaptation", "train_vision"}
    if config.model.adaptation == "lora":
        fields |= {"lora_rank", "lora_alpha"}
    return config.model.model_dump(mode="json", include=fields)


def has_pairs(config: Config) -> bool:
    """Whether the policy also learns to compare images."""
    return has_script(config) and config.data.source == "puzzles" and config.warmstart.pairs > 0


def has_script(config: Config) -> bool:
    """Whether there is anything to demonstrate: the built-in puzzles have scripts, other data needs a file."""
    settings = config.warmstart
    return settings.checkpoint is None and (config.data.source == "puzzles" or settings.demonstrations is not None)


def base_inputs(config: Config) -> dict[str, Reference]:
    if config.warmstart.checkpoint is not None:
        return {
            "checkpoint": Reference("checkpoint", directory_digest(checkpoint_directory(config.warmstart.checkpoint)))
        }
    return {} if config.model.tiny else {"base": base_reference(config)}


def demonstrations_digest(path: str) -> str:
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


def warmstart(
    config: Config, dataset: Artifact, store: Store, *, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """The first policy: trained on demonstrations, or a checkpoint, or the base model as it is."""
    where = config.where.public()
    with contextlib.ExitStack() as stack:
        base = BaseModel(config, dataset, stack)
        demonstrations = known = None
        if has_pairs(config):
            known, _ = pairs(config, store, split="train", count=config.warmstart.pairs, progress=progress)
        if has_script(config):

            def write(work: Work) -> None:
                demonstrate(work, config, dataset, base, progress, known)

            demonstrations, _ = store.build(
                "demonstrations", script_recipe(config, dataset, known), write, seed=config.seed, where=where
            )

        def produce(work: Work) -> None:
            with machines(config) as crew:
                train(work, config, dataset, demonstrations, base, crew, progress, known)

        plan = recipe(config, dataset, demonstrations)
        return store.build(KIND, plan, produce, seed=config.seed, where=where, force=force)


def train(
    work: Work, config: Config, dataset: Artifact, demonstrations: Artifact | None, base: "BaseModel", crew: Machines,
    progress, known: Artifact | None = None,
) -> None:  # fmt: skip
    codec = Codec.load(base.directory)
    job = {
        "kind": "warmstart",
        "base": base_entry(config) | {"directory": str(base.directory.resolve())},
        "model": config.model.model_dump(mode="json"),
        "warmstart": config.warmstart.model_dump(mode="json")
        | {"steps": config.warmstart.steps if demonstrations else 0},
        "rollouts": demonstrations and str(demonstrations.directory.resolve()),
        "images": {
            "tables": [str(artifact.directory.resolve()) for artifact in (dataset, demonstrations, known) if artifact],
            **view_limits(config),
        },
        "token_budget": config.train.token_budget,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "conversation": {
            "temperature": 1.0,
            "banned": list(codec.banned),
            "max_tokens": config.conversation.max_tokens,
        },
        "seed": config.seed,
    }
    work.discard("policy")  # of a killed run: its figures are lost, so that it is trained again
    with work.part("policy") as output:
        job["output"] = str(output.resolve())
        result = crew.trainer.submit(job, progress=lambda line: progress(line["step"], line["steps"]))
    work.metrics |= result["metrics"]


def demonstrate(
    work: Work, config: Config, dataset: Artifact, base: "BaseModel", progress, known: Artifact | None = None
) -> None:
    """Scripted conversations in the form of rollouts, so that the trainer reads both with the same code.

    `comparisons` are of the same form: one sampled token each, the rating of a pair of images.
    """
    import pyarrow as pa

    codec, images = Codec.load(base.directory), ImageTable([dataset])
    rows: list[dict] = []
    made: dict[str, tuple[bytes, int, int]] = {}  # encoded at once: thousands of decoded pictures would not fit
    todo = list(scripts(config, dataset))
    for number, (sample, index, turns) in enumerate(todo, 1):
        pictures = [picture(images.decoded(sha), config.images) for sha in sample.images]
        episode = Episode(
            sample, pictures, config.conversation, config.images, codec,
            trajectory_id=f"{sample.sample_id}-{index}", group_id=sample.sample_id, index=index, policy=SCRIPT,
        )  # fmt: skip
        trajectory = scripted(episode, turns)
        if trajectory.stop is not StopReason.ANSWER:
            hint = "it must end with an answer, within conversation.max_turns, max_turn_tokens and max_tokens"
            why = trajectory.error or f"it ended for '{trajectory.stop}'"
            raise UserError(f"the demonstration for {sample.sample_id} does not work: {why}", hint=hint)
        rows.append(to_row(trajectory))
        made |= {sha: (encode(image), *image.size) for sha, image in episode.made_images.items() if sha not in made}
        progress(number, len(todo))
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(made):
                add(sha, *made[sha])
    if known is not None and not work.has("comparisons.parquet"):
        compared = [to_row(row) for row in comparisons(known, config, codec)]
        work.table("comparisons.parquet", pa.Table.from_pylist(compared, records.trajectories()))
    if work.has("trajectories.parquet"):
        return
    work.table("trajectories.parquet", pa.Table.from_pylist(rows, records.trajectories()))


def comparisons(known: Artifact, config: Config, codec: Codec) -> Iterator[Trajectory]:
    """Every known pair four times: the original beside the right and beside the wrong image, in both orders."""
    images, ratings = ImageTable([known]), compare.rating_tokens(codec)
    prompts: dict[str, list[int]] = {}
    for row in read_pairs(known):
        sample, asked = row["sample_id"], row["question"]
        prompt = prompts.setdefault(asked, compare.prompt(codec, asked))
        grids = {
            name: picture(images.decoded(row[name]), config.images).grid for name in ("original", "right", "wrong")
        }
        for index, (first, second, better) in enumerate(ORDERS):
            yield Trajectory(
                trajectory_id=f"{sample}-compared-{index}", sample_id=sample, group_id=sample, index=index, policy=SCRIPT,
                tokens=(*prompt, ratings[better]), roles=(0,) * len(prompt) + (1,), logprobs=(0.0,),
                images=(row[first], row[second]), grids=(grids[first], grids[second]), turns=(),
                answer=compare.RATINGS[better], stop=StopReason.ANSWER, error=None, weights="scripted",
            )  # fmt: skip


def scripts(config: Config, dataset: Artifact) -> Iterator[tuple[Sample, int, list[str]]]:
    """(sample, index, texts of the model's turns)."""
    samples = load_samples(dataset, "train")
    if config.warmstart.demonstrations is None:
        form, tools = PROTOCOLS[config.conversation.protocol], config.conversation.tools != ()
        for number, sample in enumerate(samples):
            rng = np.random.default_rng([config.seed, 3, number])  # of its own: the puzzles' are [seed, number]
            yield sample, 0, script(sample, form, config.warmstart.flaws, rng, tools=tools)
        return
    known = {sample.sample_id: sample for sample in samples}
    text = Path(config.warmstart.demonstrations).read_text(encoding="utf-8")
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
            sample_id, turns = row["sample_id"], row["turns"]
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            hint = 'each line is {"sample_id": …, "turns": ["<think>…</think><tool>…</tool>", …]}'
            raise UserError(f"demonstration {number} cannot be read", hint=hint) from None
        if sample_id not in known:
            raise UserError(f"demonstration {number} names sample {sample_id}, which is not in the training split",
                            hint="take the ids from `thinkimg prepare`'s samples.parquet")  # fmt: skip
        yield known[sample_id], number, turns


class BaseModel:
    """Directory of the model to start from; a tiny one is made when it is asked for, the same every time."""

    def __init__(self, config: Config, dataset: Artifact, stack: contextlib.ExitStack):
        self._config, self._dataset, self._stack = config, dataset, stack

    @cached_property
    def directory(self) -> Path:
        config = self._config
        if config.warmstart.checkpoint is not None:
            return checkpoint_directory(config.warmstart.checkpoint)
        if config.model.tiny is None:
            from thinkimg.trainer.checkpoint import Base

            return Base(**base_entry(config)).locate()
        from thinkimg.models.tiny import create_tiny

        scratch = self._stack.enter_context(process.scratch())
        create_tiny(scratch, config.model.tiny, corpus(config, self._dataset), seed=config.seed)
        return scratch


def corpus(config: Config, dataset: Artifact) -> list[str]:
    """Texts that a tiny tokenizer should take few tokens for: system prompt, questions, scripted turns, observations."""
    settings = config.conversation
    images = ImageTable([dataset])
    system = settings.system
    texts = [default_system(settings.protocol, offered_tools(settings.tools)) if system is None else system]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    if has_pairs(config):
        texts += [compare.REPLY, GENERIC]
    demonstrated = (
        {sample.sample_id: turns for sample, _, turns in scripts(config, dataset)} if has_script(config) else {}
    )
    for sample in load_samples(dataset, "train"):
        pictures = [picture(images.decoded(sha), config.images) for sha in sample.images]
        turns = demonstrated.get(sample.sample_id, [])
        texts += [part["text"] for part in question(sample, pictures) if part["type"] == "text"] + turns
        texts += [size_statement(number, pictures[0]) for number in range(1, len(turns))]
        texts += [compare.instruction(sample.question)] if has_pairs(config) else []
    return texts
