"""Figures of one iteration's rollouts and scores, each with its standard error: the input of the alarms."""

import json
import math
from collections.abc import Iterator, Mapping

import numpy as np

from thinkimg.conversation.regions import tool_images
from thinkimg.images.coordinates import Box
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.rewards.joined import OVER, join
from thinkimg.rewards.mix import CONDITION, RIGHT, Mix
from thinkimg.store.kinds import Dataset, Rollouts, Scores

FEWEST_GROUPS = 8
"""Groups in which both columns vary, at least, for a correlation: with fewer its standard error would be a guess."""
LARGEST_CROP = 0.5
"""Share of the picture above which a crop does not count as a search for the marked region."""
FACTS = [
    (name, np.int64) for name in ("played", "shown", "over", "calls", "idle", "no_op", "answered", "answer_tokens")
]
Estimate = tuple[float, float]
"""A figure and its standard error."""


def compute_signals(dataset: Dataset, rollouts: Rollouts, scores: Scores, mix: Mix) -> dict[str, float]:
    """Return `signal/<name>` and `signal/<name>_se`, without those that have no data (no call, no marked region).

    tool_rate: share of the conversations in which a tool showed an image.
    failed: share of all conversations that failed; the others' shares are of those that did not.
    over_turns: share of the conversations that ran out of turns or tokens.
    idle_calls: share of the calls that changed nothing, made an image again, or repeated a call.
    no_op_calls: share of the calls that changed nothing.
    answer_tokens: mean length of the turn with the answer.
    total: mean of the mix over the rows that count.
    correlation/<component>: within groups, with the answer's reward.
    region_in_crop: share of the right answers with a crop or zoom that held the region that the sample marks
    (`targets`: x, y, width, height in pixels of its picture).
    Standard errors take the groups as clusters: conversations about one question are no independent draws.
    """
    joined = join(rollouts, scores)
    groups, components, valid = joined.groups, joined.components, joined.counted
    rows = np.array([count_facts(row) for row in rollouts.trajectories()], dtype=FACTS)
    estimates = {
        "tool_rate": estimate_share(rows["shown"], rows["played"], groups),
        "failed": estimate_share(1 - rows["played"], np.ones(len(rows)), groups),
        "over_turns": estimate_share(rows["over"], rows["played"], groups),
        "idle_calls": estimate_share(rows["idle"], rows["calls"], groups),
        "no_op_calls": estimate_share(rows["no_op"], rows["calls"], groups),
        "answer_tokens": estimate_ratio(rows["answer_tokens"], rows["answered"], groups),
        "total": estimate_ratio(joined.totals(mix), valid, groups),
    }
    if CONDITION in components:
        answer = components[CONDITION]
        for name in components:
            if name != CONDITION:
                estimates[f"correlation/{name}"] = estimate_correlation(components[name], answer, valid, groups)
        regions = find_regions(rollouts, dataset)
        marked = (regions >= 0) & (answer >= RIGHT)
        estimates["region_in_crop"] = estimate_share(regions == 1, marked, groups)
    figures = {}
    for name, estimate in estimates.items():
        if estimate is not None:
            figures[f"signal/{name}"], figures[f"signal/{name}_se"] = estimate
    return figures


def count_facts(row: Trajectory) -> tuple[int, ...]:
    """Return one trajectory's row of FACTS: counts and truth values."""
    idle = list(find_idle_calls(row))
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


def find_idle_calls(row: Trajectory) -> Iterator[tuple[bool, Turn]]:
    """Yield (no_op, turn) of each call that brought nothing new; no_op: it returned the image that it was given.

    Others return an image that was there before, or repeat a call on the same image. Calls with an error do not count.
    """
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


def find_regions(rollouts: Rollouts, dataset: Dataset) -> np.ndarray:
    """Return (N,) int: 1 where a crop or zoom held the marked region, 0 where none did, -1 where none is marked."""
    marked = {sample.sample_id: sample for sample in dataset.samples() if marked_region(sample)}
    sizes = dataset.image_sizes({sample.images[0] for sample in marked.values()})

    def region(row: Trajectory) -> int:
        sample = marked.get(row.sample_id)
        if sample is None or not row.images:
            return -1
        return holds_region(row, marked_region(sample), sizes[sample.images[0]], rollouts.tools)

    if not marked:
        return np.full(sum(rollouts.parts().values()), -1)
    return np.array([region(row) for row in rollouts.trajectories()])


def marked_region(sample: Sample) -> Box | None:
    """Return the marked region (x, y, width, height) of a sample with one picture."""
    return sample.targets[0] if len(sample.images) == 1 and sample.targets else None


def holds_region(row: Trajectory, box: Box, size: tuple[int, int], tools: tuple[str, ...] | None = None) -> bool:
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


def estimate_ratio(values: np.ndarray, counts: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """Return sum of values / sum of counts over rows with a count, with groups as clusters of its standard error.

    values, counts: (N,). None with fewer than two groups. Cochran, Sampling Techniques (1977), eq. 6.13, without the
    finite population's correction; the error is widened for few groups (`student_factor`).
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
    return float(mean), float(math.sqrt(spread) / sizes.sum()) * student_factor(len(sizes))


def student_factor(groups: int) -> float:
    """Return how much wider Student's interval of three standard errors is: 1.06 for 48 groups, 1.8 for 6."""
    from scipy.special import ndtr, stdtrit

    return float(stdtrit(groups - 1, ndtr(3.0))) / 3.0


def estimate_share(hits: np.ndarray, counts: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """Return `estimate_ratio` of a share, with an error of at least that of independent draws: never 0 at 0 or 1."""
    estimate = estimate_ratio(hits, counts, groups)
    if estimate is None:
        return None
    return estimate[0], max(estimate[1], binomial_error(estimate[0], float(np.sum(counts))))


def binomial_error(share: float, count: float) -> float:
    """Return the standard error of a share of independent draws (Agresti and Coull, 1998: plus two hits and misses)."""
    near = (share * count + 2) / (count + 4)
    return math.sqrt(near * (1 - near) / (count + 4))


def estimate_correlation(x: np.ndarray, y: np.ndarray, valid: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """Return Pearson's correlation within groups, as advantages see it, and its jackknife error over groups.

    Rows that are not valid or miss a value are left out. None where fewer than FEWEST_GROUPS groups vary in both.
    """
    used = valid & ~np.isnan(x) & ~np.isnan(y)
    _, index = np.unique(groups[used], return_inverse=True)
    if not len(index):
        return None
    sizes = np.bincount(index)
    x, y = (values - (np.bincount(index, weights=values) / sizes)[index] for values in (x[used], y[used]))
    xx, yy, xy = (np.bincount(index, weights=values) for values in (x * x, y * y, x * y))
    tiny = 1e-12  # centred values of a constant column are no exact zeros
    if ((xx > tiny) & (yy > tiny)).sum() < FEWEST_GROUPS:
        return None
    value = xy.sum() / math.sqrt(xx.sum() * yy.sum())
    rest_xx, rest_yy, rest_xy = (sums.sum() - sums for sums in (xx, yy, xy))  # without each group
    jackknife = rest_xy / np.sqrt(rest_xx * rest_yy)
    count = len(jackknife)
    error = math.sqrt((count - 1) / count * ((jackknife - jackknife.mean()) ** 2).sum())
    return float(value), error * student_factor(count)


def estimate_accuracy(metrics: Mapping[str, float]) -> Estimate | None:
    """Return the held-out accuracy in the metrics of an iteration."""
    value = metrics.get("eval/accuracy")
    count = metrics.get("eval/judged", metrics.get("eval/trajectories"))  # of versions before 0.3 the latter
    return (value, binomial_error(value, count)) if value is not None and count else None
