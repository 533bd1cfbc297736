"""The rows of every table as frozen dataclasses, and their versioned pyarrow schemas."""

import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter

SCHEMA_VERSION = 4  # raised with any change of a table; part of every fingerprint
PUZZLES = "puzzles"  # the source of the built-in puzzles, whose samples have no columns of a user's
THOUSAND = 1000
PATCH_1 = 14  # pixels of a patch side in version 1, which knew one family of models
R = TypeVar("R", "Sample", "Trajectory")


class AnswerType(StrEnum):
    """Comparison of an answer with the right one."""

    CHOICE = "choice"  # equal after normalisation, or the letter of the choice
    NUMBER = "number"  # within a relative tolerance, or to decimal places
    INTEGER = "integer"  # the same whole number
    TEXT = "text"  # ANLS
    EXACT = "exact"  # equal after normalisation: yes and no, colours
    VOTES = "votes"  # given by at least three of ten annotators (VQA's soft accuracy)
    BOX = "box"  # intersection over union
    MATHS = "maths"  # equivalent expressions
    JUDGE = "judge"  # the same in the eyes of a model, for sentences


class Role(StrEnum):
    """Origin of a token; stored as its index in this order."""

    PROMPT = "prompt"
    SAMPLED = "sampled"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """Reason for the end of a trajectory."""

    ANSWER = "answer"  # the model gave an answer
    MAX_TURNS = "max_turns"  # the turns ran out before an answer: excluded from loss and group statistics
    MAX_TOKENS = "max_tokens"  # no room for another turn in the context
    TRUNCATED = "truncated"  # a turn reached its token limit before it ended
    FAILED = "failed"  # the engine or a tool broke: a row with an error, not a crash


class TurnKind(StrEnum):
    """Kind of a turn of the model, as it was parsed."""

    TOOL = "tool"
    ANSWER = "answer"
    MALFORMED = "malformed"


class CallStatus(StrEnum):
    """Outcome of a tool call."""

    OK = "ok"
    ERROR = "error"  # an error text went back to the model
    DUPLICATE = "duplicate"  # same pixels as an image that the conversation already holds


class Coordinates(StrEnum):
    """Unit in which the model writes positions on an image."""

    PIXELS = "pixels"
    """Pixels of the image as the model sees it."""
    THOUSANDTHS = "thousandths"
    """Thousandths of the image's width and height, as Qwen3-VL was trained on."""

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height), in this unit, of an image that is seen at (width, height) pixels."""
        return (THOUSAND, THOUSAND) if self is Coordinates.THOUSANDTHS else (size[0], size[1])


@dataclass(frozen=True)
class Sample:
    """One question about one or more images (content hashes into the `images` table)."""

    sample_id: str
    question: str
    answers: tuple[str, ...]
    """The right answers; the first is the one that people are shown."""
    answer_type: AnswerType
    choices: tuple[str, ...]
    images: tuple[str, ...]
    source: str
    split: str  # "train" or "held_out"
    metadata: dict[str, Any] = field(default_factory=dict)
    """Facts about a puzzle: its family, photograph and solution."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The user's own columns by the user's names; no code of thinkimg reads them."""
    targets: tuple[tuple[float, float, float, float], ...] = ()
    """Regions to look at: (x, y, width, height) in pixels of the (only) picture at full resolution."""
    tolerance: float | None = None
    """Relative tolerance of a number; None where the reward's own holds."""
    decimals: int | None = None
    """Decimal places to which a number is compared; None where it is not rounded."""
    order: tuple[int, ...] = ()
    """Place in the data set of each of the choices, if they were shuffled."""

    @property
    def answer(self) -> str:
        """The first of the right answers."""
        return self.answers[0]


@dataclass(frozen=True)
class Turn:
    """One turn of the model and what came back; the text is for people, the truth is in the tokens."""

    text: str  # as it is parsed: after the thought that the chat template opened, where it opens one
    kind: TurnKind
    tool: str | None = None
    args: str | None = None  # canonical JSON
    status: CallStatus | None = None  # None where there was no tool call
    error: str | None = None  # what was wrong with the turn or the call, as told to the model
    source: int | None = None  # index of the image that the tool worked on
    image: str | None = None  # hash of the image that came back
    observation: str | None = None  # text that came back
    tokens: int = 0  # sampled tokens of this turn
    weights: str | None = None  # the weight version that the engine reported; None in tables of version 1


@dataclass(frozen=True)
class Trajectory:
    """One rollout: all that the scores and the trainer need.

    tokens are compact (one placeholder per image). roles has an index into Role for each of them.
    logprobs has one value per sampled token, in order.
    images and grids (patches t, h, w as the model saw them) are in order of placeholders.
    """

    trajectory_id: str
    sample_id: str
    group_id: str
    index: int
    policy: str  # content digest of the policy artifact
    tokens: tuple[int, ...]
    roles: tuple[int, ...]
    logprobs: tuple[float, ...]
    images: tuple[str, ...]
    grids: tuple[tuple[int, int, int], ...]
    turns: tuple[Turn, ...]
    answer: str | None
    stop: StopReason
    error: str | None
    weights: str  # the weight versions that the engine reported, joined by ">" if they changed
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels at which each image was seen
    coordinates: Coordinates = Coordinates.PIXELS  # unit of the positions that the model wrote

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each image, in the row's coordinates."""
        return tuple(map(self.coordinates.extent, self.sizes))


def to_row(record: Sample | Turn | Trajectory) -> dict[str, Any]:
    """Return a dict for pyarrow; a sample's metadata and columns become canonical JSON."""
    row = asdict(record)
    if isinstance(record, Sample):
        row |= {name: json.dumps(row[name], sort_keys=True, ensure_ascii=False) for name in ("metadata", "columns")}
    return row


def from_row(kind: type[R], row: dict[str, Any]) -> R:
    """Return the record of a row as pyarrow gives it back, of this version of the tables or an earlier one.

    Raises ValueError where a value does not fit its field.
    """
    if kind is Sample:
        row = row | {name: json.loads(row[name]) for name in ("metadata", "columns") if name in row}
        if "answers" not in row:
            row |= _first_version(row["answer"], row["metadata"], row["source"])
    elif not row.get("sizes"):
        row = row | {"sizes": [(wide * PATCH_1, high * PATCH_1) for _, high, wide in row["grids"]]}
    record: R = _adapters()[kind].validate_python(row)
    return record


@cache
def _adapters() -> dict[type, TypeAdapter[Any]]:
    return {kind: TypeAdapter(kind) for kind in (Sample, Trajectory)}


def _first_version(answer: str, stored: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of a sample that version 1 of the tables had in one name space."""
    target = stored.get("target")
    metadata: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    further: list[str] = []
    if source == PUZZLES:
        metadata = {name: value for name, value in stored.items() if name != "target"}
    elif isinstance(stored.get("columns"), dict) and stored.keys() <= {"columns", "answers", "target"}:
        columns, further = stored["columns"], stored.get("answers", [])
    else:  # version 1 of `prepare`: further answers and a target were what looked like them
        columns, answers = stored, stored.get("answers")
        further = answers if isinstance(answers, list) and all(isinstance(text, str) for text in answers) else []
        target = target if _is_box(target) else None
    return {
        "answers": [answer, *further],
        "metadata": metadata,
        "columns": columns,
        "targets": [target] if target else [],
    }


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(edge) in (int, float) for edge in value)
    return numbers and all(map(math.isfinite, value)) and min(value[2:]) > 0


def _required(kind: pa.DataType, *names: str) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name in names]


def _optional(kind: pa.DataType, *names: str) -> list[pa.Field]:
    return [pa.field(name, kind) for name in names]


@cache
def image_schema() -> pa.Schema:
    """Return the columns of images: each once, under the hash of its decoded pixels.

    `data` is lossless for images that tools made.
    """
    return pa.schema(
        [
            *_required(pa.string(), "sha256"),
            *_required(pa.binary(), "data"),
            *_required(pa.int32(), "width", "height"),
        ]
    )


@cache
def sample_schema() -> pa.Schema:
    """Return the columns of samples; metadata and columns are JSON."""
    text, texts = pa.string(), pa.list_(pa.string())
    return pa.schema(
        [
            *_required(text, "sample_id", "question"),
            *_required(texts, "answers"),
            *_required(text, "answer_type"),
            *_required(texts, "choices", "images"),
            *_required(pa.list_(pa.list_(pa.float64(), 4)), "targets"),
            *_required(text, "source", "split", "metadata", "columns"),
            *_optional(pa.float64(), "tolerance"),
            *_optional(pa.int32(), "decimals"),
            *_required(pa.list_(pa.int32()), "order"),
        ]
    )


@cache
def trajectory_schema() -> pa.Schema:
    """Return the columns of trajectories, named as the fields of `Trajectory`."""
    text = pa.string()
    turn = pa.struct(
        [
            *_required(text, "text", "kind"),
            *_optional(text, "tool", "args", "status", "error"),
            *_optional(pa.int32(), "source"),
            *_optional(text, "image", "observation"),
            *_required(pa.int32(), "tokens"),
            *_optional(text, "weights"),
        ]
    )
    return pa.schema(
        [
            *_required(text, "trajectory_id", "sample_id", "group_id"),
            *_required(pa.int32(), "index"),
            *_required(text, "policy"),
            *_required(pa.list_(pa.int32()), "tokens"),
            *_required(pa.list_(pa.int8()), "roles"),
            *_required(pa.list_(pa.float32()), "logprobs"),
            *_required(pa.list_(text), "images"),
            *_required(pa.list_(pa.list_(pa.int32(), 3)), "grids"),
            *_required(pa.list_(turn), "turns"),
            *_optional(text, "answer"),
            *_required(text, "stop"),
            *_optional(text, "error"),
            *_required(text, "weights"),
            *_required(pa.list_(pa.list_(pa.int32(), 2)), "sizes"),
            *_required(text, "coordinates"),
        ]
    )


@cache
def pair_schema() -> pa.Schema:
    """Return the columns of known pairs: puzzles with an image that helps and one that does not.

    puzzles/known_pairs.py makes them.
    """
    return pa.schema(_required(pa.string(), "sample_id", "question", "family", "original", "right", "wrong"))


@cache
def judgement_schema() -> pa.Schema:
    """Return the columns of judgements (rewards/pairs.py): hashes of images, weights and prompt; evidence is JSON.

    component: the score column that asked. judge: the judge that answered, another one where the teacher could not be
    reached.
    """
    text = pa.string()
    return pa.schema(
        [
            *_required(text, "key", "component", "judge", "model", "weights", "prompt"),
            *_required(text, "question", "original", "processed"),
            *_optional(pa.float64(), "value"),
            *_optional(text, "reason"),
            *_required(text, "evidence"),
            *_required(pa.bool_(), "unreachable"),
        ]
    )


@cache
def verdict_schema() -> pa.Schema:
    """Return the columns of verdicts on answers (rewards/sentences.py): value 1 for right, 0 for wrong, null for none.

    prompt: its hash. evidence: JSON with the verdict, and the judge's reason as "because".
    """
    text = pa.string()
    return pa.schema(
        [
            *_required(text, "key", "model", "prompt", "question"),
            *_required(pa.list_(text), "rights"),
            *_required(text, "answer"),
            *_optional(pa.float64(), "value"),
            *_optional(text, "reason"),
            *_required(text, "evidence"),
        ]
    )


@cache
def component_type() -> pa.DataType:
    """Return the type of a component's column.

    value in [0, 1] or null, status ("ok", "zero", "missing"), reason, evidence (JSON).
    """
    text = pa.string()
    return pa.struct(
        [*_optional(pa.float64(), "value"), *_required(text, "status"), *_optional(text, "reason", "evidence")]
    )


def score_schema(components: list[str]) -> pa.Schema:
    """Return the columns of scores: one row per trajectory, one column per component."""
    identity = _required(pa.string(), "trajectory_id", "sample_id", "group_id")
    return pa.schema(identity + _required(component_type(), *components))
