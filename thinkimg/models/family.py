"""Family of models: all that differs between the architectures that can be trained."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from thinkimg.errors import UserError, shorten
from thinkimg.hub import require_commit
from thinkimg.images.patches import ImageProcessor
from thinkimg.models.base import check_model, locate_checkpoint
from thinkimg.models.settings import FAMILIES, ModelConfig, Precision, TinyModel
from thinkimg.records import Coordinates

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


class Recurrence(NamedTuple):
    """Functions of transformers by which recurrent layers go through a sequence."""

    module: str
    rule: str
    """From queries, keys, values, decays and rates to the output, chunk by chunk."""
    convolution: str


class Family(ABC):
    """Architecture, preprocessing and habits of a family of models.

    Where a model's own files state a value (preprocessor_config.json, the chat template) they are compared with it.
    """

    model_types: ClassVar[tuple[str, ...]]
    """`model_type` of config.json: the first is that of the dense models."""
    hub_names: ClassVar[str]
    """Regular expression for the names of its models on the Hub, for where config.json can't be read."""
    processor: ClassVar[ImageProcessor]
    processor_class: ClassVar[str]
    """Processor of transformers."""
    coordinates: ClassVar[Coordinates]
    """Unit of the positions that it was trained to write."""
    attention_layer: ClassVar[int | None] = None
    """Layer in which the judge `attention` measures where the settings name none; None: see `pick_attention_layer`."""
    recurrence: ClassVar[Recurrence | None] = None
    """Functions of its recurrent layers, if it has any."""
    openings: ClassVar[tuple[str, str] | None] = None
    """Texts with which replies with a thought and without one begin, where its chat templates have the switch
    enable_thinking. Tiny models begin so; of others Codec reads the template."""
    protocols: ClassVar[tuple[str, ...]]
    """Protocols that suit it; the first is the one in which it was trained to call tools, `think` if it was not."""

    @property
    def name(self) -> str:
        """Name in manifests."""
        return self.model_types[0]

    def compute_features(self, visual: Any, patches: "Tensor", grids: "Tensor") -> "Tensor":
        """Return the features of images, (tokens, width): all that the language model takes of them, side by side.

        visual: the vision tower. patches: (patches, values). grids: (images, 3) int64.
        """
        return visual(patches, grid_thw=grids).pooler_output

    def prepare(self, model: Any) -> None:  # noqa: B027  most families need nothing
        """Adapt a loaded model to the trainer's forward passes, in place; nothing of it is saved with the model."""

    def language_inputs(self, features: "Tensor", index: "Tensor", hidden_size: int) -> tuple["Tensor", dict[str, Any]]:
        """Return what stands in place of image tokens, (tokens, hidden_size), and further inputs of the language model.

        features: as `compute_features` gives them. index: (tokens,) int64, of the image tokens in the flattened batch.
        """
        return features, {}

    def feature_width(self, config: "PretrainedConfig") -> int:
        """Return the width of `compute_features`. config: of the model."""
        return config.vision_config.out_hidden_size

    def attention_layers(self, text_config: "PretrainedConfig") -> tuple[int, ...]:
        """Return the layers of the language model that attend: those that can be read, and that have a cache."""
        return tuple(range(text_config.num_hidden_layers))

    def pick_attention_layer(self, text_config: "PretrainedConfig") -> int:
        """Return the layer in which the judge `attention` measures where the settings name none: that of the class, or
        the one nearest to two thirds of the depth.
        """
        if self.attention_layer is not None:
            return self.attention_layer
        wanted = 2 / 3 * text_config.num_hidden_layers
        return min(self.attention_layers(text_config), key=lambda layer: (abs(layer - wanted), layer))

    def state_bytes(self, text_config: "PretrainedConfig", itemsize: int) -> int:
        """Return the bytes of a sequence's recurrent states in the engine. itemsize: of the model's dtype."""
        return 0

    def packing_obstacle(self, text_config: "PretrainedConfig") -> str | None:
        """Return the reason why rows can't share the computation of their prompt, or None."""
        return None

    def experts_obstacle(self, model_type: str, adaptation: str) -> str | None:
        """Return the reason why a model of this type can't be trained with this `model.adaptation`, or None."""
        if model_type == self.name:
            return None
        if adaptation == "lora":
            return f"{model_type} has experts, whose weights are no linear layers, so that an adapter would miss them"
        return f"{model_type} has experts, and no training of all their weights has been tested"

    def tower_inputs(self, visual: Any, patches: int) -> dict[str, Any]:
        """Return inputs of the vision tower in place of those that it computes from the grids.

        With these, tensors that have shapes and no data pass it (trainer/memory.py). Their values are arbitrary.
        """
        import torch

        ends = torch.zeros(2, dtype=torch.int32)
        return {"cu_seqlens": ends, "max_seqlen": 1, "position_ids": torch.zeros(patches, 2)}

    def engine_options(self, *, cpu: bool) -> Mapping[str, object]:
        """Return vLLM's options that differ from engine.server's: a value, True for a flag, None to leave one out."""
        return {}

    def precisions(self, *, cpu: bool) -> tuple[Precision, ...]:
        """Return the precisions in which vLLM serves it; a tiny model has the first of those on a CPU."""
        return ("float32", "bfloat16")

    @abstractmethod
    def make_config(self, tiny: TinyModel, ids: Mapping[str, int]) -> "PretrainedConfig":
        """Return the config of a tiny model that keeps what makes the family different.

        ids: token ids of the vocabulary, or of the special tokens, whose ids are the highest.
        """

    def init_tiny(self, model: "PreTrainedModel") -> None:  # noqa: B027  most families need nothing
        """Draw those weights of a tiny model that need more than their fan-in (models/tiny.py), in place."""


def find_family(model_type: str) -> Family:
    """Return the family of a config.json's `model_type`. Raises UserError for an unknown one, with the known ones."""
    for family in list_families().values():
        if model_type in family.model_types:
            return family
    names = ", ".join(list_model_types())
    raise UserError(
        f"There is no model family for the model_type '{shorten(model_type)}'.",
        hint=f"Known are {names}. One of your own is an entry point of the group thinkimg.families.",
    )


def list_families() -> dict[str, Family]:
    """Return name of the entry -> family, those of entry points included."""
    return {name: load_family(name) for name in FAMILIES}


def load_family(name: str) -> Family:
    """Return the family of an entry's name or import path. Raises UserError where there is none, or a part of it."""
    family = FAMILIES.member(name, "FAMILY")
    if not isinstance(family, Family):
        raise UserError(f"The FAMILY of {name} is no Family.", hint="FAMILY = Mine(), of class Mine(Family)")
    if missing := [attribute for attribute in Family.__annotations__ if not hasattr(family, attribute)]:
        raise UserError(f"The FAMILY of {name} states no {' and no '.join(missing)}.", hint="Set it in its class.")
    return family


def family_of(model: ModelConfig, checkpoint: str | None = None) -> Family:
    """Return the family of the base model in the settings. checkpoint: directory that training starts from instead.

    Raises UserError as `family_at`, and where there is no checkpoint.
    """
    if checkpoint is not None:
        return find_family(read_model_type(locate_checkpoint(checkpoint) / "config.json"))
    if model.tiny is not None:
        return load_family(model.tiny.family)
    return family_at(model.path, model.revision)


def family_at(path: str | Path, revision: str | None = None) -> Family:
    """Return the family of a model directory, or of an id on the Hub.

    Of a model that this machine has no files of the id's name tells, so that nothing is asked of a network for a dry
    run; the trainer checks it (trainer/rows.py). Raises UserError for an unknown family, and for a model that can't be
    read.
    """
    check_model(str(path))
    config = Path(path, "config.json")
    if config.is_file():
        return find_family(read_model_type(config))
    if (cached := cached_config(str(path), revision)) is not None:
        return find_family(read_model_type(cached))
    name = str(path).rpartition("/")[2]
    for family in list_families().values():
        if re.match(family.hub_names, name, re.IGNORECASE):
            return family
    return find_family(read_model_type(fetch_config(str(path), revision)))


def read_model_type(config: Path) -> str:
    """Return the `model_type` of a config.json. Raises UserError if it can't be read, or states none."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} can't be read: {shorten(str(error))}") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise UserError(f"{config} states no model_type.", hint=f"Known are {', '.join(list_model_types())}.")
    return model_type


def list_model_types() -> list[str]:
    """Return the values of `model_type` that belong to a family."""
    return [name for family in list_families().values() for name in family.model_types]


def find_sources(name: str) -> dict[str, str]:
    """Return entry -> sha256 of its code where the family of this name is a user's own, for a fingerprint."""
    return FAMILIES.sources(entry for entry, family in list_families().items() if family.name == name)


def cached_config(name: str, revision: str | None) -> Path | None:
    """Return the config.json of a model on the Hub that this machine's cache has, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def fetch_config(name: str, revision: str | None) -> Path:
    """Return the config.json of a model on the Hub. Raises UserError where it can't be had, soon if nothing answers."""
    commit = require_commit(name, revision)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=commit))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"The config.json of {name} can't be read: {shorten(str(error))}",
            hint="Check model.path and that the Hub can be reached, or name a directory.",
        ) from error
