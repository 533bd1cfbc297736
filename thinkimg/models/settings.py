"""Settings of the model: the base, its precision, and the weights that are trained."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from thinkimg.registry import Registry
from thinkimg.settings import EntryName, FilePath, Name, Positive, Settings

FAMILIES = Registry("families", "thinkimg.families")
"""Each defines `FAMILY`, an instance of a models.family.Family."""
Precision = Literal["bfloat16", "float32"]


class TinyModel(Settings):
    """Shape of a model made from nothing, for machines without a GPU and without a hub."""

    family: Annotated[str, EntryName(FAMILIES, "FAMILY")] = "qwen2_5_vl"
    """`qwen2_5_vl`, `qwen3_vl` or `qwen3_5`: the architecture."""
    vocab_size: Positive = 2048
    """Upper limit of the tokenizer's vocabulary, special tokens included."""
    hidden_size: Positive = 128
    """Width of the language model."""
    layers: Positive = 4
    """Layers of the language model."""
    heads: Positive = 4
    """Attention heads of the language model."""
    rope_theta: float = Field(20.0, gt=0)
    """Base of the rotary frequencies; Qwen's 1e6 leaves a tiny model blind to columns."""
    vision_layers: Positive = 4
    """Layers of the vision tower."""
    vision_hidden_size: Positive = 64
    """Width of the vision tower."""
    vision_heads: Positive = 2
    """Attention heads of the vision tower."""

    def sources(self) -> dict[str, str]:
        return FAMILIES.sources((self.family,))


class ModelConfig(Settings):
    """The base model, its precision, and what of it is trained."""

    path: FilePath = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id or directory of the base model. Not read where `tiny` is set."""
    revision: Name | None = None
    """Commit or tag on the Hub; null is the commit that its main branch is when the model is used."""
    tiny: TinyModel | None = None
    """Make a tiny model instead of loading one; `{}` takes the defaults of its settings."""
    dtype: Precision | None = None
    """Precision of the base weights in engine and trainer; trained weights and optimizer are float32. null: bfloat16,
    and for a tiny model float32, where vLLM serves its family in it on a CPU."""
    load_in_4bit: bool = False
    """Keep the frozen base weights of the trainer's language model in 4 bits (NF4; needs the package bitsandbytes).
    vLLM 0.32 has no such weights, so that the engine's differ: raise train.parity.max_kl to what the gate then
    measures."""
    trust_remote_code: bool = False
    """Run code that comes with the model repository."""
    adaptation: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights."""
    lora_rank: int = Field(64, ge=1, le=512)
    """Rank of the adapter; vLLM serves 512 at most."""
    lora_alpha: Positive = 128
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_rank."""
    train_vision: bool = False
    """Train the vision tower, too (only with adaptation: full)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.adaptation == "lora" and self.tiny:
            raise ValueError(
                "model.tiny needs model.adaptation: full: an adapter needs a base model that is kept somewhere"
            )
        if self.adaptation == "lora" and self.train_vision:
            raise ValueError("model.train_vision needs model.adaptation: full")
        if self.adaptation == "full" and self.load_in_4bit:
            raise ValueError("model.load_in_4bit needs model.adaptation: lora")
        if self.tiny and self.precision not in (possible := self._tiny_precisions()):
            raise ValueError(
                f"model.dtype={self.dtype} does not suit a tiny {self.tiny.family}, which vLLM serves on a CPU in "
                f"{' or '.join(possible)}: leave it null"
            )
        return self

    @property
    def precision(self) -> Precision:
        """Precision of the base weights, also where `dtype` names none. Raises UserError for an unknown tiny family."""
        if self.dtype is not None:
            return self.dtype
        if self.tiny is None:
            return "bfloat16"
        return self._tiny_precisions()[0]

    def _tiny_precisions(self) -> tuple[Precision, ...]:
        assert self.tiny is not None
        return FAMILIES.member(self.tiny.family, "FAMILY").precisions(cpu=True)

    def defining(self) -> dict[str, Any]:
        """Return the settings that define a training, for fingerprints; a digest identifies the weights, not a path."""
        fields = {"tiny", "load_in_4bit", "adaptation", "train_vision"}
        if self.adaptation == "lora":
            fields |= {"lora_rank", "lora_alpha"}
        return self.model_dump(mode="json", include=fields) | {"dtype": self.precision}
