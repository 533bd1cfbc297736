"""Write demonstrations: scripted conversations in the form of rollouts, which the warm start imitates."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.conversation import compare
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script, render_system_prompt
from thinkimg.conversation.picture import make_picture, model_view_size
from thinkimg.conversation.question import state_question, state_size
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data.json_lines import read_json_lines, require_json_lines
from thinkimg.data.tables.json_lines import PEEK
from thinkimg.disk import writing
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import BaseSource, locate_checkpoint
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.puzzles.demonstrations import write_script
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory, TurnKind, to_row
from thinkimg.resources import Resources, locate_base
from thinkimg.rewards.judges.attention import GENERIC
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.stage import Input, Job, Slice, Stage, write_images
from thinkimg.store import files
from thinkimg.store.image_table import ImageTable, encode_lossless
from thinkimg.store.kinds import Dataset, Demonstrations, Pairs
from thinkimg.store.manifest import Reference, canonical_json, directory_digest

log = logging.getLogger(__name__)

SCRIPT = "script"  # policy of the demonstrations' rows
# First image, second image, and the index of the one that helps.
ORDERS = (("original", "right", 1), ("right", "original", 0), ("original", "wrong", 0), ("wrong", "original", 1))


class DemonstrateSettings(Slice):
    """Slice of `demonstrate`, and part of that of `warmstart`."""

    conversation: ConversationConfig
    images: ViewLimits
    tiny: TinyModel | None
    flaws: Flaws | None
    """None where a user's file holds the conversations."""
    seed: int
    base: BaseSource = Field(exclude=True)
    checkpoint: str | None = Field(exclude=True)
    """Directory of a model to start from, in place of the base."""
    script: str | None = Field(exclude=True)
    """File of a user's conversations."""
    demonstrates: bool = Field(exclude=True)
    compares: bool = Field(exclude=True)
    """True if pairs of images are compared, too."""

    def outside(self) -> dict[str, Reference]:
        """Return the references of the model to start from, and of the user's file."""
        inputs = {}
        if self.checkpoint is not None:
            inputs["checkpoint"] = Reference("checkpoint", directory_digest(locate_checkpoint(self.checkpoint)))
        elif not self.base.tiny:
            inputs["base"] = self.base.reference()
        if self.script is not None:
            inputs["script"] = Reference("script", hash_script(self.script))
        return inputs


class Script(BaseModel):
    """Line of a user's file of conversations."""

    sample_id: str
    turns: list[str]
    """Texts of the model's turns."""


def demonstrate_fields(config: Config) -> dict[str, Any]:
    """Return the fields of DemonstrateSettings."""
    return {
        "conversation": config.talk(),
        "images": config.view(),
        "tiny": config.model.tiny,
        "flaws": None if config.warmstart.demonstrations else config.warmstart.flaws,
        "seed": config.seed,
        "base": BaseSource.of(config.model),
        "family": config.family().name,
        "checkpoint": config.warmstart.checkpoint,
        "script": config.warmstart.demonstrations,
        "demonstrates": config.has_demonstrations,
        "compares": config.compares_pairs,
    }


def settings_of(config: Config) -> DemonstrateSettings:
    """Return the slice of the config."""
    return DemonstrateSettings(**demonstrate_fields(config))


def run(job: Job[DemonstrateSettings]) -> None:
    """Write the content: trajectories.parquet and images.parquet, in the form of rollouts.

    comparisons.parquet has the same form: in each row one sampled token, the rating of a pair of images. Of a user's
    demonstrations those are left out that can't be used. Raises UserError where none can.
    """
    settings, work, dataset = job.settings, job.work, job.inputs["dataset"]
    start, images = locate_start(settings, dataset, job.resources), ImageTable([dataset])
    spec = ConversationSpec.load(settings.conversation, settings.images, start)
    rows: list[dict[str, Any]] = []
    encoded: dict[str, tuple[bytes, int, int]] = {}  # at once: thousands of decoded pictures would not fit
    left_out: list[UserError] = []
    failed: list[str] = []
    todo = list(read_scripts(settings, dataset, left_out))
    for number, (sample, index, turns) in enumerate(todo, 1):
        pictures = [make_picture(images.decoded(sha), settings.images) for sha in sample.images]
        episode = Episode(sample, pictures, spec, policy=SCRIPT, group_id=sample.sample_id, index=index)
        trajectory = play_script(episode, turns)
        if fault := find_fault(trajectory, episode, checks_tools=settings.script is not None):
            if settings.script is None:
                raise fault
            left_out.append(fault)
            continue
        rows.append(to_row(trajectory))
        failed += [sentence] if (sentence := find_failed_call(trajectory)) else []
        images_made = episode.made_images.items()
        encoded |= {sha: (encode_lossless(image), *image.size) for sha, image in images_made if sha not in encoded}
        job.progress(number, len(todo))
    if left_out:
        warn_of_faults(left_out, len(rows))
        work.metrics["left_out"] = len(left_out)
    if failed:
        log.warning(
            "In %d of %d demonstrations a call fails, which the model learns, too. The first is that for %s Positions "
            "are in %s (conversation.coordinates).", len(failed), len(rows), failed[0], settings.conversation.unit,
        )  # fmt: skip
    write_images(work, "images.parquet", ((sha, *encoded[sha]) for sha in sorted(encoded)))
    if "pairs" in job.inputs and not work.has("comparisons.parquet"):
        compared = [to_row(row) for row in compare_pairs(job.inputs["pairs"], spec)]
        work.table("comparisons.parquet", pa.Table.from_pylist(compared, records.trajectory_schema()))
    if not work.has("trajectories.parquet"):
        work.table("trajectories.parquet", pa.Table.from_pylist(rows, records.trajectory_schema()))


def compare_pairs(pairs: Pairs, spec: ConversationSpec) -> Iterator[Trajectory]:
    """Yield every known pair four times: the original beside the right and the wrong image, in both orders."""
    codec, images = spec.codec, ImageTable([pairs])
    ratings = compare.rating_tokens(codec)
    prompts: dict[str, list[int]] = {}
    for row in pairs.rows():
        sample, question = row["sample_id"], row["question"]
        prompt = prompts.setdefault(question, compare.encode_comparison(codec, question))
        seen = {name: make_picture(images.decoded(row[name]), spec.view) for name in ("original", "right", "wrong")}
        for index, (first, second, better) in enumerate(ORDERS):
            yield Trajectory(
                trajectory_id=f"{sample}-compared-{index}", sample_id=sample, group_id=sample, index=index,
                policy=SCRIPT, tokens=(*prompt, ratings[better]), roles=(0,) * len(prompt) + (1,), logprobs=(0.0,),
                images=(row[first], row[second]), grids=(seen[first].grid, seen[second].grid), turns=(),
                answer=compare.RATINGS[better], stop=StopReason.ANSWER, error=None, weights="scripted",
                sizes=(seen[first].view.size, seen[second].view.size), coordinates=spec.conversation.unit,
            )  # fmt: skip


def read_scripts(
    settings: DemonstrateSettings, dataset: Dataset, left_out: list[UserError] | None = None
) -> Iterator[tuple[Sample, int, list[str]]]:
    """Yield (sample, index, texts of the model's turns).

    left_out: gets an error for each line of a user's file that is no demonstration of a training sample. Raises
    UserError for a file of another kind.
    """
    samples = dataset.split("train")
    if settings.script is None:
        assert settings.flaws is not None, "there is no user's file"
        for number, sample in enumerate(samples):
            rng = np.random.default_rng([settings.seed, 3, number])  # of its own: the puzzles' are [seed, number]
            yield sample, 0, write_script(sample, settings.conversation, settings.flaws, rng)
        return
    by_id = {sample.sample_id: sample for sample in samples}
    path = Path(settings.script)
    require_json_lines(path, [record for _, record in islice(read_json_lines(path), PEEK)])
    faults: list[UserError] = [] if left_out is None else left_out
    for number, (line, record) in enumerate(read_json_lines(path), 1):
        try:
            row = Script.model_validate(record)
        except ValidationError:
            hint = 'Each line is {"sample_id": …, "turns": ["…", …]}, with the texts of the turns.'
            why = f": {record}" if isinstance(record, str) else ""
            faults.append(UserError(f"Demonstration {number} (line {line}) cannot be read{why}.", hint=hint))
            continue
        if row.sample_id in by_id:
            yield by_id[row.sample_id], number, row.turns
        else:
            hint = "Take the ids of the split `train`, such as `thinkimg data show` prints them."
            faults.append(
                UserError(f"Demonstration {number} names '{row.sample_id}', which is no training sample.", hint=hint)
            )


def find_fault(trajectory: Trajectory, episode: Episode, *, checks_tools: bool) -> UserError | None:
    """Return an error for a demonstration with a turn that breaks the protocol or calls a tool that is not on offer,
    and for one that does not end with an answer.

    The model would learn the mistake. checks_tools: look at the tools.
    """
    for number, turn in enumerate(trajectory.turns, 1):
        if turn.kind is TurnKind.MALFORMED and turn.observation is not None:  # else a limit has cut it off
            return UserError(
                f"The demonstration for {trajectory.sample_id} breaks the protocol {episode.config.form} in turn "
                f"{number}: {turn.error}",
                hint="Write its turns so, or set conversation.protocol to the one in which they are written.",
            )
        if checks_tools and turn.kind is TurnKind.TOOL and turn.tool not in episode.tools:
            offered = ", ".join(episode.tools) or "none"
            return UserError(
                f"The demonstration for {trajectory.sample_id} calls the tool {turn.tool!a} in turn {number}, which is "
                "not on offer.",
                hint=f"On offer by conversation.tools: {offered}.",
            )
    if trajectory.stop is not StopReason.ANSWER:
        hint = "It must end with an answer, within conversation.max_turns, max_turn_tokens and max_tokens."
        reason = trajectory.error or f"it ended for '{trajectory.stop}'."
        return UserError(f"The demonstration for {trajectory.sample_id} does not work: {reason}", hint=hint)
    return None


def find_failed_call(trajectory: Trajectory) -> str | None:
    """Return the sample, the turn and the error of the first call that failed; None for none."""
    for number, turn in enumerate(trajectory.turns, 1):
        if turn.status is CallStatus.ERROR:
            return f"{trajectory.sample_id}, turn {number}: {turn.error}"
    return None


def warn_of_faults(faults: Sequence[UserError], rows: int) -> None:
    """Say how many demonstrations are left out. Raises UserError where none is left."""
    first = faults[0]
    if not rows and len(faults) == 1:
        raise first
    if not rows:
        raise UserError(f"None of {len(faults)} demonstrations can be used. {first.message}", hint=first.hint)
    log.warning("%d of %d demonstrations are left out. %s", len(faults), len(faults) + rows, first)


def hash_script(path: str) -> str:
    """Return the sha256 of a user's file. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(
            f"There is no demonstrations file {path}.", hint="Set warmstart.demonstrations to a JSONL file."
        )
    return files.sha256_once(Path(path))


def locate_start(settings: DemonstrateSettings, dataset: Dataset, resources: Resources) -> Path:
    """Return the directory of the model to start from; a tiny one is made on demand, the same every time."""
    if settings.checkpoint is not None:
        return locate_checkpoint(settings.checkpoint)
    if settings.tiny is None:
        return locate_base(settings.base)

    shared = settings.model_dump(mode="json", include=set(DemonstrateSettings.model_fields))  # with the warm start
    defining = [dataset.digest, shared, settings.script, settings.compares]
    name = hashlib.sha256(canonical_json(defining).encode()).hexdigest()[:16]
    directory = resources.scratch / f"tiny-{name}"
    if not directory.exists():
        half = resources.scratch / f"half-{name}"
        texts = collect_texts(settings, dataset)
        with writing(half):
            half.mkdir()
            create_tiny(half, settings.tiny, texts, seed=settings.seed)
            half.rename(directory)
    return directory


def collect_texts(settings: DemonstrateSettings, dataset: Dataset) -> list[str]:
    """Return the texts that a tiny tokenizer should encode in few tokens: prompts, scripted turns, observations."""
    images, unit = ImageTable([dataset]), settings.conversation.unit
    texts = [render_system_prompt(settings.conversation)]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    if settings.compares:
        texts += [compare.REPLY, GENERIC]
    demonstrated = (
        {sample.sample_id: turns for sample, _, turns in read_scripts(settings, dataset)}
        if settings.demonstrates
        else {}
    )
    for sample in dataset.split("train"):
        sizes = [model_view_size(images.decoded(sha), settings.images) for sha in sample.images]
        turns = demonstrated.get(sample.sample_id, [])
        texts += [state_question(sample, sizes, unit), *turns]
        texts += [state_size(number, sizes[0], unit) for number in range(1, len(turns))]
        texts += [compare.render_instruction(sample.question)] if settings.compares else []
    return texts


demonstrate = Stage(
    name="demonstrate",
    version=4,
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
