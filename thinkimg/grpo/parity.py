"""The parity gate: before the first step, are the trainer's model and inputs those that the engine sampled with?"""

from collections.abc import Mapping, Sequence

import numpy as np

from thinkimg.errors import UserError
from thinkimg.grpo.rows import Row

FROM_GROUP = 4


def check_weights(rows: Sequence[Row], version: str) -> None:
    """Raises UserError if a row was sampled with other weights than those that are to be trained."""
    for row in rows:
        if row.weights != version:
            raise UserError(
                f"Trajectory {row.trajectory_id} was sampled with the weights {row.weights[:16]}…, not with the policy "
                f"{version[:16]}….",
                hint="Roll out again with this policy.",
            )


def choose(rows: Sequence[Row], wanted: int, seed: int) -> list[int]:
    """Indices of the rows to compare, ascending: up to FROM_GROUP of a group, so that shared prompts are compared, too."""
    rng = np.random.default_rng([seed, 1])
    taken: list[int] = []
    counts: dict[str, int] = {}
    order = rng.permutation(len(rows)).tolist()
    names = list(dict.fromkeys(rows[i].group_id for i in order))
    for i in sorted(order, key=lambda i: names.index(rows[i].group_id)):
        group = rows[i].group_id
        if len(taken) < wanted and counts.get(group, 0) < FROM_GROUP:
            taken.append(i)
            counts[group] = counts.get(group, 0) + 1
    taken += [i for i in order if i not in taken][: wanted - len(taken)]
    return sorted(taken)


def compare(engine: np.ndarray, trainer: np.ndarray) -> dict[str, float]:
    """Metrics over the log-probabilities (N,) of sampled tokens.

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


def check_numbers(
    metrics: Mapping[str, float],
    rows: Sequence[Row],
    trainer: Sequence[np.ndarray],
    *,
    limit: float,
    files: Mapping[str, bytes],
) -> None:
    """Raises UserError, showing the worst token, if the mean difference or the KL exceeds the limit (nats per token).

    The KL is held to it as well: it catches a few tokens that are far off, which the mean of the absolute hides.
    trainer: log-probabilities of each row's scored tokens. files: the policy's, for its tokenizer.json.
    """
    worst = max(metrics["parity/mean_abs"], metrics["parity/kl"])
    if worst <= limit:  # NaN is not
        return
    differences = [np.nan_to_num(np.abs(t - row.engine), nan=np.inf) for t, row in zip(trainer, rows, strict=True)]
    number = int(np.argmax([d.max() for d in differences]))
    place = int(differences[number].argmax())
    row = rows[number]
    position = int(np.flatnonzero(row.conversation.scored)[place])
    raise UserError(
        f"Engine and trainer disagree: mean |log p| difference {metrics['parity/mean_abs']:.4f}, KL {metrics['parity/kl']:.4f} "
        f"on {metrics['parity/tokens']} tokens, allowed are {limit}; the worst is token {position} of trajectory "
        f"{row.trajectory_id}, {context(row, position, files)}: engine {row.engine[place]:.3f}, "
        f"trainer {trainer[number][place]:.3f}.",
        hint="Same weights, images, temperature and banned tokens on both sides? train.parity.max_kl is the limit.",
    )


def context(row: Row, position: int, files: Mapping[str, bytes]) -> str:
    """The token and what stands before it, as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokens = row.conversation.tokens[: position + 1]
    before = tokenizer.decode(tokens[max(0, position - 12) : position].tolist(), skip_special_tokens=False)
    return f"{tokenizer.decode(tokens[-1:].tolist(), skip_special_tokens=False)!r} after {before!r}"
