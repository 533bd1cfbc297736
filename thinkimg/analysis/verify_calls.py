"""Replay of tool calls: a tool's image is a pure function of its source image and the call, so it can be verified."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from thinkimg.conversation.picture import model_view_size
from thinkimg.errors import UserError
from thinkimg.images import toolbox
from thinkimg.images.decode import decode, pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.tool import Tool
from thinkimg.records import CallStatus, Sample, Trajectory, Turn, TurnKind
from thinkimg.store.artifacts import Problem, Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import Artifact

MAX_PROBLEMS = 20  # in a report


@dataclass
class Replay:
    """Result of a replay."""

    calls: int = 0
    """Tool calls that ran again."""
    images: int = 0
    """Stored images whose pixels were hashed again."""
    problems: list[Problem] = field(default_factory=list)
    note: str = ""
    """Reason if nothing was replayed."""


def can_replay(artifact: Artifact) -> bool:
    """Tell whether it holds trajectories with tool images; a blind evaluation shows grey ones instead."""
    tables = any(name.startswith("trajectories") for name in artifact.files)
    return tables and not artifact.manifest["recipe"]["config"].get("blind", False)


def replay(artifact: Artifact, store: Store, progress: Callable[[int, int], None] = lambda done, total: None) -> Replay:
    """Run every tool call of an artifact's trajectories again, and compare the result with the stored one.

    Pixels are compared by hash; one batch of trajectories is in memory at a time. Samples come from the data set in the
    manifest, tools from its recipe. If one of these is gone, nothing is replayed and `note` says so.
    """
    result = Replay()
    if artifact.dropped:
        result.note = "its files were dropped: no tool call was replayed"
        return result
    try:
        dataset = store.origin(artifact, "dataset")
        samples = {sample.sample_id: sample for sample in dataset.samples()}
    except UserError as error:
        result.note = f"no tool call was replayed, as its data set cannot be read: {error.message}"
        return result
    try:
        tools = toolbox.load_tools(artifact.tools)
    except UserError as error:
        result.note = f"no tool call was replayed, as a tool is missing: {error.message}"
        return result
    images, limits = ImageTable([dataset]), ViewLimits(**artifact.manifest["recipe"]["config"]["images"])
    check_images(artifact, result)
    total = sum(artifact.parts().values())
    for done, trajectory in enumerate(artifact.trajectories(), 1):
        replay_trajectory(trajectory, samples[trajectory.sample_id], images, limits, tools, result)
        if len(result.problems) >= MAX_PROBLEMS:
            break
        progress(done, total)
    return result


def check_images(artifact: Artifact, result: Replay) -> None:
    """Decode every stored image, and compare its pixels with the hash in its name."""
    if not any(name.startswith("images") for name in artifact.files):
        return  # evaluations keep none: a replay makes them again
    for batch in artifact.batches("images", rows=16):
        for row in batch.to_pylist():
            result.images += 1
            if pixel_hash(decode(row["data"])) != row["sha256"]:
                result.problems.append(Problem("images", f"the pixels of {row['sha256'][:12]}… do not match its hash"))


def replay_trajectory(
    trajectory: Trajectory,
    sample: Sample,
    images: ImageTable,
    limits: ViewLimits,
    tools: Mapping[str, Tool],
    replay: Replay,
) -> None:
    """Run one trajectory's calls again, up to the first whose result is not the stored one."""
    pictures = [images.decoded(sha256) for sha256 in sample.images]
    for number, turn, result in replay_calls(trajectory, pictures, limits, tools):
        replay.calls += 1
        image = pixel_hash(result.image) if result.image else None
        same = image == turn.image and result.source == turn.source
        if turn.image is None:
            same = same and result.text == turn.observation
        if not same:
            where = f"{trajectory.trajectory_id} turn {number + 1}"
            replayed = result.error or (f"{image[:12]}…" if image else repr(result.text))
            stored = f"{turn.image[:12]}…" if turn.image else repr(turn.observation)
            text = f"{where}: {turn.tool} {turn.args} gives {replayed}, stored is {stored}"
            replay.problems.append(Problem("trajectories", text))
            return  # later calls may build on this one
        if result.image is not None:
            pictures.append(result.image)


def replay_calls(
    trajectory: Trajectory, pictures: Sequence[Image.Image], limits: ViewLimits, tools: Mapping[str, Tool]
) -> Iterator[tuple[int, Turn, toolbox.ToolResult]]:
    """Run a trajectory's calls in order; yield (number of the turn, turn, result).

    pictures: of the sample. The caller adds what a call made before it asks for the next: calls work on earlier images.
    """
    sizes = partial(model_view_size, limits=limits)
    for number, turn in enumerate(trajectory.turns):
        shown = turn.image is not None or (turn.status is CallStatus.OK and turn.observation is not None)
        if turn.kind is TurnKind.TOOL and shown:  # a refused call has no result but its error text
            args = json.loads(turn.args or "{}")
            yield number, turn, toolbox.run_tool(turn.tool, args, pictures, sizes, tools, trajectory.coordinates)
