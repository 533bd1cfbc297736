"""Parity gate: before the first step, comparison of the trainer's model and inputs with those of the engine."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from thinkimg.errors import UserError
from thinkimg.trainer.forward import packing
from thinkimg.trainer.rows import Row

FROM_GROUP = 4
CONFIDENCE = 1.96  # standard errors: an interval of 95 %
CERTAIN = 4.0  # standard errors: one false refusal in 30,000 gates, as a run has many


def check_weights(rows: Sequence[Row], version: str) -> None:
    """Raise UserError if a row was sampled with other weights than those that are to be trained."""
    for row in rows:
        if row.weights != version:
            raise UserError(
                f"Trajectory {row.trajectory_id} was sampled with the weights {row.weights[:16]}…, not with the policy "
                f"{version[:16]}….",
                hint="Roll out again with this policy.",
            )


def check_tokens(rows: Sequence[Row], image_token: packing.ImageToken) -> None:
    """Raise UserError if a row's image tokens differ from its grids: in number, or an image's are interrupted."""
    for row in rows:
        talk = row.conversation
        sizes = [image_token.count(grid) for grid in talk.grids]
        index = np.flatnonzero(talk.tokens == image_token.id)
        if len(index) != sum(sizes):
            raise UserError(
                f"Trajectory {row.trajectory_id} has {len(index)} image tokens, and its grids {sum(sizes)}.",
                hint="The rollouts were changed since they were made: make them again.",
            )
        for image, own in zip(talk.images, np.split(index, np.cumsum(sizes)[:-1]), strict=True):
            if np.any(np.diff(own) != 1):
                raise UserError(
                    f"In trajectory {row.trajectory_id} the tokens of image {image[:16]}… are interrupted.",
                    hint="The rollouts were changed since they were made: make them again.",
                )


def check_positions(rows: Sequence[Row], model) -> None:
    """Raise UserError if the trainer's positions differ from those of the model's own get_rope_index.

    Rows with two images side by side are left out: transformers takes these for one.
    model: below the head, as get_base_model gives it.
    """
    for row in rows:
        talk = row.conversation
        kinds = talk.tokens == model.config.image_token_id
        if int((np.diff(np.concatenate([[0], kinds])) == 1).sum()) != len(talk.images):
            continue
        theirs, _ = model.get_rope_index(
            torch.from_numpy(talk.tokens)[None],
            mm_token_type_ids=torch.from_numpy(kinds.astype(np.int64))[None],
            image_grid_thw=torch.from_numpy(talk.grids) if talk.images else None,
        )
        ours = packing.compute_mrope_positions(talk.tokens, packing.ImageToken.of(model.config), talk.grids)
        different = np.flatnonzero((ours != theirs[:, 0].numpy()).any(0))
        if len(different):
            k = int(different[0])
            raise UserError(
                f"The position of token {k} of trajectory {row.trajectory_id} is {ours[:, k].tolist()} (time, height, "
                f"width) to the trainer and {theirs[:, 0, k].tolist()} to the model's own get_rope_index.",
                hint="Install a version of transformers that pyproject.toml allows.",
            )


def choose(rows: Sequence[Row], wanted: int, seed: int) -> list[int]:
    """Return the indices of the rows to compare, ascending.

    They are up to FROM_GROUP rows of a group, so that shared prompts are compared too.
    """
    rng = np.random.default_rng([seed, 1])
    chosen: list[int] = []
    counts: dict[str, int] = {}
    order = rng.permutation(len(rows)).tolist()
    names = list(dict.fromkeys(rows[i].group_id for i in order))
    for i in sorted(order, key=lambda i: names.index(rows[i].group_id)):
        group = rows[i].group_id
        if len(chosen) < wanted and counts.get(group, 0) < FROM_GROUP:
            chosen.append(i)
            counts[group] = counts.get(group, 0) + 1
    chosen += [i for i in order if i not in chosen][: wanted - len(chosen)]
    return sorted(chosen)


def compare(engine: np.ndarray, trainer: np.ndarray) -> dict[str, float]:
    """Return metrics over the log-probabilities (N,) of sampled tokens.

    kl is Schulman's k3 estimator of KL(engine || trainer) on the engine's samples, r - 1 - log r with
    r = p(trainer) / p(engine) (joschu.net/blog/kl-approx.html); nats per token. ratio/* are quantiles of r.
    """
    difference = trainer.astype(np.float64) - engine
    ratio = np.exp(difference)
    p01, p50, p99 = np.quantile(ratio, (0.01, 0.5, 0.99))
    return {
        "parity/mean_abs": float(np.abs(difference).mean()),
        "parity/kl": float((ratio - 1 - difference).mean()),
        "parity/ratio_p01": float(p01),
        "parity/ratio_p50": float(p50),
        "parity/ratio_p99": float(p99),
        "parity/ratio_max": float(ratio.max()),
        "parity/tokens": len(engine),
    }


def measure_slope(
    engine: Sequence[np.ndarray], adapted: Sequence[np.ndarray], base: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return which of two policies plays, the adapted one (1) or its base (0), with an interval; {} if they are equal.

    Log-probabilities of the sampled tokens, by row: of the engine, and of the trainer with the adapter and without.
    It is (1 + D / E) / 2, with E the sum of (adapted - base)^2, and D that of (engine - base)^2 - (engine - adapted)^2.
    Without noise that is the slope of engine - base on adapted - base. Noise of the trainer is in both terms of D, and
    moves it towards 1/2, where nothing is refused. The mean difference can't tell: of an adapter of five steps at a
    rate of 1e-5 it is a tenth of bfloat16's noise. The interval is of 95 %, over the tokens.
    """
    played, ours, plain = (np.concatenate(rows).astype(np.float64) for rows in (engine, adapted, base))
    effect = ours - plain
    square = float(effect @ effect)
    if square == 0:
        return {}
    terms = effect * (2 * played - ours - plain)
    slope = 0.5 * (1 + float(terms.sum()) / square)
    error = 0.5 * CONFIDENCE * float(terms.std()) * len(terms) ** 0.5 / square
    return {"parity/slope": slope, "parity/slope_low": slope - error, "parity/slope_high": slope + error}


def check_slope(metrics: Mapping[str, float], limit: float, *, exact: bool) -> None:
    """Raise UserError if the interval of the slope lies below the limit, and that is no accident.

    exact: True if the trainer's numbers are of float32. Then an engine that applies the adapter shows 1, which has to
    be CERTAIN standard errors away. Else it shows no less than 1/2, and so has the limit.
    """
    if "parity/slope" not in metrics:
        return
    slope, high = metrics["parity/slope"], metrics["parity/slope_high"]
    if high < limit and slope + CERTAIN / CONFIDENCE * (high - slope) < (1 if exact else limit):
        raise UserError(
            f"The engine does not apply the adapter: of the adapter's effect on log-probabilities it shows "
            f"{metrics['parity/slope']:.2f} ({metrics['parity/slope_low']:.2f} to "
            f"{metrics['parity/slope_high']:.2f}), where 1 is expected.",
            hint="Restart the engine's servers, with --enable-lora if they are your own, and play the rollouts anew.",
        )


def check_numbers(
    metrics: Mapping[str, float],
    rows: Sequence[Row],
    trainer: Sequence[np.ndarray],
    *,
    limit: float,
    files: Mapping[str, bytes],
    explain: Callable[[list[int]], str] = lambda worst: "",
) -> None:
    """Raise UserError, showing the worst token, if the mean difference or the KL exceeds the limit (nats per token).

    The KL catches a few tokens that are far off, which the mean of the absolute differences hides.
    trainer: log-probabilities of each row's scored tokens. files: the policy's, for its tokenizer.json.
    explain: from the rows' indices, the worst first, to a sentence on the causes (parity_diagnosis.py).
    """
    worst = max(metrics["parity/mean_abs"], metrics["parity/kl"])
    if worst <= limit:  # NaN is not
        return
    differences = [np.nan_to_num(np.abs(t - row.engine), nan=np.inf) for t, row in zip(trainer, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -differences[i].max())
    number = order[0]
    scored = int(differences[number].argmax())
    row = rows[number]
    position = int(np.flatnonzero(row.conversation.scored)[scored])
    raise UserError(
        f"Engine and trainer disagree on {metrics['parity/tokens']} tokens: mean |log p| difference "
        f"{metrics['parity/mean_abs']:.4f}, KL {metrics['parity/kl']:.4f}, allowed are {limit}. The worst is token "
        f"{position} of trajectory {row.trajectory_id}, {show_token(row, position, files)}: "
        f"engine {row.engine[scored]:.3f}, trainer {trainer[number][scored]:.3f}. {explain(order)}".rstrip(),
        hint="Do both sides have the same weights, images, temperature and banned tokens? See train.parity.max_kl.",
    )


def show_token(row: Row, position: int, files: Mapping[str, bytes]) -> str:
    """Return a token and the twelve before it, as text."""
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokens = row.conversation.tokens[: position + 1]
    before = tokenizer.decode(tokens[max(0, position - 12) : position].tolist(), skip_special_tokens=False)
    return f"{tokenizer.decode(tokens[-1:].tolist(), skip_special_tokens=False)!r} after {before!r}"
