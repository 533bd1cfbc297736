"""Which images does a text look at? Attention of chosen layers and query rows, read in one forward without full maps."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.images.patches import MERGE, image_tokens
from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward.logprobs import Scorer, base_model, batch_tensors, image_features
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.optimise import MicroBatches, Progress, Ranks
from thinkimg.trainer.rows import Patches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "thinkimg_read_attention"
ROWS = ("text", "last")
CHUNK = 64  # query rows whose attention exists at once: 28 heads x 64 x 2,800 tokens are 20 MB
LEAST_GRID = 8  # tokens per side from which a region of the picture says something


class _Enough(Exception):
    """The last layer that is asked for has been read: what follows is not needed."""


class Reader:
    """Reads one batch: for each query row (row, column), (N,) each, its attention, mean over heads; layer -> (N, T)."""

    current: "Reader | None" = None

    def __init__(self, layers: Sequence[int], row: Tensor, column: Tensor, *, stop: bool = True):
        self.layers, self.row, self.column, self.stop = set(layers), row, column, stop
        self.read: dict[int, Tensor] = {}

    def look(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """query (B, H, T, d), key (B, H_kv, T, d), rotary positions applied."""
        groups = query.shape[1] // key.shape[1]
        parts = []
        positions = torch.arange(key.shape[2], device=key.device)
        for rows, columns in zip(self.row.split(CHUNK), self.column.split(CHUNK), strict=True):
            for b in rows.unique().tolist():  # ascending, as the rows are
                where = columns[rows == b]
                q = query[b, :, where].float()  # (H, n, d)
                k = key[b].float().repeat_interleave(groups, dim=0)  # (H, T, d)
                scores = (q @ k.transpose(1, 2)) * scaling
                scores = scores.masked_fill(positions > where[:, None], float("-inf"))
                parts.append(scores.softmax(-1).mean(0))
        self.read[layer] = torch.cat(parts)
        if self.stop and self.layers <= self.read.keys():
            raise _Enough


def attend_and_read(module, query, key, value, attention_mask, scaling=None, **rest):
    """transformers' SDPA, after the reader has looked at query and key."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if Reader.current is not None and module.layer_idx in Reader.current.layers:
        Reader.current.look(module.layer_idx, query, key, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)


@contextmanager
def reading(model: "PreTrainedModel", reader: Reader):
    """The language model attends by attend_and_read within this context."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_and_read)
    config = base_model(model).language_model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    Reader.current = reader
    try:
        yield
    except _Enough:
        pass
    finally:
        Reader.current = None
        config._attn_implementation = before


def attention_rows(
    scorer: Scorer, rows: Sequence[Conversation], layers: Sequence[int], *, stop: bool = True
) -> dict[int, Tensor]:
    """layer -> (N, T) float32: attention of the N scored tokens of padded rows to all T tokens; no logits are computed.

    stop: leave out the layers above the last of `layers`.
    """
    model, image_token = scorer.model, scorer.image_token
    batch = batch_tensors(rows, image_token, scorer.pad_token, scorer.device)
    images = [key for row in rows for key in row.images]
    grids = np.concatenate([row.grids for row in rows if row.images])
    features = image_features(model, images, scorer.pixels, grids, scorer.features)
    base, tokens = base_model(model), batch["tokens"]
    embeddings = base.get_input_embeddings()(tokens)
    where = (tokens == image_token)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(where, features.to(embeddings.dtype))
    reader = Reader(layers, batch["row"], batch["column"], stop=stop)
    with reading(model, reader):
        # A causal model with padding on the right needs no mask, and without one SDPA takes its causal path.
        base.language_model(
            inputs_embeds=embeddings, position_ids=batch["positions"], use_cache=False,
            attention_mask={"full_attention": None},
        )  # fmt: skip
    return reader.read


def run(job: dict, policy: Policy, ranks: Ranks, progress: Progress) -> dict:
    """The worker's job "attention"; see worker.py. Every pair is two conversations: the question, and a generic text."""
    images, layers = job["images"], job["layers"]
    count = len(base_model(policy.model).language_model.layers)
    if max(layers) >= count:
        raise UserError(
            f"The policy has {count} layers, and attention is to be read in layer {max(layers)}, counted from 0.",
            hint="Find one with `thinkimg calibrate attention`, and set image.attention.layer.",
        )
    pixels = Patches(images["tables"], min_pixels=images["min_pixels"], max_pixels=images["max_pixels"])
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})
    policy.model.eval()

    def look() -> dict[int, dict]:
        # Sharded weights are gathered by all processes at once, layer by layer: each makes every pass, to the end.
        mine = range(len(job["pairs"])) if policy.sharded else range(len(job["pairs"]))[ranks.rank :: ranks.count]
        rows = [one for i in mine for one in conversations(job["pairs"][i], scorer.image_token)]
        maps: list[dict] = [{}] * len(rows)
        done = 0
        with torch.no_grad():
            for batch in MicroBatches(rows, job["token_budget"], scorer, pixels):
                chosen = [rows[i] for i in batch.rows]
                with policy.autocast():
                    found = attention_rows(scorer, chosen, layers, stop=not policy.sharded)
                for i, one in zip(batch.rows, split(found, chosen, scorer.image_token), strict=True):
                    maps[i] = one
                done += len(chosen)
                progress({"step": done, "steps": len(rows)})
        return {i: measure(job["pairs"][i], *maps[2 * n : 2 * n + 2]) for n, i in enumerate(mine)}

    try:
        merged: dict[int, dict] = {}
        for part in ranks.gather(ranks.together(look)):
            merged |= part
    finally:
        pixels.close()
    return {"pairs": [merged[i] for i in range(len(job["pairs"]))], "forwards": 2 * len(merged)}


def conversations(pair: dict, image_token: int) -> list[Conversation]:
    """The two prompts of a pair, scored at the query rows: the tokens of the text, and the last of the prompt."""
    grids = np.asarray(pair["grids"], dtype=np.int64)
    found = []
    for prompt in pair["prompts"]:
        compact = np.asarray(prompt["tokens"], dtype=np.int64)
        counts = np.ones(len(compact), dtype=np.int64)
        counts[compact == image_token] = [image_tokens(grid) for grid in grids]
        scored = np.zeros(len(compact), dtype=bool)
        scored[slice(*prompt["text"])] = True
        scored[-1] = True
        found.append(Conversation(np.repeat(compact, counts), np.repeat(scored, counts), tuple(pair["images"]), grids))
    return found


def split(found: dict[int, Tensor], rows: Sequence[Conversation], image_token: int) -> list[dict]:
    """Per conversation (layer, rows) -> (image tokens,) attention, mean over the query rows."""
    maps: list[dict] = [{} for _ in rows]
    for layer, read in found.items():
        parts = read.cpu().numpy()
        for one, row, part in zip(
            maps, rows, np.split(parts, np.cumsum([r.scored.sum() for r in rows])[:-1]), strict=True
        ):
            seen = part[:, : len(row.tokens)][:, row.tokens == image_token]
            one[layer, "text"], one[layer, "last"] = seen[:-1].mean(0), seen[-1]
    return maps


def measure(pair: dict, question: dict, generic: dict) -> dict:
    """ "<layer>/<rows>" -> attention mass of both texts on the processed image (the second), and region figures.

    region: share of the original's relative attention, token by token, that falls into the box that a crop came from;
    area: the box's share of the original. None where the grid is below 8 x 8 tokens or nothing was cropped.
    """
    first = image_tokens(pair["grids"][0])
    cover = coverage(pair["grids"][0], pair.get("region"))
    found = {}
    for layer, rows in question:
        asked, general = question[layer, rows], generic[layer, rows]
        one = {"question": float(asked[first:].sum()), "generic": float(general[first:].sum())}
        if cover is not None:
            relative = asked[:first] / np.maximum(general[:first], 1e-12)
            one |= {"region": float((relative * cover).sum() / relative.sum()), "area": float(cover.mean())}
        found[f"{layer}/{rows}"] = one
    return found


def coverage(grid: Sequence[int], region: Sequence[float] | None) -> np.ndarray | None:
    """(tokens,) which share of each token's cell lies in a region (left, top, right, bottom in shares of the sides)."""
    high, wide = grid[1] // MERGE, grid[2] // MERGE
    if region is None or min(high, wide) < LEAST_GRID:
        return None
    left, top, right, bottom = region
    across = np.clip(np.minimum(np.arange(1, wide + 1), right * wide) - np.maximum(np.arange(wide), left * wide), 0, 1)
    down = np.clip(np.minimum(np.arange(1, high + 1), bottom * high) - np.maximum(np.arange(high), top * high), 0, 1)
    cover = np.outer(down, across).reshape(-1)
    return cover if 0 < cover.mean() < 1 else None
