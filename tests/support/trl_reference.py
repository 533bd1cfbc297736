"""TRL 1.16's own code as a reference: its methods, bound to a stand-in that has what they read and nothing else."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from trl import import_utils

from thinkimg.grpo.settings import LossConfig

import_utils.is_vllm_available = lambda *_, **__: False  # TRL would import vLLM (10 s), which nothing here calls

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402 (after the line above)

EOS, PAD = 1, 0


class OneProcess:
    """accelerate.Accelerator of a single process, as far as TRL's loss uses it."""

    device, process_index, num_processes, sync_gradients = torch.device("cpu"), 0, 1, True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: float) -> Tensor:
        return tensor


def stand_in(cfg: LossConfig, *, group_size: int, max_completion_length: int, use_vllm: bool) -> SimpleNamespace:
    """`self` for GRPOTrainer's methods: one process, one micro-batch per step."""
    args = SimpleNamespace(
        **cfg.model_dump(),
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=1,
        gradient_checkpointing_kwargs=None,
    )
    trainer = SimpleNamespace(
        **cfg.model_dump(exclude={"epsilon_high"}),
        args=args,
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=SimpleNamespace(),
        epsilon_low=cfg.epsilon,
        epsilon_high=cfg.epsilon_high if cfg.epsilon_high is not None else cfg.epsilon,
        use_vllm=use_vllm,
        num_generations=group_size,
        num_iterations=1,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_funcs=[None],
        reward_func_names=["reward"],
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=cfg.entropy_coef != 0.0,
        aux_loss_enabled=False,
        environment_factories=None,
        environments=None,
        tools=None,
        log_multimodal=False,
        pad_to_multiple_of=None,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def score(
    cfg: LossConfig,
    *,
    rewards: np.ndarray,
    group_size: int,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    engine_logps: Tensor | None = None,
    lengths: list[int] | None = None,
    sampled: Tensor | None = None,
    truncated: np.ndarray | None = None,
    max_completion_length: int = 512,
) -> tuple[SimpleNamespace, dict]:
    """Run TRL's `_generate_and_score_completions` on given completions; returns its trainer and its output.

    rewards: (B,) float64. lengths: completion lengths. sampled: (B, T) 0/1, TRL's tool mask.
    """
    n = len(rewards)
    lengths = lengths or [1] * n
    truncated = np.zeros(n, dtype=bool) if truncated is None else truncated
    old_logps = torch.zeros(n, max(lengths), dtype=torch.float64) if old_logps is None else old_logps
    trainer = stand_in(
        cfg, group_size=group_size, max_completion_length=max_completion_length, use_vllm=engine_logps is not None
    )
    completion_ids = [[2] * (k - 1) + [2 if cut else EOS] for k, cut in zip(lengths, truncated, strict=True)]

    def rows(tensor: Tensor | None) -> list[list] | None:
        return None if tensor is None else [tensor[i, :k].tolist() for i, k in enumerate(lengths)]

    def logps_of(model: SimpleNamespace, *_, **__):
        return (ref_logps if model is trainer.ref_model else old_logps), None, None

    trainer._generate = lambda prompts: (
        *([[2]] * n, completion_ids, rows(sampled), ["text"] * n),
        *(rows(engine_logps), {}, None, None),
    )
    trainer._calculate_rewards = lambda *_: torch.from_numpy(rewards)[:, None]
    trainer._get_per_token_logps_and_entropies = logps_of
    output = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * n)
    output.setdefault("old_per_token_logps", old_logps)
    return trainer, output


def loss(trainer: SimpleNamespace, output: dict, logps: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, float]]:
    """TRL's `_compute_loss` on the output of `score`; returns the loss and the last value of each metric."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
    value = GRPOTrainer._compute_loss(trainer, None, output)
    return value, {name: values[-1] for name, values in trainer._metrics["train"].items()}
