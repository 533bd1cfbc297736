# ruff: noqa: E402
"""Process that samples by the kernels of vLLM's Model Runner V2, which GPUs run, under Triton's interpreter."""

import json
import os

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import vllm.platforms

vllm.platforms.vllm_version_matches_substr = lambda text: False  # else a CPU build has no Triton
import vllm.triton_utils.importing
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

from thinkimg.trainer.forward.logprobs import compute_logps

VOCABULARY, TOKENS, BANNED = 3000, 8, [5, 17, 2999]


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def sample(temperature: float, head: torch.nn.Linear, states: torch.Tensor) -> dict:
    """Sample a token from each state with seeds; compare its log-probability with the trainer's."""
    logits, mapping = head(states).detach(), torch.arange(TOKENS, dtype=torch.int32)
    ids, bias, count = zeros(TOKENS, 1024), torch.zeros(TOKENS, 1024), zeros(TOKENS) + len(BANNED)
    ids[:, : len(BANNED)], bias[:, : len(BANNED)] = torch.tensor(BANNED, dtype=torch.int32), -100.0
    none = (zeros(TOKENS), zeros(TOKENS, 1024))
    limits = (zeros(TOKENS), zeros(TOKENS), zeros(TOKENS), zeros(TOKENS, 128))
    apply_logit_bias(logits, mapping, torch.arange(TOKENS), *none, count, ids, bias, *limits)
    temperatures = torch.full((TOKENS,), temperature)
    if temperature != 1.0:
        apply_temperature(logits, mapping, temperatures)
    seeds = torch.randint(0, 2**62, (TOKENS,), generator=torch.Generator().manual_seed(1))

    def draw() -> torch.Tensor:
        places = torch.arange(TOKENS)
        return gumbel_sample(logits, mapping, temperatures, seeds, places, apply_temperature=False, is_drafting=False)

    tokens = draw()
    engine = compute_token_logprobs(logits, tokens[:, None])[:, 0]
    trainer, _ = compute_logps(head, states, tokens, temperature=temperature, banned=torch.tensor(BANNED))
    return {
        "again": bool((tokens == draw()).all()),
        "different": len(set(tokens.tolist())),
        "banned": sorted(set(tokens.tolist()) & set(BANNED)),
        "difference": float((engine - trainer.detach()).abs().max()),
    }


if __name__ == "__main__":
    assert vllm.triton_utils.importing.HAS_TRITON
    torch.manual_seed(0)
    head = torch.nn.Linear(64, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.mul_(4)
        head.weight[BANNED] = 10 * torch.ones(64)  # likely, if they weren't banned
    states = torch.randn(TOKENS, 64)
    print(json.dumps({str(temperature): sample(temperature, head, states) for temperature in (1.0, 0.7)}))
