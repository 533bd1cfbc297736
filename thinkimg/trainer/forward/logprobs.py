"""The policy's forward pass: log-probabilities of chosen tokens without ever holding all logits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thinkimg.trainer.forward.flex import bucket
from thinkimg.trainer.forward.packed_attention import Layout
from thinkimg.trainer.forward.packing import Conversation, mrope_positions
from thinkimg.trainer.forward.shared_prompts import Packed, Unit, pack, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEATURE_BYTES = 2 * 2**30  # kept features of a frozen vision tower: 600 tokens of the 7B in bfloat16 are 4 MB
HEAD_CHUNK = 2048  # scored tokens per slice of logits: 2048 x 152,064 float32 are 1.2 GB


def unwrap(model: "PreTrainedModel"):
    """Qwen2_5_VLForConditionalGeneration below peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_model(model: "PreTrainedModel"):
    """Qwen2_5_VLModel (visual + language_model) below a head and, with LoRA, below peft's wrappers."""
    return unwrap(model).model


def batch_tensors(
    rows: Sequence[Conversation], image_token: int, pad_token: int, device, where: Callable | None = None
) -> dict[str, Tensor]:
    """Right-padded batch. Causal attention never looks to the right, so padding needs no mask.

    where: (tokens, image token, grids) -> (3, T) positions; None: mrope_positions.
    Returns tokens (B, T) int64, positions (3, B, T) int64, row and column (N,) of the scored tokens, row by row.
    """
    length = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), length), pad_token, dtype=np.int64)
    positions = np.zeros((3, len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        positions[:, b, : len(row.tokens)] = (where or mrope_positions)(row.tokens, image_token, row.grids)
    scored = [np.flatnonzero(row.scored) for row in rows]
    numbers = np.repeat(np.arange(len(rows)), [len(s) for s in scored])
    arrays = {"tokens": tokens, "positions": positions, "row": numbers, "column": np.concatenate(scored)}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def image_features(
    model,
    images: Sequence[str],
    pixels: Callable[[str], np.ndarray],
    grids: np.ndarray,
    known: dict[str, Tensor] | None = None,
) -> Tensor:
    """Features of the pictures in order, (sum of tokens, hidden); the vision tower runs once for each unique one.

    images: keys; pixels: key -> (patches, 1176) float32; grids: (len(images), 3). known: features that need not be
    computed again, by key; those that were computed are added to it (for a frozen tower, under no_grad).
    """
    visual = base_model(model).visual
    parts = {} if known is None else known
    missing = {key: grid for key, grid in zip(images, grids, strict=True) if key not in parts}
    if missing:
        grid = torch.as_tensor(np.stack(list(missing.values())), device=visual.device)
        flat = torch.from_numpy(np.concatenate([pixels(key) for key in missing])).to(visual.device, visual.dtype)
        features = visual(flat, grid_thw=grid).pooler_output
        parts |= zip(missing, features.split((grid.prod(-1) // 4).tolist()), strict=True)
    return torch.cat([parts[key] for key in images])


def hidden_states(model, batch: dict[str, Tensor], features: Tensor | None, image_token: int) -> Tensor:
    """(N, hidden): for each scored token the state that predicts it."""
    base = base_model(model)
    tokens = batch["tokens"]
    embeddings = base.get_input_embeddings()(tokens)
    if features is not None:
        where = (tokens == image_token)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(where, features.to(embeddings.dtype))
    states = base.language_model(inputs_embeds=embeddings, position_ids=batch["positions"], use_cache=False)
    return states.last_hidden_state[batch["row"], batch["column"] - 1]


def packed_states(model, packed: Packed, features: Tensor | None, image_token: int, *, grouped: bool = False) -> Tensor:
    """(N, hidden): for each scored token of a packed batch the state that predicts it."""
    base = base_model(model)
    embed = base.get_input_embeddings()
    device = embed.weight.device
    tokens, positions, before = (
        torch.from_numpy(x).to(device) for x in (packed.tokens, packed.positions, packed.before)
    )
    embeddings = embed(tokens)
    if features is not None:
        where = torch.from_numpy(np.flatnonzero(packed.tokens == image_token)).to(device)
        embeddings = embeddings.index_copy(0, where, features.to(embeddings.dtype))
    states = base.language_model(
        inputs_embeds=embeddings[None],
        position_ids=positions[:, None],
        use_cache=False,
        layout=Layout(packed.spans, device, grouped=grouped),
    )
    return states.last_hidden_state[0].index_select(0, before)


def token_logps(
    head: torch.nn.Linear,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (N,) float32 of targets (N,) given states (N, hidden), with the engine's processing.

    The engine renormalises after banning tokens and dividing by the temperature (logprobs_mode=processed_logprobs), so
    the same is done here. Logits exist for HEAD_CHUNK tokens at a time and are computed again in the backward pass.
    entropy: also return entropies (N,) float32 in nats, with gradient if entropy_grad; else None.
    """

    def chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(states).float()
        if banned is not None:
            logits = logits.index_fill(-1, banned, float("-inf"))
        if temperature != 1.0:
            logits = logits / temperature
        total = logits.logsumexp(-1)
        logp = logits.gather(-1, targets[:, None]).squeeze(-1) - total
        if not entropy:
            return logp, None
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            probabilities = (logits - total[:, None]).exp()
            weighted = probabilities * logits.masked_fill(torch.isneginf(logits), 0.0)  # 0 x -inf would be NaN
            return logp, total - weighted.sum(-1)

    slices = list(zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True))
    if torch.is_grad_enabled() and len(slices) > 1:
        parts = [checkpoint(chunk, s, t, use_reentrant=False) for s, t in slices]
    else:
        parts = [chunk(s, t) for s, t in slices]
    logps = torch.cat([part[0] for part in parts])
    if not entropy:
        return logps, None
    entropies = torch.cat([part[1] for part in parts])
    return logps, entropies if entropy_grad else entropies.detach()


class Scorer:
    """Log-probabilities of whole conversations under a model, as the engine would give them."""

    def __init__(
        self,
        model: "PreTrainedModel",
        pixels: Callable[[str], np.ndarray],
        *,
        temperature: float,
        banned: Sequence[int],
        features: dict[str, Tensor] | None,
        positions: Callable | None = None,
    ):
        """pixels: image key -> patches, as `packing.patches` gives them. banned: ids that the engine can't sample.

        features: where the features of a frozen vision tower are kept, by image key; None: the tower is being trained.
        positions: of padded batches, others than the right ones to see what they would change.
        """
        self.model, self.pixels, self.features, self.positions = model, pixels, features, positions
        self.head = unwrap(model).lm_head
        self.device = self.head.weight.device
        config = unwrap(model).config
        self.image_token, self.pad_token = config.image_token_id, config.text_config.pad_token_id or 0
        self.temperature = temperature
        self.banned = torch.tensor(sorted(banned), device=self.device) if banned else None

    def __call__(
        self,
        rows: Sequence[Conversation],
        units: Sequence[Unit] | None = None,
        *,
        entropy: bool = False,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 log-probabilities of the scored tokens, row by row, and their entropies (N,) if asked for.

        units: pack the rows, sharing their prefixes so (sharing.py); None: a padded batch.
        """
        if units is None:
            batch = batch_tensors(rows, self.image_token, self.pad_token, self.device, self.positions)
            images = [key for row in rows for key in row.images]
            grids = np.concatenate([row.grids for row in rows]) if images else None
            states = hidden_states(self.model, batch, self._features(images, grids), self.image_token)
            targets = batch["tokens"][batch["row"], batch["column"]]
        else:
            packed = pack(rows, units, self.image_token)
            features = self._features(packed.images, packed.grids)
            if self.device.type == "cuda":
                packed = pad(packed, bucket(len(packed.tokens)), self.pad_token)
            states = packed_states(self.model, packed, features, self.image_token)
            targets = torch.from_numpy(packed.targets).to(self.device)
        return token_logps(
            self.head, states, targets,
            temperature=self.temperature, banned=self.banned, entropy=entropy, entropy_grad=entropy_grad,
        )  # fmt: skip

    def _features(self, images: Sequence[str], grids: np.ndarray | None) -> Tensor | None:
        if not len(images):
            return None
        with torch.set_grad_enabled(self.features is None and torch.is_grad_enabled()):
            return image_features(self.model, images, self.pixels, grids, self.features)

    def trim(self) -> None:
        """Forget the oldest features beyond FEATURE_BYTES."""
        if self.features:
            size = sum(feature.nbytes for feature in self.features.values())
            while size > FEATURE_BYTES:
                size -= self.features.pop(next(iter(self.features))).nbytes
