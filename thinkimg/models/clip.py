"""CLIP models through open_clip: loading, encoding, and the training of a small one for machines without a hub."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from thinkimg.errors import UserError, shorten
from thinkimg.hub import cached_commit, find_commit, require_commit
from thinkimg.importing import importing
from thinkimg.models.seeding import seeded
from thinkimg.store import files
from thinkimg.store.manifest import Artifact

OWN_CLIP = "warmstart"
"""Value of image.embedding.model for the small CLIP that is trained on the puzzles."""
BATCH = 64  # images per forward: more gains nothing on a CPU, and 64 of ViT-B-32 are half a GB on a GPU
SIDE = 112  # of the small CLIP's images, in pixels
# open_clip's tokenizer has 49,408 pieces of text; the text tower is narrow, so that they are not most of the work.
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 96, "head_width": 32, "patch_size": 28},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
RESIZE = "squash"  # of every CLIP: open_clip's default cuts off what is not in the middle square
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": RESIZE}
LOGIT_SCALE = 20.0  # with CLIP's 100 a tiny model would only give values of 0 and 1
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class ClipName(Protocol):
    """Settings with the names of a CLIP model and of its weights, such as `image.embedding`."""

    @property
    def model(self) -> str:
        """Name of the model in open_clip, `local-dir:<folder>`, or OWN_CLIP."""
        ...

    @property
    def pretrained(self) -> str | None:
        """Name of the weights in open_clip, or their file."""
        ...


class Encoder:
    """Encoder of images and texts as unit vectors, (n, d) float32; it has the model's own logit_scale."""

    def __init__(self, model, preprocess: Callable, tokenizer: Callable, device):
        self._model, self._preprocess, self._tokenizer, self._device = model, preprocess, tokenizer, device
        self.logit_scale = float(model.logit_scale.detach().exp())

    def images(self, names: Sequence[str], open_image: Callable[[str], Image.Image], run: Callable = map) -> np.ndarray:
        """Return (n, d) float32 of the images of these names. run: a map for the preprocessing, such as a pool's."""

        def prepare(name: str):
            return self._preprocess(open_image(name))

        return self._encode(self._model.encode_image, (list(run(prepare, part)) for part in split_batches(names)))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, d) float32 of the texts.

        A text that is longer than the model's context is encoded in pieces: its vector is the mean of theirs.
        """
        pieces = [self.split_text(text) for text in texts]
        flat = [piece for part in pieces for piece in part]
        vectors = self._encode(
            self._model.encode_text, (list(self._tokenizer(list(part))) for part in split_batches(flat))
        )
        parts = np.split(vectors, np.cumsum([len(part) for part in pieces])[:-1])
        means = [part[0] if len(part) == 1 else part.mean(0) / np.linalg.norm(part.mean(0)) for part in parts]
        return np.array(means, dtype=np.float32)

    def split_text(self, text: str) -> list[str]:
        """Return the text in pieces that fit into the model's context, halved between words as often as it takes."""
        if self._fits(text) or len(text) < 2:
            return [text]
        middle = len(text) // 2
        spaces = [i for i, letter in enumerate(text[1:-1], 1) if letter.isspace()]
        cut = min(spaces, key=lambda i: abs(i - middle), default=middle)
        halves = filter(None, (text[:cut].strip(), text[cut:].strip()))
        return [piece for half in halves for piece in self.split_text(half)]

    def _fits(self, text: str) -> bool:
        """Tell whether no token of a text is cut: with room for one more it has the same tokens, and padding."""
        tokens = self._tokenizer([text])[0]
        roomy, empty = self._tokenizer([text, ""], context_length=len(tokens) + 1)
        return bool((roomy[:-1] == tokens).all() and roomy[-1] == empty[-1])

    def _encode(self, encode: Callable, batches: Iterator[list]) -> np.ndarray:
        import torch

        vectors = []
        with torch.inference_mode():
            for batch in batches:
                vectors.append(encode(torch.stack(batch).to(self._device), normalize=True).float().cpu().numpy())
        return np.concatenate(vectors) if vectors else np.empty((0, 0), dtype=np.float32)


def split_batches(items: Sequence) -> Iterator[Sequence]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def locate_clip(settings: ClipName, own: Artifact | None) -> tuple[str, str | None]:
    """Return (name, pretrained), for `load_encoder`, of the configured model, or of the artifact `own`."""
    return (f"local-dir:{own.checked('clip')}", None) if own else (settings.model, settings.pretrained)


def load_encoder(name: str, pretrained: str | None) -> Encoder:
    """Return the encoder of a model. Raises UserError if there is none or its weights can't be loaded."""
    with importing:
        import open_clip
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"device": device, "image_resize_mode": RESIZE}
    repository = hub_repository(name, pretrained)
    commit = repository and require_commit(repository)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=pretrained, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the library raises what its downloader, parser or torch raises
        detail = shorten(str(error))
        raise UserError(
            f"The CLIP model {name} ({pretrained}) can't be loaded: {detail}",
            hint="Set image.embedding.model and .pretrained to open_clip's names, or the model to local-dir:<folder>.",
        ) from error
    # open_clip takes no commit: it loads what the main branch is now, and leaves that in the cache.
    if repository and cached_commit(repository) != commit:
        raise UserError(f"The CLIP model {name} has changed on the Hub.", hint="Run the same command again.")
    return Encoder(model.eval(), preprocess, tokenizer, device)


def hub_repository(name: str, pretrained: str | None) -> str | None:
    """Return the repository of the Hub from which open_clip loads these weights, None if they are from elsewhere."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    if name.startswith("local-dir:") or pretrained is None:
        return None
    with importing:
        from open_clip import get_pretrained_cfg
    return get_pretrained_cfg(name.replace("/", "-"), pretrained).get("hf_hub", "").rpartition("/")[0] or None


def require_weights(settings: ClipName) -> None:
    """Raise UserError if the weights are of the Hub and their commit can't be known."""
    repository = hub_repository(settings.model, settings.pretrained)
    if repository:
        require_commit(repository)


def weights_digest(settings: ClipName, own: Artifact | None) -> str:
    """Return the digest of the artifact, the hash of local files, or the name and commit of weights of the Hub.

    Where the commit can't be known, it is the name alone: `load_encoder` then refuses the model.
    """
    if own is not None:
        return own.digest
    folder = settings.model.removeprefix("local-dir:")
    paths = [Path(settings.pretrained)] if settings.pretrained else []
    if folder != settings.model:
        if not Path(folder).is_dir():
            raise UserError(
                f"There is no CLIP model in {folder}.", hint="Name a folder that open_clip saved after local-dir:."
            )
        paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    if paths and all(path.is_file() for path in paths):
        return hashlib.sha256("".join(files.sha256_once(path) for path in paths).encode()).hexdigest()
    repository = hub_repository(settings.model, settings.pretrained)
    commit = find_commit(repository) if repository else None
    return "@".join(filter(None, (f"{settings.model}/{settings.pretrained}", commit)))


@contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads of the CPU for a block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tiny(
    directory: Path,
    triples: Sequence[tuple[str, Image.Image, Image.Image, Image.Image]],
    *,
    seed: int,
    steps: int,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, float]:
    """Train TINY on (question, right, original, wrong), write it as open_clip's local-dir and return metrics.

    Loss: Bradley-Terry (1952) over CLIP's own logits, right above original above wrong, as the reward compares them.
    """
    with importing:
        import open_clip
    import torch
    from torch.nn.functional import logsigmoid

    with seeded(seed):
        model = open_clip.CLIP(**TINY)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(LOGIT_SCALE))
    model.logit_scale.requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY["text_cfg"]["context_length"])
    tokens = tokenizer([question for question, *_ in triples])
    pixels = torch.stack([torch.stack([_shrink(image) for image in images]) for _, *images in triples])
    mean, std = (torch.tensor(PREPROCESS[name]).view(3, 1, 1) for name in ("mean", "std"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 4])
    losses = []
    for step in range(steps):
        chosen = torch.from_numpy(rng.choice(len(triples), min(batch, len(triples)), replace=False))
        seen = (pixels[chosen].float() / 255 - mean) / std  # (B, 3 images, 3, SIDE, SIDE)
        images = model.encode_image(seen.flatten(0, 1), normalize=True).unflatten(0, seen.shape[:2])
        asked, which = tokens[chosen].unique(dim=0, return_inverse=True)  # the puzzles have few different questions
        texts = model.encode_text(asked, normalize=True)[which]
        right, original, wrong = (LOGIT_SCALE * (images * texts[:, None]).sum(-1)).unbind(1)
        loss = -(logsigmoid(right - original) + logsigmoid(original - wrong) + logsigmoid(right - wrong)).mean() / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress(step + 1, steps)
    _save(model, directory)
    return {"loss": float(np.mean(losses[-10:])), "parameters": sum(p.numel() for p in model.parameters())}


def _shrink(image: Image.Image):
    """Return (3, SIDE, SIDE) uint8, as the saved preprocessing makes it."""
    import torch

    return torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _save(model, directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": TINY, "preprocess_cfg": PREPROCESS}
    (directory / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / WEIGHTS)
