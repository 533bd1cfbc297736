"""The numbers that alarms are about: one iteration's rollouts and scores in a few figures, each with its standard error."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from thinkimg.conversation.regions import tool_images
from thinkimg.images.coordinates import Box
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.rewards.joined import OVER, join
from thinkimg.rewards.mix import CONDITION, RIGHT, Mix
from thinkimg.store.kinds import Dataset, Rollouts, Scores

FEWEST_GROUPS = 8
"""Groups in which both columns vary, below which a correlation is not told: its standard error would be a guess."""
LARGEST_CROP = 0.5
"""A crop of more than this share of the picture shows the marked region as the picture itself does: it did not look for it."""


def signals(dataset: Dataset, rollouts: Rollouts, scores: Scores, mix: Mix) -> dict[str, float]:
    """`signal/<name>` and `signal/<name>_se`; what cannot be told (no call, no known region) is left out.

    tool_rate: share of the conversations in which a tool showed an image. over_turns: that ran out of turns or tokens.
    idle_calls: share of the calls that changed nothing, made an image that was there, or repeated a call; no_op_calls: the
    first of these. answer_tokens: mean length of the turn with the answer. total: mean of the mix over the rows that count.
    correlation/<component>: with the answer's reward, within groups. region_in_crop: share of the right answers for which
    a crop or zoom held the region that the sample marks (`targets`: x, y, width, height in pixels of its picture).
    Standard errors are those of clusters, the groups: conversations about one question are no independent draws.
    """
    joined = join(rollouts, scores)
    names, components, valid = joined.groups, joined.components, joined.counted
    rows = np.array([facts(row) for row in rollouts.trajectories()], dtype=FACTS)
    found: dict[str, float] = {}

    def tell(name: str, value: "tuple[float, float] | None") -> None:
        if value is not None:
            found[f"signal/{name}"], found[f"signal/{name}_se"] = value

    tell("tool_rate", share(rows["shown"], rows["played"], names))
    tell("over_turns", share(rows["over"], rows["played"], names))
    tell("idle_calls", share(rows["idle"], rows["calls"], names))
    tell("no_op_calls", share(rows["no_op"], rows["calls"], names))
    tell("answer_tokens", ratio(rows["answer_tokens"], rows["answered"], names))
    tell("total", ratio(joined.totals(mix), valid, names))
    if CONDITION in components:
        answer = components[CONDITION]
        for name in components:
            if name != CONDITION:
                tell(f"correlation/{name}", correlation(components[name], answer, valid, names))
        regions = held_regions(rollouts, dataset)
        known = (regions >= 0) & (answer >= RIGHT)
        tell("region_in_crop", share(regions == 1, known, names))
    return found


FACTS = [
    (name, np.int64) for name in ("played", "shown", "over", "calls", "idle", "no_op", "answered", "answer_tokens")
]


def facts(row: Trajectory) -> tuple[int, ...]:
    """Return the row of FACTS behind the figures: counts and truth values of one trajectory."""
    idle = list(idle_calls(row))
    tokens = next((turn.tokens for turn in row.turns if turn.kind is TurnKind.ANSWER), None)
    return (
        row.stop is not StopReason.FAILED,
        any(turn.image for turn in row.turns),
        row.stop in OVER,
        sum(turn.kind is TurnKind.TOOL for turn in row.turns),
        len(idle),
        sum(no_op for no_op, _ in idle),
        tokens is not None,
        tokens or 0,
    )


def idle_calls(row: Trajectory) -> Iterator[tuple[bool, Turn]]:
    """(whether it changed nothing, turn) of each call that brought nothing new: the image that it was given, one that was
    there before, or the same call on the same image once more. A call with an error is not idle: it is an error."""
    done: set[tuple] = set()
    for turn in row.turns:
        if turn.kind is not TurnKind.TOOL or turn.status in (None, CallStatus.ERROR):
            continue
        args = json.loads(turn.args)
        args.pop("image", None)  # "current" and 1 may name one image, and the source is its index either way
        call = turn.tool, json.dumps(args, sort_keys=True), turn.source
        if turn.status is CallStatus.DUPLICATE or call in done:
            no_op = turn.image is not None and turn.source is not None and row.images[turn.source] == turn.image
            yield no_op, turn
        done.add(call)


def held_regions(rollouts: Rollouts, dataset: Dataset) -> np.ndarray:
    """(N,) int: 1 where a crop or zoom held the region that the sample marks, 0 where none did, -1 where it marks none."""
    marked = {sample.sample_id: sample for sample in dataset.samples() if target(sample)}
    sizes = dataset.image_sizes({sample.images[0] for sample in marked.values()})

    def region(row: Trajectory) -> int:
        sample = marked.get(row.sample_id)
        if sample is None or not row.images:
            return -1
        return held(row, target(sample), sizes[sample.images[0]], rollouts.tools)

    return (
        np.array([region(row) for row in rollouts.trajectories()])
        if marked
        else np.full(sum(rollouts.parts().values()), -1)
    )


def target(sample: Sample) -> Box | None:
    """The marked region (x, y, width, height) of a sample with one picture."""
    return sample.targets[0] if len(sample.images) == 1 and sample.targets else None


def held(row: Trajectory, box: Box, size: tuple[int, int], tools: tuple[str, ...] | None = None) -> bool:
    """Tell whether an image that a crop or zoom led to holds the middle half of a box (x, y, width, height)."""
    x, y, width, height = box
    for image in tool_images(row, tools, (0, 0, *size)):
        if image.region is None:
            continue
        left, top, right, bottom = image.region
        inside = left <= x + width / 4 and top <= y + height / 4
        inside = inside and right >= x + width * 3 / 4 and bottom >= y + height * 3 / 4
        if inside and (right - left) * (bottom - top) <= LARGEST_CROP * size[0] * size[1]:
            return True
    return False


def ratio(values: np.ndarray, counts: np.ndarray, groups: np.ndarray) -> tuple[float, float] | None:
    """Sum of values / sum of counts over rows with a count, and its standard error with groups as clusters, `widened`.

    values, counts: (N,). None with fewer than two groups. Cochran, Sampling Techniques (1977), eq. 6.13, without the finite
    population's correction.
    """
    counts = np.asarray(counts, dtype=np.float64)
    values = np.where(counts > 0, np.asarray(values, dtype=np.float64), 0.0)
    _, index = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index, weights=counts)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if len(sizes) < 2:
        return None
    mean = sums.sum() / sizes.sum()
    spread = ((sums - mean * sizes) ** 2).sum() * len(sizes) / (len(sizes) - 1)
    return float(mean), float(math.sqrt(spread) / sizes.sum()) * widened(len(sizes))


def widened(groups: int) -> float:
    """By how much Student's interval of three standard errors is wider than the normal one: 1.06 for 48 groups, 1.8 for 6."""
    from scipy.special import ndtr, stdtrit

    return float(stdtrit(groups - 1, ndtr(3.0))) / 3.0


def share(hits: Sequence[float], counts: Sequence[float], groups: np.ndarray) -> tuple[float, float] | None:
    """`ratio` of a share, whose error is at least that of independent draws (Agresti and Coull, 1998): never 0 at 0 or 1."""
    found = ratio(np.asarray(hits, dtype=np.float64), np.asarray(counts, dtype=np.float64), groups)
    if found is None:
        return None
    count = float(np.sum(counts))
    return found[0], max(found[1], binomial_error(found[0], count))


def binomial_error(share: float, count: float) -> float:
    """Standard error of a share of `count` independent draws, two hits and two misses added."""
    near = (share * count + 2) / (count + 4)
    return math.sqrt(near * (1 - near) / (count + 4))


def correlation(
    one: np.ndarray, other: np.ndarray, valid: np.ndarray, groups: np.ndarray
) -> tuple[float, float] | None:
    """Pearson's within groups, which is what advantages are made of, and its jackknife error over groups.

    Rows that are not valid or miss a value are left out. None where fewer than FEWEST_GROUPS groups vary in both.
    """
    used = valid & ~np.isnan(one) & ~np.isnan(other)
    one, other = one[used], other[used]
    _, index = np.unique(groups[used], return_inverse=True)
    if not len(index):
        return None
    sizes = np.bincount(index)
    x, y = (values - (np.bincount(index, weights=values) / sizes)[index] for values in (one, other))
    xx, yy, xy = (np.bincount(index, weights=values) for values in (x * x, y * y, x * y))
    tiny = 1e-12  # centred values of a constant column are no exact zeros
    if ((xx > tiny) & (yy > tiny)).sum() < FEWEST_GROUPS:
        return None
    whole = xy.sum() / math.sqrt(xx.sum() * yy.sum())
    left = [part.sum() - part for part in (xx, yy, xy)]
    without = left[2] / np.sqrt(left[0] * left[1])
    count = len(without)
    error = math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return float(whole), error * widened(count)


def accuracy(metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Held-out accuracy and its standard error, from the metrics of an iteration."""
    found, count = metrics.get("eval/accuracy"), metrics.get("eval/trajectories")
    return (found, binomial_error(found, count)) if found is not None and count else None
