"""The warm start: a first policy that knows the protocol, from scripted demonstrations that leave something to learn."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from thinkimg import files, schemas
from thinkimg.artifacts import Artifact, Recipe, Reference, Store, Work, directory_digest, package_versions
from thinkimg.chat.codec import Codec
from thinkimg.chat.episode import Episode, default_system, offered_tools, question, scripted
from thinkimg.chat.picture import picture
from thinkimg.chat.protocol import PROTOCOLS
from thinkimg.config import Config
from thinkimg.data.demonstrations import script
from thinkimg.data.images import ImageTable, encode, image_writer, load_samples
from thinkimg.errors import UserError
from thinkimg.machines import Machines, machines
from thinkimg.rollout import view_limits
from thinkimg.schemas import SCHEMA_VERSION, Sample, to_row

STAGE, VERSION, KIND = "warmstart", 1, "policy"
SCRIPT = "script"  # policy of the demonstrations' rows


def recipe(config: Config, dataset: Artifact) -> Recipe:
    settings = config.warmstart
    inputs = {"dataset": dataset.reference}
    if config.model.tiny is None:
        inputs["base"] = base_reference(config)
    if settings.demonstrations is not None:
        inputs["demonstrations"] = Reference("demonstrations", demonstrations_digest(settings.demonstrations))
    if settings.checkpoint is not None:
        inputs["checkpoint"] = Reference("checkpoint", directory_digest(checkpoint_directory(settings.checkpoint)))
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={
            "conversation": config.conversation.model_dump(mode="json"),
            "images": view_limits(config),
            "model": config.model.model_dump(mode="json"),
            "warmstart": settings.model_dump(mode="json", exclude={"demonstrations", "checkpoint"}),
            "seed": config.seed,
        },
        inputs=inputs,
        packages=package_versions("torch", "transformers", "tokenizers", "peft", "pillow"),
    )  # fmt: skip


def base_reference(config: Config) -> Reference:
    """A directory's digest, or a Hub id with its revision."""
    path = Path(config.model.path)
    if path.is_dir():
        return Reference("base", directory_digest(path))
    if path.is_absolute() or config.model.path.count("/") != 1:
        hint = "name a directory that save_pretrained wrote, or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        raise UserError(f"there is no model directory {config.model.path}", hint=hint)
    return Reference("base", f"{config.model.path}@{config.model.revision or 'main'}")


def demonstrations_digest(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"there is no demonstrations file {path}", hint="set warmstart.demonstrations to a JSONL file")
    return files.sha256_once(Path(path))


def checkpoint_directory(path: str) -> Path:
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise UserError(f"there is no checkpoint in {path}", hint="name a directory with config.json and model.safetensors")
    return directory


def warmstart(
    config: Config, dataset: Artifact, store: Store, *, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """The first policy: trained on demonstrations, or a checkpoint, or the base model as it is."""

    def produce(work: Work) -> None:
        with machines(config) as crew:
            train(work, config, dataset, crew, progress)

    where = config.where.model_dump(mode="json")
    return store.build(KIND, recipe(config, dataset), produce, seed=config.seed, where=where, force=force)


def train(work: Work, config: Config, dataset: Artifact, crew: Machines, progress) -> None:
    base = base_model(config, dataset, crew)
    demonstrations = None
    if config.data.source == "puzzles" or config.warmstart.demonstrations is not None:
        write_demonstrations(work, config, dataset, base)
        demonstrations = str(work.directory.resolve())
    if work.has("policy"):
        return
    codec = Codec.load(base)
    job = {
        "kind": "warmstart",
        "base": base_entry(config) | {"directory": str(Path(base).resolve())},
        "model": config.model.model_dump(mode="json"),
        "warmstart": config.warmstart.model_dump(mode="json")
        | {"steps": config.warmstart.steps if demonstrations and config.warmstart.checkpoint is None else 0},
        "rollouts": demonstrations,
        "images": {"tables": [str(dataset.directory.resolve()), str(work.directory.resolve())], **view_limits(config)},
        "conversation": {"temperature": 1.0, "banned": list(codec.banned), "max_tokens": config.conversation.max_tokens},
        "seed": config.seed,
    }
    with work.part("policy") as output:
        result = crew.trainer.submit(job | {"output": str(output.resolve())}, progress=progress)
    work.metrics |= result["metrics"]


def write_demonstrations(work: Work, config: Config, dataset: Artifact, base: Path) -> None:
    """Scripted conversations in the form of rollouts, so that the trainer reads both with the same code."""
    import pyarrow as pa

    if work.has("trajectories.parquet"):
        return
    codec, images = Codec.load(base), ImageTable([dataset])
    rows: list[dict] = []
    made: dict[str, tuple[bytes, int, int]] = {}  # encoded at once: thousands of decoded pictures would not fit
    for sample, index, turns in scripts(config, dataset):
        pictures = [picture(images.decoded(sha), config.images) for sha in sample.images]
        episode = Episode(
            sample, pictures, config.conversation, config.images, codec,
            trajectory_id=f"{sample.sample_id}-{index}", group_id=sample.sample_id, index=index, policy=SCRIPT,
        )  # fmt: skip
        rows.append(to_row(scripted(episode, turns)))
        made |= {sha: (encode(image), *image.size) for sha, image in episode.made_images.items() if sha not in made}
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(made):
                add(sha, *made[sha])
    work.table("trajectories.parquet", pa.Table.from_pylist(rows, schemas.trajectories()))


def scripts(config: Config, dataset: Artifact) -> Iterator[tuple[Sample, int, list[str]]]:
    """(sample, index, texts of the model's turns)."""
    samples = load_samples(dataset, "train")
    if config.warmstart.demonstrations is None:
        form, tools = PROTOCOLS[config.conversation.protocol], config.conversation.tools != ()
        for number, sample in enumerate(samples):
            rng = np.random.default_rng([config.seed, number])
            yield sample, 0, script(sample, form, config.warmstart.flaws, rng, tools=tools)
        return
    known = {sample.sample_id: sample for sample in samples}
    text = Path(config.warmstart.demonstrations).read_text(encoding="utf-8")
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
            sample_id, turns = str(row["sample_id"]), [str(turn) for turn in row["turns"]]
        except (ValueError, TypeError, KeyError):
            hint = 'each line is {"sample_id": …, "turns": ["<think>…</think><tool>…</tool>", …]}'
            raise UserError(f"demonstration {number} cannot be read", hint=hint) from None
        if sample_id not in known:
            raise UserError(f"demonstration {number} names sample {sample_id}, which is not in the training split",
                            hint="take the ids from `thinkimg prepare`'s samples.parquet")  # fmt: skip
        yield known[sample_id], number, turns


def base_model(config: Config, dataset: Artifact, crew: Machines) -> Path:
    """Directory of the model to start from; the tiny one is made on the spot, the same every time."""
    if config.warmstart.checkpoint is not None:
        return checkpoint_directory(config.warmstart.checkpoint)
    if config.model.tiny is None:
        from thinkimg.grpo.checkpoint import Base

        return Base(**base_entry(config)).locate()
    from thinkimg.tiny import create_tiny

    directory = crew.scratch / "tiny"
    create_tiny(directory, config.model.tiny, corpus(config, dataset), seed=config.seed)
    return directory


def base_entry(config: Config) -> dict[str, str | None]:
    """The base model as jobs name it (grpo.checkpoint.Base): by Hub id, or by the digest of its directory."""
    if config.model.tiny is not None:
        return {"name": "tiny", "revision": None, "directory": None}
    reference, path = base_reference(config), Path(config.model.path)
    if path.is_dir():
        return {"name": f"model/{reference.digest}", "revision": None, "directory": str(path.resolve())}
    return {"name": config.model.path, "revision": config.model.revision, "directory": None}


def corpus(config: Config, dataset: Artifact) -> list[str]:
    """Texts that a tiny tokenizer should take few tokens for: system prompt, questions, scripted turns, observations."""
    settings = config.conversation
    images = ImageTable([dataset])
    system = settings.system
    texts = [default_system(settings.protocol, offered_tools(settings.tools)) if system is None else system]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    for sample, _, turns in scripts(config, dataset):
        pictures = [picture(images.decoded(sha), config.images) for sha in sample.images]
        texts += [part["text"] for part in question(sample, pictures) if part["type"] == "text"] + turns
    return texts
