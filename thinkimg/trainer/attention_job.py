"""Attention of texts on images: chosen layers and query rows, read in one forward pass without full maps."""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.trainer.forward.attention import Reader, StopForward
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import get_base_model
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.micro_batches import MicroBatches
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import read_patches
from thinkimg.trainer.stepper import Progress

LEAST_GRID = 8  # tokens per side from which a region of the image says something


def read_attention(
    scorer: Scorer, rows: Sequence[Conversation], layers: Sequence[int], *, stop: bool = True
) -> dict[int, Tensor]:
    """Return the attention of the N scored tokens of padded rows to all T tokens: layer -> (N, T) float32.

    No logits are computed. stop: leave out the layers above the last of `layers`.
    """
    batch = scorer.build_batch(rows)
    reader = Reader(layers, batch["row"], batch["column"], stop=stop)
    with contextlib.suppress(StopForward):
        scorer.compute_states(rows, batch, reader=reader)
    assert reader.attention.keys() == reader.layers, "the language model attends by attend_packed"
    return reader.attention


def run(job: dict, policy: PolicyModel, ranks: Ranks, progress: Progress) -> dict:
    """Return the attention figures of pairs of conversations, one with the question and one with a generic text.

    client.py describes the job. Raises UserError if the policy lacks one of the layers, or has no attention in it.
    """
    layers, pairs = choose_layers(policy, job["layers"]), job["pairs"]
    pixels = read_patches(job, policy)
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})
    policy.model.eval()

    def read() -> dict[int, dict]:
        # Sharded weights are gathered by all processes at once, layer by layer: each makes every pass, to the end.
        own = range(len(pairs)) if policy.sharded else range(len(pairs))[ranks.rank :: ranks.count]
        rows = [row for i in own for row in build_conversations(pairs[i], scorer.image_token)]
        maps: list[dict] = [{}] * len(rows)
        done = 0
        with torch.no_grad():
            for batch in MicroBatches(rows, job["token_budget"], scorer, pixels):
                chosen = [rows[i] for i in batch.rows]
                with policy.autocast():
                    attention = read_attention(scorer, chosen, layers, stop=not policy.sharded)
                for i, image_map in zip(batch.rows, split(attention, chosen, scorer.image_token), strict=True):
                    maps[i] = image_map
                done += len(chosen)
                progress({"step": done, "steps": len(rows)})
        return {i: measure(pairs[i], scorer.image_token, *maps[2 * n : 2 * n + 2]) for n, i in enumerate(own)}

    with contextlib.closing(pixels):
        # Sharded, the others are within a pass where one fails: it ends, and the heartbeat ends them.
        merged = ranks.merge(read() if policy.sharded else ranks.together(read))
    return {"pairs": [merged[i] for i in range(len(pairs))], "forwards": 2 * len(merged)}


def choose_layers(policy: PolicyModel, layers: Sequence[int] | None) -> Sequence[int]:
    """Return the layers, or the family's own where there are none given. Raises UserError if one can't be read."""
    family, text_config = policy.family, get_base_model(policy.model).language_model.config
    if layers is None:
        return [family.pick_attention_layer(text_config)]
    readable = family.attention_layers(text_config)
    if unreadable := sorted(set(layers) - set(readable)):
        raise UserError(
            f"Attention is to be read in layer {unreadable[0]}, and the policy attends in the layers "
            f"{', '.join(map(str, readable))} (of {text_config.num_hidden_layers}, counted from 0).",
            hint="Find one with `thinkimg calibrate attention`, and set image.attention.layer.",
        )
    return layers


def build_conversations(pair: dict, image_token: ImageToken) -> list[Conversation]:
    """Return the two prompts of a pair, scored at the query rows: the tokens of the text, and the prompt's last."""
    grids = np.asarray(pair["grids"], dtype=np.int64)
    rows = []
    for prompt in pair["prompts"]:
        compact = np.asarray(prompt["tokens"], dtype=np.int64)
        counts = np.ones(len(compact), dtype=np.int64)
        counts[compact == image_token.id] = [image_token.count(grid) for grid in grids]
        scored = np.zeros(len(compact), dtype=bool)
        scored[slice(*prompt["text"])] = True
        scored[-1] = True
        rows.append(Conversation(np.repeat(compact, counts), np.repeat(scored, counts), tuple(pair["images"]), grids))
    return rows


def split(attention: dict[int, Tensor], rows: Sequence[Conversation], image_token: ImageToken) -> list[dict]:
    """Return each conversation's attention on its image tokens, mean over the query rows.

    Keys are (layer, "text" or "last"), values (image tokens,).
    """
    maps: list[dict] = [{} for _ in rows]
    ends = np.cumsum([row.scored.sum() for row in rows])[:-1]
    for layer, values in attention.items():
        for image_map, row, part in zip(maps, rows, np.split(values.cpu().numpy(), ends), strict=True):
            on_images = part[:, : len(row.tokens)][:, row.tokens == image_token.id]
            image_map[layer, "text"], image_map[layer, "last"] = on_images[:-1].mean(0), on_images[-1]
    return maps


def measure(pair: dict, image_token: ImageToken, question: dict, generic: dict) -> dict:
    """Return the attention mass of both texts on the processed image (the second), and region figures.

    Keys are "<layer>/<rows>". region: share of the original's relative attention that lies, token by token, in the box
    that a crop came from. area: the box's share of the original. Both need 8 x 8 tokens and a crop.
    """
    first = image_token.count(pair["grids"][0])
    cover = compute_coverage(image_token.cells(pair["grids"][0]), pair.get("region"))
    figures = {}
    for layer, rows in question:
        asked, general = question[layer, rows], generic[layer, rows]
        masses = {"question": float(asked[first:].sum()), "generic": float(general[first:].sum())}
        if cover is not None:
            relative = asked[:first] / np.maximum(general[:first], 1e-12)
            masses |= {"region": float((relative * cover).sum() / relative.sum()), "area": float(cover.mean())}
        figures[f"{layer}/{rows}"] = masses
    return figures


def compute_coverage(cells: tuple[int, int], region: Sequence[float] | None) -> np.ndarray | None:
    """Return (tokens,): the share of each token's cell that lies in a region.

    cells: rows and columns of tokens. region: left, top, right, bottom in shares of the sides. None: no region, fewer
    than 8 x 8 tokens, or all or nothing.
    """
    high, wide = cells
    if region is None or min(high, wide) < LEAST_GRID:
        return None
    left, top, right, bottom = region
    across = np.clip(np.minimum(np.arange(1, wide + 1), right * wide) - np.maximum(np.arange(wide), left * wide), 0, 1)
    down = np.clip(np.minimum(np.arange(1, high + 1), bottom * high) - np.maximum(np.arange(high), top * high), 0, 1)
    cover = np.outer(down, across).reshape(-1)
    return cover if 0 < cover.mean() < 1 else None
