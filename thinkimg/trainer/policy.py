"""Policy in training: a vision-language model, alone or under a LoRA adapter, with its optimizer."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinkimg.errors import UserError, shorten
from thinkimg.models.base import Base
from thinkimg.models.family import Family, find_family
from thinkimg.models.family_check import check_experts, check_files
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.fsdp import is_shard, shard_like
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.vision import batch_equal_chunks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class PolicyModel:
    """Model in training, in memory; `store.kinds.Policy` is the artifact that it is saved to.

    Parameters are named as transformers and peft name them.
    """

    model: "PreTrainedModel"
    config: ModelConfig
    base: Base
    files: dict[str, bytes] = field(repr=False)
    """Tokenizer, processor and chat template, by file name."""
    updates: int = 0
    """Optimizer steps of GRPO so far; the warm start's are not counted."""
    moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Contents of optimizer.safetensors, until an optimizer takes them."""
    optimizer: torch.optim.AdamW | None = None
    sharded: bool = False
    """True if its layers are spread over the processes (FSDP2, forward/fsdp.py)."""
    checked_tokens: int = 0
    """Tokens of the largest micro-batch that passed the memory check (memory.py)."""
    packing_obstacle: str | None = None
    """Reason why its rows can't be packed, "" if they can; None: not tried yet (packing_check.py)."""
    compilation_obstacle: str | None = None
    """Reason why its layers can't be compiled, "" if they can; None: not tried yet (compile_check.py)."""
    weights_directory: Path | None = None
    """Directory that the model below the adapter was read from; None: none."""
    adapter_file: Path | None = None
    """Safetensors file that the adapter was read from; None: there is none, or a new one."""

    @property
    def family(self) -> Family:
        """Family of the model."""
        return find_family(unwrap(self.model).config.model_type)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass: bfloat16 if the config says so. Trained weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def resume_optimizer(self, parameters: dict[str, torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
        """Return AdamW over the parameters, with the moments of the steps so far.

        Raises UserError if the moments are gone, or belong to other parameters.
        """
        if self.optimizer is None:
            self.optimizer = build_optimizer(parameters.values(), weight_decay)
            names = {name.partition(".")[2] for name in self.moments}
            if self.updates and not names:
                raise UserError(
                    "The policy's optimizer state is gone: only the last two policies of a loop keep theirs.",
                    hint="Go on from the loop's first policy or from its last two.",
                )
            if names and names != set(parameters):
                raise UserError(
                    "The policy's optimizer belongs to other parameters than those to be trained.",
                    hint="Keep model.adaptation and model.train_vision as they were, or start a new policy.",
                )
            # In the parameters' order, not the set's: all processes must shard the same moment at the same time.
            for name, parameter in parameters.items() if names else ():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.updates), device=self.device),
                    "exp_avg": shard_like(self.moments[f"exp_avg.{name}"], parameter),
                    "exp_avg_sq": shard_like(self.moments[f"exp_avg_sq.{name}"], parameter),
                }
            self.moments = {}
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay
        return self.optimizer


def train_only(model: torch.nn.Module, config: ModelConfig, *, vision: bool) -> dict[str, torch.nn.Parameter]:
    """Freeze all but what the config lets train, and the vision tower too if not `vision`.

    Returns the trained parameters by name, all float32.
    """
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name if config.adaptation == "lora" else vision or ".visual." not in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
            trained[name] = parameter
    return trained


def build_optimizer(parameters: Iterable[torch.nn.Parameter], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Return an AdamW whose learning rate is set before each step."""
    parameters = list(parameters)
    shards, others = [p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]
    groups = [{"params": group} for group in (shards, others) if group]  # one kernel call can't take both
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True)


def load_model(directory: Path, config: ModelConfig, device: torch.device | str) -> "PreTrainedModel":
    """Return a model in the dtype it is used in: float32 for full fine-tuning, else config.precision or 4 bits.

    device: "meta" builds it without weights, to be sharded and filled (weight_files.py).
    Raises UserError if it can't be loaded, if it is of no known family or its files state other values than that, and
    if the files lack weights: transformers would draw those at random.
    """
    from transformers import AutoConfig, GenerationConfig

    family = check_files(directory, config)
    device = torch.device(device)
    try:
        if device.type == "meta":
            if config.load_in_4bit:
                raise UserError(
                    "FSDP2 shards no weights in 4 bits.",
                    hint="Set model.load_in_4bit=false, or where.trainer.accelerate_config=ddp.",
                )
            geometry = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
            model = build_empty(geometry, config)
            if (directory / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(directory)
        else:
            model = read_model(directory, config, device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The model in {directory} can't be loaded: {shorten(str(error), 300)}") from error
    family.prepare(model)
    batch_equal_chunks(model)
    use_packed_attention(model)
    return model


def get_dtype(config: ModelConfig) -> torch.dtype:
    """Return the dtype that a model's weights are held in, if not in 4 bits."""
    return torch.float32 if config.adaptation == "full" else getattr(torch, config.precision)


def build_empty(geometry: "PretrainedConfig", config: ModelConfig) -> "PreTrainedModel":
    """Return the model that a config.json describes, on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            geometry,
            dtype=get_dtype(config),
            trust_remote_code=config.trust_remote_code,
            attn_implementation="sdpa",
        )
    model.tie_weights()
    return model.eval()


def read_model(directory: Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """Return a model with its weights on a device. Raises UserError if the files lack weights."""
    from transformers import AutoModelForImageTextToText

    options: dict[str, object] = {}
    if config.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, config.precision),
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
    if config.load_in_4bit or device.type == "cuda":  # part by part to the GPU: the host never holds all of it
        options["device_map"] = {"": "cpu" if device.type == "cpu" else device.index or 0}
    model, loading = AutoModelForImageTextToText.from_pretrained(
        directory,
        dtype=get_dtype(config),
        trust_remote_code=config.trust_remote_code,
        attn_implementation="sdpa",
        output_loading_info=True,
        **options,
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"The model in {directory} lacks {len(missing)} of its weights; the first is {missing[0]}.",
            hint="Is the download complete, and are the names in the files those of its architecture?",
        )
    if not config.load_in_4bit:
        return model.to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a pass without gradients packs the weights for a kernel that has no backward (seen with 0.50).
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(model: "PreTrainedModel", config: ModelConfig):
    """Return the model under a new LoRA adapter, which changes nothing yet; on the CPU if the model is on meta.

    Raises UserError for a model that can't have one.
    """
    from peft import LoraConfig, get_peft_model

    model_type = model.config.model_type
    check_experts(find_family(model_type), model_type, config)
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=match_language_linears(model))
    if next(model.parameters()).is_meta:
        # peft moves an adapter to its layer's device, and would lose its values on meta. So each weight of the model
        # lies on the CPU meanwhile, as one number that is repeated.
        model._apply(lambda tensor: torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape))
        model = get_peft_model(model, lora)
        model._apply(lambda tensor: tensor if any(tensor.stride()) else tensor.to("meta"))
        unwrap(model).tie_weights()
    else:
        model = get_peft_model(model, lora)
    lighten_adapter(model, config)
    return model


def load_adapter(model: "PreTrainedModel", directory: Path, config: ModelConfig):
    """Return the model under the LoRA adapter in a directory; of a model on meta its values are left out, too."""
    from peft import PeftConfig, PeftModel, get_peft_model

    device = next(model.parameters()).device
    if device.type == "meta":
        settings = PeftConfig.from_pretrained(str(directory))
        settings.inference_mode = False
        model = get_peft_model(model, settings)
    else:
        plain = "cpu" if device.type == "cpu" else str(device)  # safetensors knows no cpu:0
        model = PeftModel.from_pretrained(model, str(directory), is_trainable=True, torch_device=plain)
    lighten_adapter(model, config)
    return model


def lighten_adapter(model: torch.nn.Module, config: ModelConfig) -> None:
    """Let an adapter pass over the activations less often than peft does: docs/trainer.md, "LoRA's traffic".

    Its scaling is folded into B (forward/lora.py). Its input is not widened to float32 if autocast would narrow it
    again: 600 MB twice for each linear layer of a 7B and 14,000 tokens.
    """
    from thinkimg.trainer.forward.lora import fold_scaling

    fold_scaling(model)
    if config.precision == "bfloat16":
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False


def match_language_linears(model: "PreTrainedModel") -> str:
    """Return a regular expression for the language model's linear layers; peft would save a set in random order."""
    layers = model.model.language_model.named_modules()
    leaves = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, torch.nn.Linear)})
    return rf".*\.language_model\..*\.({'|'.join(leaves)})"
