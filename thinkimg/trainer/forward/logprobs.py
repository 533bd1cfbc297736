"""Forward pass of a policy: log-probabilities of chosen tokens, with a slice of the logits in memory at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from thinkimg.models.family import Family, find_family
from thinkimg.trainer.forward import flex
from thinkimg.trainer.forward.free_memory import measure_free
from thinkimg.trainer.forward.fsdp import gather
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packed_attention import Layout
from thinkimg.trainer.forward.packing import Conversation, ImageToken, compute_mrope_positions
from thinkimg.trainer.forward.shared_prompts import Packed, Unit, pack, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Share of free memory that kept features of a frozen vision tower may take: 600 tokens of the 7B in bfloat16 are 4 MB.
GPU_SHARE = 0.5
CPU_SHARE = 0.25  # main memory is the engine's and the files' as well
HEAD_CHUNK = 512  # scored tokens per slice of logits: 512 x 152,064 float32 are 0.3 GB, and 0.3 TFLOP keep a GPU busy


def build_batch(
    rows: Sequence[Conversation], image_token: ImageToken, pad_token: int, device, positioner: Callable | None = None
) -> dict[str, Tensor]:
    """Return a right-padded batch. Causal attention never looks to the right, so padding needs no mask.

    positioner: (tokens, image token, grids) -> (3, T) positions; None: compute_mrope_positions.
    Returns tokens (B, T) int64, positions (3, B, T) int64, row and column (N,) of the scored tokens, row by row, and
    the indices of image tokens in the flattened batch.
    """
    length = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), length), pad_token, dtype=np.int64)
    positions = np.zeros((3, len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        positions[:, b, : len(row.tokens)] = (positioner or compute_mrope_positions)(row.tokens, image_token, row.grids)
    scored = [np.flatnonzero(row.scored) for row in rows]
    row_of = np.repeat(np.arange(len(rows)), [len(s) for s in scored])
    arrays = {"tokens": tokens, "positions": positions, "row": row_of, "column": np.concatenate(scored)}
    arrays["images"] = np.flatnonzero(tokens == image_token.id)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def compute_features(
    model,
    family: Family,
    images: Sequence[str],
    pixels: Callable[[str], np.ndarray],
    grids: np.ndarray,
    cache: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the features of images in order, (sum of tokens, width); the vision tower runs once for each unique one.

    images: keys. pixels: key -> (patches, values) float32. grids: (len(images), 3). width: as Family.compute_features.
    cache: features by key, of a frozen tower; new ones are added to it.
    """
    visual = get_base_model(model).visual
    image_token = ImageToken.of(unwrap(model).config)
    features = {} if cache is None else cache
    missing = {key: grid for key, grid in zip(images, grids, strict=True) if key not in features}
    if missing:
        grid = torch.as_tensor(np.stack(list(missing.values())))  # on the host, where vision.py reads it
        patches = torch.cat([torch.as_tensor(pixels(key)) for key in missing]).to(visual.device, visual.dtype)
        parts = family.compute_features(visual, patches, grid).split([*map(image_token.count, missing.values())])
        features |= zip(missing, parts, strict=True)
    return torch.cat([features[key] for key in images])


def embed_tokens(base, tokens: Tensor) -> Tensor:
    """Return the embeddings of tokens, (*tokens.shape, hidden)."""
    table = base.get_input_embeddings()
    return functional_call(table, {"weight": gather(table.weight)}, tokens)


def compute_padded_states(
    model, family: Family, batch: dict[str, Tensor], features: Tensor | None, **attention: object
) -> Tensor:
    """Return (N, hidden): for each scored token of a padded batch the state that predicts it.

    attention: further arguments of the attention function.
    """
    base = get_base_model(model)
    tokens = batch["tokens"]
    embeddings = embed_tokens(base, tokens)
    if features is not None:
        index = batch["images"]
        embedded, inputs = family.language_inputs(features.to(embeddings.dtype), index, embeddings.shape[-1])
        embeddings = embeddings.flatten(0, 1).index_copy(0, index, embedded).view_as(embeddings)
        attention |= inputs
    positions = batch["positions"]
    states = base.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **attention)
    return states.last_hidden_state[batch["row"], batch["column"] - 1]


def compute_packed_states(
    model, family: Family, packed: Packed, features: Tensor | None, *, grouped: bool = False
) -> Tensor:
    """Return (N, hidden): for each scored token of a packed batch the state that predicts it."""
    base = get_base_model(model)
    device = base.get_input_embeddings().weight.device
    tokens, positions, before = (
        torch.from_numpy(x).to(device) for x in (packed.tokens, packed.positions, packed.before)
    )
    embeddings = embed_tokens(base, tokens)
    inputs: dict[str, object] = {}
    if features is not None:
        index = torch.from_numpy(np.flatnonzero(packed.tokens == base.config.image_token_id)).to(device)
        embedded, inputs = family.language_inputs(features.to(embeddings.dtype), index, embeddings.shape[-1])
        embeddings = embeddings.index_copy(0, index, embedded)
    states = base.language_model(
        inputs_embeds=embeddings[None],
        position_ids=positions[:, None],
        use_cache=False,
        layout=Layout(packed.spans, device, grouped=grouped),
        **inputs,
    )
    return states.last_hidden_state[0].index_select(0, before)


def compute_logps(
    head: torch.nn.Linear,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (N,) float32 of targets (N,) given states (N, hidden), processed as the engine does.

    The engine renormalises after banning tokens and dividing by the temperature (logprobs_mode=processed_logprobs).
    Logits exist for HEAD_CHUNK tokens at a time and are computed again in the backward pass.
    entropy: also return entropies (N,) float32 in nats, with gradient if entropy_grad; else None.
    """

    weight = gather(head.weight)
    if weight is not head.weight and torch.is_autocast_enabled(weight.device.type):
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))  # once, and not for each slice

    def chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = functional_call(head, {"weight": weight}, states).float()
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
    """Scorer of whole conversations: log-probabilities under a model, processed as the engine does."""

    def __init__(
        self,
        model: "PreTrainedModel",
        pixels: Callable[[str], np.ndarray],
        *,
        temperature: float,
        banned: Sequence[int],
        features: dict[str, Tensor] | None,
        positioner: Callable | None = None,
    ):
        """pixels: image key -> patches, as `rows.Patches` gives them. banned: ids that the engine can't sample.

        features: cache of a frozen vision tower's features, by image key; None: the tower is being trained.
        positioner: of padded batches, in place of the right one, to see the effect of positions.
        """
        self.model, self.pixels, self.features, self.positioner = model, pixels, features, positioner
        self.head = unwrap(model).lm_head
        self.device = self.head.weight.device
        self.on_gpu = flex.is_used(self.device)
        self.feature_limit: int | None = None
        """Bytes of features that are kept; None: a share of what is free at the time."""
        config = unwrap(model).config
        self.family = find_family(config.model_type)
        self.image_token, self.pad_token = ImageToken.of(config), config.text_config.pad_token_id or 0
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
        """Return (N,) float32 log-probabilities of the scored tokens, row by row, and entropies (N,) if asked for.

        units: packing of the rows, by their index (shared_prompts.py); None: a padded batch.
        """
        if units is None:
            batch = self.build_batch(rows)
            states = self.compute_states(rows, batch)
            targets = batch["tokens"][batch["row"], batch["column"]]
        else:
            packed = pack(rows, units, self.image_token)
            features = self._features(packed.images, packed.grids)
            if self.on_gpu:
                packed = pad(packed, flex.round_up_to_bucket(len(packed.tokens)), self.pad_token)
            states = compute_packed_states(self.model, self.family, packed, features, grouped=self.on_gpu)
            targets = torch.from_numpy(packed.targets).to(self.device)
            del features  # as the padded branch holds none: memory while the head computes
        options = {"temperature": self.temperature, "banned": self.banned}
        return compute_logps(self.head, states, targets, entropy=entropy, entropy_grad=entropy_grad, **options)

    def build_batch(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        """Return the padded batch of rows, as the function build_batch."""
        return build_batch(rows, self.image_token, self.pad_token, self.device, self.positioner)

    def compute_states(self, rows: Sequence[Conversation], batch: dict[str, Tensor], **attention: object) -> Tensor:
        """Return the states of a padded batch, as compute_padded_states; the vision tower runs for new images."""
        images = [key for row in rows for key in row.images]
        grids = np.concatenate([row.grids for row in rows]) if images else None
        return compute_padded_states(self.model, self.family, batch, self._features(images, grids), **attention)

    def _features(self, images: Sequence[str], grids: np.ndarray | None) -> Tensor | None:
        if not len(images):
            return None
        with torch.set_grad_enabled(self.features is None and torch.is_grad_enabled()):
            return compute_features(self.model, self.family, images, self.pixels, grids, self.features)

    def trim(self) -> None:
        """Forget the oldest features beyond the limit."""
        if self.features:
            size = sum(feature.nbytes for feature in self.features.values())
            limit = self.feature_limit
            if limit is None:
                limit = (GPU_SHARE if self.on_gpu else CPU_SHARE) * (size + measure_free(self.device))
            while size > limit:
                size -= self.features.pop(next(iter(self.features))).nbytes
