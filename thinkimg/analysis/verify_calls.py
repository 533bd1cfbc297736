"""Replaying tool calls: an image that a tool made is a pure function of its source image and the call, so it can be proved."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from thinkimg.conversation.picture import size_seen
from thinkimg.errors import UserError
from thinkimg.images import toolbox
from thinkimg.images.decode import decode, pixel_hash
from thinkimg.images.settings import ImagesConfig
from thinkimg.images.tool import Tool
from thinkimg.records import CallStatus, Sample, Trajectory, TurnKind
from thinkimg.store.artifacts import Artifact, Problem, Store
from thinkimg.store.image_table import ImageTable

MOST = 20  # problems that are told


@dataclass
class Replay:
    """calls: tool calls carried out again; images: stored images whose pixels were hashed again."""

    calls: int = 0
    images: int = 0
    problems: list[Problem] = field(default_factory=list)
    note: str = ""
    """The reason where nothing was replayed."""


def can_replay(artifact: Artifact) -> bool:
    """Tell whether it holds trajectories in which the model saw what the tools made (a blind evaluation shows grey images)."""
    tables = any(name.startswith("trajectories") for name in artifact.files)
    return tables and not artifact.manifest["recipe"]["config"].get("blind", False)


def replay(artifact: Artifact, store: Store, progress: Callable[[int, int], None] = lambda done, total: None) -> Replay:
    """Carry out every tool call of an artifact's trajectories again and compare what came of it with what is stored.

    Pixels are compared by hash. A batch of trajectories is in memory at a time. The samples come from the data set that the
    manifest names, the tools are those of its recipe; where one of these is gone, nothing is replayed and `note` says so.
    """
    found = Replay()
    if artifact.dropped:
        found.note = "its files were dropped: no tool call was replayed"
        return found
    entry = artifact.manifest["recipe"]["inputs"]["dataset"]
    try:
        dataset = store.resolve(f"{entry['kind']}/{entry['fingerprint']}/{entry['attempt']}")
        samples = {sample.sample_id: sample for sample in dataset.samples()}
    except UserError as error:
        found.note = f"its data set cannot be read, so no tool call was replayed ({error.message})"
        return found
    try:
        tools = toolbox.load_tools(artifact.tools)
    except UserError as error:
        found.note = f"a tool is not here, so no tool call was replayed ({error.message})"
        return found
    images, limits = ImageTable([dataset]), ImagesConfig(**artifact.manifest["recipe"]["config"]["images"])
    check_stored(artifact, found)
    total = sum(artifact.parts().values())
    for done, trajectory in enumerate(artifact.trajectories(), 1):
        again(trajectory, samples[trajectory.sample_id], images, limits, tools, found)
        if len(found.problems) >= MOST:
            return found
        progress(done, total)
    return found


def check_stored(artifact: Artifact, found: Replay) -> None:
    """Every stored image decodes to the pixels that it is named after."""
    if not any(name.startswith("images") for name in artifact.files):
        return  # evaluations keep none: what a tool made can be made again
    for batch in artifact.batches("images", rows=16):
        for row in batch.to_pylist():
            found.images += 1
            if pixel_hash(decode(row["data"])) != row["sha256"]:
                found.problems.append(Problem("images", f"{row['sha256'][:12]}… has other pixels than its name says"))


def again(
    trajectory: Trajectory,
    sample: Sample,
    images: ImageTable,
    limits: ImagesConfig,
    tools: Mapping[str, Tool],
    found: Replay,
) -> None:
    """One conversation's calls, in order: each may work on what the ones before have made."""
    pictures: list[Image.Image] = [images.decoded(sha256) for sha256 in sample.images]
    sizes = partial(size_seen, config=limits)
    for number, turn in enumerate(trajectory.turns):
        shown = turn.image is not None or (turn.status is CallStatus.OK and turn.observation is not None)
        if turn.kind is not TurnKind.TOOL or not shown:
            continue  # a refused call has no outcome but its error text
        result = toolbox.run(turn.tool, json.loads(turn.args), pictures, sizes, tools)
        found.calls += 1
        made = pixel_hash(result.image) if result.image else None
        same = made == turn.image and result.source == turn.source
        if turn.image is None:
            same = same and result.text == turn.observation
        if not same:
            where = f"{trajectory.trajectory_id} turn {number + 1}"
            told = result.error or (f"made {made[:12]}…" if made else f"said {result.text!r}")
            wanted = f"{turn.image[:12]}…" if turn.image else repr(turn.observation)
            found.problems.append(
                Problem("trajectories", f"{where}: {turn.tool} {turn.args} replayed {told}, stored is {wanted}")
            )
            return  # later calls may build on this one
        if result.image is not None:
            pictures.append(result.image)
