"""Policy directories: a model or an adapter, its optimizer and its counters, as safetensors and JSON and nothing else.

    model/                   full fine-tuning: a complete Hugging Face directory, float32, with tokenizer, processor, template
    adapter/                 LoRA: adapter_config.json, adapter_model.safetensors (float32), tokenizer, processor, template
    optimizer.safetensors    exp_avg.<parameter>, exp_avg_sq.<parameter> (AdamW), rng (torch's CPU generator, uint8)
    state.json               counters, learning rate, seed, base

Equal policies give equal bytes, and a loaded policy trains on bit by bit as if it had stayed in memory (at a fixed number
of threads). The bases of adapters are named in state.json, never by a path: where they lie may change.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.fsdp import is_shard, like, wholes
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.vision import batch_equal_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS, EPSILON = (0.9, 0.999), 1e-8
COPIED = (".json", ".txt", ".jinja", ".model")  # tokenizer, processor and template beside the weights
NOT_COPIED = ("config.json", "generation_config.json", "adapter_config.json", "state.json", "manifest.json")


@dataclass
class Policy:
    """A model that is being trained. Parameters are named as transformers and peft name them."""

    model: "PreTrainedModel"
    config: ModelConfig
    base: Base
    files: dict[str, bytes] = field(repr=False)
    """Tokenizer, processor and chat template, by file name."""
    updates: int = 0
    """Optimizer steps of GRPO so far; the warm start's are not counted."""
    moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """As in optimizer.safetensors, until an optimizer takes them."""
    optimizer: torch.optim.AdamW | None = None
    sharded: bool = False
    """Whether its layers are spread over the processes (FSDP2, shards.py)."""
    fits: int = 0
    """Tokens of the largest micro-batch that memory was found to hold (preflight.py)."""
    packs: str | None = None
    """Why its rows can't be packed, "" where they can; None: not tried yet."""
    weights: Path | None = None
    """Directory that the model below the adapter was read from; None: it was read from nowhere."""
    adapter: Path | None = None
    """Safetensors file that the adapter was read from; None: there is none, or a new one."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """bfloat16 where the config says so; the trained weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def train_only(self, *, vision: bool) -> dict[str, torch.nn.Parameter]:
        """Freeze all but what the config lets train, and the vision tower too if not `vision`; name -> parameter."""
        return train_only(self.model, self.config, vision=vision)

    def resume_optimizer(self, parameters: dict[str, torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
        """AdamW over the parameters, with the moments of the steps so far. Raises UserError if these belong to others."""
        if self.optimizer is None:
            self.optimizer = new_optimizer(parameters.values(), weight_decay)
            known = {name.partition(".")[2] for name in self.moments}
            if self.updates and not known:
                raise UserError(
                    "The policy's optimizer state is gone: only the last two policies of a loop keep theirs.",
                    hint="Go on from the loop's first policy or from its last ones.",
                )
            if known and known != set(parameters):
                raise UserError(
                    "The policy's optimizer belongs to other parameters than those to be trained.",
                    hint="Keep model.adaptation and model.train_vision as they were, or start a new policy.",
                )
            # Not in the set's order: where layers are sharded all processes have to hand out the same moment at a time.
            for name, parameter in parameters.items() if known else ():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.updates), device=self.device),
                    "exp_avg": like(self.moments[f"exp_avg.{name}"], parameter),
                    "exp_avg_sq": like(self.moments[f"exp_avg_sq.{name}"], parameter),
                }
            self.moments = {}
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay
        return self.optimizer


def train_only(model: torch.nn.Module, config: ModelConfig, *, vision: bool) -> dict[str, torch.nn.Parameter]:
    """As Policy.train_only."""
    chosen = {}
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name if config.adaptation == "lora" else vision or ".visual." not in name
        parameter.requires_grad_(wanted)
        if wanted:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
            chosen[name] = parameter
    return chosen


def new_optimizer(parameters, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW whose learning rate is set before each step."""
    parameters = list(parameters)
    parts, wholes = [p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]
    groups = [{"params": group} for group in (parts, wholes) if group]  # one kernel call can't take both
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True)


def from_base(base: Base, config: ModelConfig, device: torch.device | str, *, seed: int) -> Policy:
    """A policy that has not been trained: the base itself, or the base under an adapter that changes nothing yet.

    Raises UserError if the base can't be loaded as configured.
    """
    torch.manual_seed(seed)
    source = base.locate()
    model = load_model(source, config, device)
    if config.adaptation == "lora":
        model = adapt(model, config)
    return Policy(model.eval(), config, base, companions(source), weights=source)


def adapt(model: "PreTrainedModel", config: ModelConfig):
    """The model under an adapter that changes nothing yet."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=language_linears(model))
    model = get_peft_model(model, lora)
    keep_input_dtype(model, config)
    return model


def load(directory: Path | str, config: ModelConfig, device: torch.device | str, base: Base | None = None) -> Policy:
    """The policy in a directory. base: where an adapter's base lies; by default its name in state.json is a Hub id.

    Raises UserError if there is no policy, or it is of another kind than config.adaptation, or has another base.
    """
    directory = Path(directory)
    state = read_state(directory)
    if state["adaptation"] != config.adaptation:
        raise UserError(
            f"{directory} holds a policy with model.adaptation {state['adaptation']}, not {config.adaptation}.",
            hint="Start a new loop to change it.",
        )
    base = base.checked(state) if base else Base(**state["base"])
    if config.adaptation == "lora":
        from peft import PeftModel

        weights, source = base.locate(), directory / "adapter"
        inner = load_model(weights, config, device)
        plain = "cpu" if torch.device(device).type == "cpu" else str(device)  # safetensors knows no cpu:0
        model = PeftModel.from_pretrained(inner, str(source), is_trainable=True, torch_device=plain)
        keep_input_dtype(model, config)
        adapter = source / "adapter_model.safetensors"
    else:
        weights = source = directory / "model"
        model, adapter = load_model(source, config, device), None
    from safetensors.torch import load_file

    kept = directory / "optimizer.safetensors"  # old policies have lost theirs, see stages/train.py
    moments = load_file(kept) if kept.exists() else {}
    if moments:
        torch.set_rng_state(moments.pop("rng"))
    origin = {"weights": weights, "adapter": adapter}
    return Policy(model.eval(), config, base, companions(source), state["updates"], moments, **origin)


def save(policy: Policy, directory: Path | str, *, learning_rate: float, seed: int, write: bool = True) -> None:
    """Write a policy directory (it may exist, empty). learning_rate: of the last step; seed: of the job.

    write: False in all processes but one; where weights are sharded all have to call, to hand over their parts.
    """
    if not (write or policy.sharded):
        return
    tensors = dict(policy.moments)
    if policy.optimizer is not None:
        names = {parameter: name for name, parameter in policy.model.named_parameters()}
        for parameter, values in policy.optimizer.state.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{names[parameter]}"] = values[moment]
    tensors = wholes(tensors, keep=write)
    lora = policy.config.adaptation == "lora"
    weights = (
        wholes(adapter_tensors(policy) if lora else policy.model.state_dict(), keep=write) if policy.sharded else None
    )
    if not write:
        return
    from safetensors.torch import save_file

    directory = Path(directory)
    target = directory / ("adapter" if lora else "model")
    target.mkdir(parents=True)
    if lora:
        save_adapter(policy, target, weights)
    else:
        policy.model.save_pretrained(target, max_shard_size="5GB", state_dict=weights)
    for name, data in policy.files.items():
        (target / name).write_bytes(data)
    save_file(tensors | {"rng": torch.get_rng_state()}, directory / "optimizer.safetensors")
    state = {
        "version": 1,
        "adaptation": policy.config.adaptation,
        "base": {"name": policy.base.name, "revision": policy.base.revision},
        "updates": policy.updates,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    write_json(directory / "state.json", state)


def export_merged(directory: Path | str, out: Path | str, *, base: Base | None = None, dtype: str = "float32") -> None:
    """Write a complete model directory with a LoRA policy's weights merged into its base, for servers on a CPU.

    base: as in `load`. dtype: "float32" or "bfloat16". Raises UserError if the policy holds no adapter.
    """
    config = ModelConfig(dtype=dtype, adaptation="lora")
    policy = load(directory, config, "cpu", base)
    merged = policy.model.merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")
    for name, data in policy.files.items():
        (Path(out) / name).write_bytes(data)


def adapter_tensors(policy: Policy) -> dict[str, Tensor]:
    """By the names that peft gives them in files."""
    from peft import get_peft_model_state_dict

    # Asked about embeddings, which are not adapted, peft would look for the base on the Hub.
    return get_peft_model_state_dict(policy.model, save_embedding_layers=False)


def save_adapter(policy: Policy, target: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """peft's own save_pretrained would write sets in random order and a README."""
    from safetensors.torch import save_file

    tensors = wholes(adapter_tensors(policy), keep=True) if tensors is None else tensors
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = policy.model.peft_config["default"].to_dict()
    settings |= {"base_model_name_or_path": policy.base.name, "revision": policy.base.revision, "inference_mode": True}
    write_json(target / "adapter_config.json", {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()})


def load_model(directory: Path, config: ModelConfig, device: torch.device | str) -> "PreTrainedModel":
    """Base weights in the dtype they are used in: float32 masters for full fine-tuning, else config.dtype or 4 bits.

    Raises UserError if they can't be loaded, or if the files lack some: transformers would draw those at random.
    """
    from transformers import AutoModelForImageTextToText

    options = {"output_loading_info": True}
    if config.load_in_4bit:
        from transformers import BitsAndBytesConfig

        device = torch.device(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
        options["device_map"] = {"": "cpu" if device.type == "cpu" else device.index or 0}
    dtype = torch.float32 if config.adaptation == "full" else getattr(torch, config.dtype)
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, trust_remote_code=config.trust_remote_code, attn_implementation="sdpa", **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The model in {directory} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    if model.config.model_type != "qwen2_5_vl":
        raise UserError(f"{directory} holds a {model.config.model_type}, not a qwen2_5_vl.")
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"The model in {directory} lacks {len(missing)} of its weights; the first is {missing[0]}.",
            hint="Is the download complete, and are the names in the files those of a Qwen2.5-VL?",
        )
    batch_equal_chunks(model)
    use_packed_attention(model)
    if not config.load_in_4bit:
        return model.to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a pass without gradients packs the weights for a kernel that has no backward (seen with 0.50).
            module.support_avx512bf16_for_cpu = False
    return model


def keep_input_dtype(model: torch.nn.Module, config: ModelConfig) -> None:
    """peft widens each adapter's input to float32, and autocast narrows it again at once: two passes over all activations
    for nothing, 600 MB for each linear layer of a 7B and 14,000 tokens."""
    if config.dtype == "bfloat16":  # the trainer's passes are then under autocast, see Policy.autocast
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False


def language_linears(model: "PreTrainedModel") -> str:
    """Regular expression for all linear layers of the language model (a set would be saved in random order)."""
    layers = model.model.language_model.named_modules()
    leaves = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, torch.nn.Linear)})
    return rf".*\.language_model\..*\.({'|'.join(leaves)})"


def read_state(directory: Path) -> dict:
    """state.json. Raises UserError if the directory holds no policy."""
    path = directory / "state.json"
    if not path.is_file():
        raise UserError(f"{directory} is no policy: it has no state.json.")
    return json.loads(path.read_text())


def companions(directory: Path) -> dict[str, bytes]:
    """Bytes of the files that make token ids, pixels and prompts, by name."""
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in COPIED)
    return {p.name: p.read_bytes() for p in paths if p.name not in NOT_COPIED and not p.name.endswith(".index.json")}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
