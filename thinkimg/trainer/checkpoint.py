"""Policy directories: a model or an adapter, its optimizer and its counters, as safetensors and JSON and nothing else.

    model/                   full fine-tuning: a Hugging Face directory, float32, with tokenizer, processor, template
    adapter/                 LoRA: adapter_config.json, adapter_model.safetensors (float32), tokenizer and the like
    optimizer.safetensors    exp_avg.<parameter>, exp_avg_sq.<parameter> (AdamW), rng (torch's CPU generator, uint8)
    state.json               counters, learning rate, seed, base

Equal policies give equal bytes. At a fixed number of threads a loaded policy trains on bit by bit as if it had stayed
in memory. state.json names an adapter's base and gives no path, because the base may move.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.fsdp import gather_all
from thinkimg.trainer.policy import PolicyModel, add_adapter, load_adapter, load_model

COPIED = (".json", ".txt", ".jinja", ".model")  # tokenizer, processor and template beside the weights
NOT_COPIED = ("config.json", "generation_config.json", "adapter_config.json", "state.json", "manifest.json")


def start_from_base(base: Base, config: ModelConfig, device: torch.device | str, *, seed: int) -> PolicyModel:
    """Return an untrained policy: the base itself, or the base under an adapter that changes nothing yet.

    device: "meta" leaves the weights out, see `loading`; a new adapter is then on the CPU.
    Raises UserError if the base can't be loaded as configured.
    """
    torch.manual_seed(seed)
    source = base.locate()
    model = load_model(source, config, device)
    if config.adaptation == "lora":
        model = add_adapter(model, config)
    return PolicyModel(model.eval(), config, base, read_companions(source), weights_directory=source)


def load(
    directory: Path | str, config: ModelConfig, device: torch.device | str, base: Base | None = None
) -> PolicyModel:
    """Return the policy in a directory.

    base: says where an adapter's base lies; None: its name in state.json is a Hub id. device: as in `start_from_base`.
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
        weights, source = base.locate(), directory / "adapter"
        model = load_model(weights, config, device)
        model = load_adapter(model, source, config)
        adapter = source / "adapter_model.safetensors"
    else:
        weights = source = directory / "model"
        model, adapter = load_model(source, config, device), None
    from safetensors.torch import load_file

    path = directory / "optimizer.safetensors"  # old policies have lost theirs, see stages/train.py
    moments = load_file(path) if path.exists() else {}
    if moments:
        torch.set_rng_state(moments.pop("rng"))
    return PolicyModel(
        model.eval(),
        config,
        base,
        read_companions(source),
        updates=state["updates"],
        moments=moments,
        weights_directory=weights,
        adapter_file=adapter,
    )


def save(policy: PolicyModel, directory: Path | str, *, learning_rate: float, seed: int, write: bool = True) -> None:
    """Write a policy directory, which may exist if it is empty. learning_rate: of the last step; seed: of the job.

    write: False in all processes but one. If weights are sharded all processes must call, to hand over their shards.
    """
    if not (write or policy.sharded):
        return
    tensors = dict(policy.moments)
    if policy.optimizer is not None:
        names = {parameter: name for name, parameter in policy.model.named_parameters()}
        for parameter, values in policy.optimizer.state.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{names[parameter]}"] = values[moment]
    tensors = gather_all(tensors, keep=write)
    lora, weights = policy.config.adaptation == "lora", None
    if lora or policy.sharded:
        weights = gather_all(gather_adapter(policy) if lora else dict(policy.model.named_parameters()), keep=write)
    if not write:
        return
    from safetensors.torch import save_file

    directory = Path(directory)
    target = directory / ("adapter" if lora else "model")
    target.mkdir(parents=True)
    if lora:
        _save_adapter(policy, target, weights)
    else:
        policy.model.save_pretrained(target, max_shard_size="5GB", state_dict=weights)
    _write_companions(policy, target)
    save_file(tensors | {"rng": torch.get_rng_state()}, directory / "optimizer.safetensors")
    state = {
        "version": 1,
        "adaptation": policy.config.adaptation,
        "base": {"name": policy.base.name, "revision": policy.base.revision},
        "updates": policy.updates,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    _write_json(directory / "state.json", state)


def export_merged(directory: Path | str, out: Path | str, *, base: Base | None = None, dtype: str = "float32") -> None:
    """Write a complete model directory with a LoRA policy's weights merged into its base, for servers on a CPU.

    base: as in `load`. dtype: "float32" or "bfloat16". Raises UserError if the policy holds no adapter.
    """
    policy = load(directory, ModelConfig(dtype=dtype, adaptation="lora"), "cpu", base)
    policy.model.merge_and_unload().save_pretrained(out, max_shard_size="5GB")
    _write_companions(policy, Path(out))


def gather_adapter(policy: PolicyModel) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names that peft gives them in files."""
    from peft import get_peft_model_state_dict

    # Asked about embeddings, which are not adapted, peft would look for the base on the Hub.
    return get_peft_model_state_dict(policy.model, save_embedding_layers=False)


def read_state(directory: Path) -> dict:
    """Return state.json. Raises UserError if the directory holds no policy."""
    path = directory / "state.json"
    if not path.is_file():
        raise UserError(f"{directory} is no policy: it has no state.json.")
    return json.loads(path.read_text())


def read_companions(directory: Path) -> dict[str, bytes]:
    """Return the files that make token ids, pixels and prompts, by name."""
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in COPIED)
    return {p.name: p.read_bytes() for p in paths if p.name not in NOT_COPIED and not p.name.endswith(".index.json")}


def _write_companions(policy: PolicyModel, target: Path) -> None:
    for name, data in policy.files.items():
        (target / name).write_bytes(data)


def _save_adapter(policy: PolicyModel, target: Path, tensors: dict[str, Tensor]) -> None:
    """Write an adapter. peft's own save_pretrained would write sets in random order, and a README."""
    from safetensors.torch import save_file

    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = policy.model.peft_config["default"].to_dict()
    settings |= {"base_model_name_or_path": policy.base.name, "revision": policy.base.revision, "inference_mode": True}
    _write_json(
        target / "adapter_config.json", {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
