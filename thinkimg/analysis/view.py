"""Conversations of one artifact for a person: each with its pictures, its scores and judgements, and its advantage."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from PIL.Image import Image

from thinkimg.analysis.explain import Weighed, parse_score, read_components, weigh
from thinkimg.analysis.joined import open_scores
from thinkimg.analysis.pictures import Pictures
from thinkimg.analysis.system_prompt import find_system_prompt, find_vocabulary
from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.records import Sample, Trajectory
from thinkimg.rewards import sentences
from thinkimg.rewards.mix import RIGHT
from thinkimg.stages.evaluate import score_rows
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset, Episodes, Evaluation, Scores
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.records import find_loop

log = logging.getLogger(__name__)

ROWS = 256
"""Conversations in memory at a time."""


@dataclass(frozen=True)
class Entry:
    """Conversation with all that is known about it."""

    row: Trajectory
    sample: Sample
    images: Mapping[str, Image]
    """Pixel hash -> RGB image at full resolution."""
    components: Mapping[str, Mapping[str, Any]]
    """Component -> value, status, reason, evidence, judgements; empty where nothing was scored."""
    weighed: Sequence[Mapping[str, Any]]
    """Terms, total and advantage under each mix, as `explain.Weighed` states them."""
    tools: tuple[str, ...] | None
    """`conversation.tools` of the row, for the boxes that they cut out."""

    @property
    def is_right(self) -> bool | None:
        """True where the answer is right; None where it was not judged."""
        value = self.components.get("answer", {}).get("value")
        return None if value is None else value >= RIGHT


class View:
    """Conversations of rollouts, scores, an evaluation or demonstrations.

    episodes: the conversations. scores: the newest of them, or those that were asked for; None where there are none.
    """

    def __init__(self, store: Store, artifact: Artifact, config: Config) -> None:
        """config: its mix is shown where no policy was trained on the scores. Raises UserError for other artifacts."""
        self.store, self.artifact = store, artifact
        self.scores: Scores | None = None
        if isinstance(artifact, Scores):
            self.scores, self.episodes = artifact, store.origin(artifact, "rollouts")
        elif isinstance(artifact, Episodes):
            self.episodes = artifact
            self.scores = newest_scores(store, artifact)
        else:
            raise UserError(
                f"{artifact.reference} holds no conversations.", hint="Name rollouts, scores, or an evaluation."
            )
        self.dataset: Dataset = store.origin(self.episodes, "dataset")
        self._pictures = Pictures(self.episodes, self.dataset)
        self._weighed: list[Weighed] = weigh(store, open_scores(self.scores, store), config) if self.scores else []

    @cached_property
    def system(self) -> str | None:
        """System prompt of the conversations, as `read_system_prompt` returns it."""
        return read_system_prompt(self.store, self.episodes)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.episodes.ids())}

    def entries(self, ids: Sequence[str] | None = None) -> Iterator[Entry]:
        """Yield the conversations in the order of their artifact, all or those of some ids."""
        trajectories = self.episodes.trajectories(ids=ids)
        while rows := list(islice(trajectories, ROWS)):
            yield from self.describe(rows)

    def describe(self, rows: Sequence[Trajectory]) -> Iterator[Entry]:
        """Yield the conversations of some rows in that order; samples and scores are read once, pictures one by one."""
        samples, components = self.dataset.samples_of(rows), self._components(rows)
        for row in rows:
            sample = samples.get(row.sample_id)
            if sample is None:
                raise UserError(f"{self.dataset.reference} has no sample {row.sample_id}.")
            yield Entry(
                row,
                sample,
                self._pictures.of(row, sample),
                components.get(row.trajectory_id, {}),
                [weighed.explain(row, self._order[row.trajectory_id]) for weighed in self._weighed],
                self._pictures.tools,
            )

    def group(self, group_id: str) -> list[Entry]:
        """Return the conversations of a group, in their order."""
        rows = self.episodes.rows(["trajectory_id", "group_id"])
        return list(self.entries([row["trajectory_id"] for row in rows if row["group_id"] == group_id]))

    def _components(self, rows: Sequence[Trajectory]) -> dict[str, dict[str, dict[str, Any]]]:
        if self.scores is not None:
            return read_components(self.scores, [row.trajectory_id for row in rows])
        if isinstance(self.episodes, Evaluation):
            return score_answers(self.episodes, self.dataset, rows)
        return {}


def read_system_prompt(store: Store, episodes: Episodes) -> str | None:
    """Return the system prompt of conversations; None where it is not stored and can't be rendered on this machine.

    A warning says where it is not the stored one.
    """
    conversation = episodes.manifest["recipe"]["config"].get("conversation", {})
    try:
        prompt = find_system_prompt(
            find_loop(store, episodes), conversation, episodes, find_vocabulary(store, episodes)
        )
    except UserError:
        return None
    if not prompt.is_stored:
        log.warning("The system prompt of %s is not stored: this version of thinkimg renders it.", episodes.reference)
    return prompt.text


def newest_scores(store: Store, rollouts: Artifact) -> Scores | None:
    """Return the newest scores of some rollouts, None if there are none."""
    inputs = ((scores, scores.inputs.get("rollouts")) for scores in store.list("scores") if not scores.dropped)
    candidates = [scores for scores, source in inputs if source and source.digest == rollouts.digest]
    return max(candidates, key=lambda scores: scores.manifest["finished"], default=None)


def score_answers(
    evaluation: Evaluation, dataset: Dataset, rows: Sequence[Trajectory]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return trajectory id -> the component `answer`, as the evaluation judged it: it stores no scores of single rows.

    Verdicts of a model on sentences are those of its ledger.
    """
    ledgers = evaluation.table_files(sentences.TABLE) if evaluation.has_table(sentences.TABLE) else []
    verdicts = {answer: verdict for path in ledgers for answer, verdict in sentences.read_ledger(path).items()}
    tolerance = evaluation.manifest["recipe"]["config"]["number_tolerance"]
    scores = score_rows(rows, dataset.samples_of(rows), tolerance, ImageTable([dataset]), verdicts)
    return {
        row.trajectory_id: {"answer": parse_score(score.row()) | {"judgements": []}}
        for row, score in zip(rows, scores, strict=True)
    }


def explain_component(component: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason of a component's value, and each judgement behind it."""
    if component["reason"]:
        yield component["reason"]
    for judgement in component["judgements"]:
        if "model" not in judgement:
            yield f"Judgement {judgement['key']} is not stored."
            continue
        reason = f": {judgement['reason']}" if judgement.get("reason") else "."
        judge = f"{judgement.get('judge') or 'no judge'} ({judgement['model']})"
        yield f"{format_score(judgement['value'])} by {judge}{reason}"


def format_score(value: float | None) -> str:
    """Return a value with four significant digits, or "none"."""
    return "none" if value is None else f"{value:.4g}"
