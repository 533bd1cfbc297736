"""What is asked of an engine and what comes back: images of a prompt, how a turn is sampled, what was sampled."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# vLLM clips a bias at 100: e^-100 is below what float32 adds to a normaliser, and nothing was ever sampled from it.
BAN_BIAS = -100.0


@dataclass(frozen=True)
class ImageRef:
    """One image of a prompt as the model sees it. uuid: the hash of its pixels; vLLM trusts it and caches by it."""

    uuid: str
    path: Path | None = None
    """The file in a folder that the server may read (media="file")."""
    data: bytes | None = None
    """The encoded image (media="data"); read from `path` if None."""

    def url(self, media: Literal["file", "data"]) -> str:
        if media == "file":
            assert self.path is not None, "media='file' needs a path"
            return self.path.absolute().as_uri()
        data = self.path.read_bytes() if self.data is None else self.data
        kind = "jpeg" if data[:2] == b"\xff\xd8" else "webp" if data[8:12] == b"WEBP" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Sampling:
    """How a turn is sampled; it ends at one of stop_token_ids, which is kept, or after max_tokens, at nothing else."""

    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled: 100 is taken off their logits before the temperature; the others are normalised without them."""

    def params(self) -> dict:
        """vLLM's SamplingParams as JSON."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": True,  # what ends a turn is our decision, not that of a generation_config.json
            "logit_bias": {str(token): BAN_BIAS for token in self.banned_token_ids} or None,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }


@dataclass(frozen=True)
class Generation:
    """What was sampled."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural logarithms, one per token, of the distribution that was sampled from: after ban, temperature, top_p."""
    prompt_token_ids: list[int]
    """The prompt as the engine expanded it: compare it with yours, always."""
    finish_reason: str
    """"stop": the last token is one of stop_token_ids; "length": max_tokens or the end of the context; "abort"."""
    weight_version: str
    """The adapter's name if there was one, else what the server reports; "a>b" if weights were changed in between."""
