"""Requests to an engine and their answers: the images of a prompt, sampling parameters, the sampled tokens."""

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

# vLLM clips a bias at 100. In float32 e^-100 adds nothing to the normaliser, and no such token was ever sampled.
BAN_BIAS = -100.0


@dataclass(frozen=True)
class ImageRef:
    """One image of a prompt, as the model sees it."""

    uuid: str
    """Hash of its pixels; vLLM caches by it and does not check it."""
    path: Path | None = None
    """File in a folder that the server may read (media="file")."""
    data: bytes | None = None
    """Encoded image (media="data"); read from `path` if None."""

    @property
    def memory(self) -> int:
        """Bytes of the data, and of the URL that holds them."""
        return 0 if self.data is None else len(self.data) + 4 * len(self.data) // 3

    def url(self, media: Literal["file", "data"]) -> str:
        """Return the image's URL: that of its file, or one that holds its data."""
        return self._file_url if media == "file" else self._data_url

    @cached_property  # every turn of a conversation sends it again
    def _file_url(self) -> str:
        assert self.path is not None, "media='file' needs a path"
        return self.path.absolute().as_uri()

    @cached_property
    def _data_url(self) -> str:
        data = self.path.read_bytes() if self.data is None else self.data
        kind = "jpeg" if data[:2] == b"\xff\xd8" else "webp" if data[8:12] == b"WEBP" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one turn.

    The turn ends at one of `stop_token_ids`, which is kept, or after `max_tokens`; nothing else ends it.
    """

    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled: their logits are lowered by 100 before the temperature."""

    def params(self) -> dict:
        """Return vLLM's SamplingParams as JSON."""
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": True,  # stop_token_ids end a turn, not a generation_config.json
            "logit_bias": {str(token): BAN_BIAS for token in self.banned_token_ids} or None,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }


@dataclass(frozen=True)
class Generation:
    """Tokens that the engine sampled for one prompt."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural logarithms, one per token, in the distribution that was sampled from: after ban and temperature."""
    prompt_token_ids: list[int]
    """The prompt as the engine expanded it, to be compared with ours."""
    finish_reason: str
    """"stop": the last token is one of stop_token_ids; "length": max_tokens or the end of the context; "abort"."""
    weight_version: str
    """Name of the adapter, or the version that the server reports; "a>b" if the weights changed meanwhile."""
