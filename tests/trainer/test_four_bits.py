"""LoRA over base weights in 4 bits, which bitsandbytes computes on a CPU as well."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from grpo_world import LORA

from thinkimg.models.base import Base
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.trainer import checkpoint
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.shared_prompts import share_groups
from thinkimg.trainer.policy import train_only
from thinkimg.trainer.rows import read_rows

FOUR = LORA.model_copy(update={"load_in_4bit": True})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    """As the world's, but with rows of whole blocks of 64 weights, of which each has a scale of its own."""
    directory = tmp_path_factory.mktemp("four") / "base"
    tiny = TinyModel(
        vocab_size=280, hidden_size=128, layers=2, heads=2, vision_layers=2, vision_hidden_size=32, vision_heads=2
    )
    create_tiny(directory, tiny, ["crop the image", "answer"], seed=0)
    return Base("tiny", directory=str(directory))


def linears(policy) -> dict[str, torch.nn.Module]:
    modules = unwrap(policy.model).model.language_model.named_modules()
    return {name: module for name, module in modules if name.endswith("base_layer")}


def make(base: Base, config):
    """A policy whose adapter changes something, the same for every config."""
    policy = checkpoint.start_from_base(base, config, "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return policy


def passes(policy, world) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As a job has them: log-probabilities without gradients, and the adapter's gradients of their sum."""
    chosen = train_only(policy.model, policy.config, vision=False)
    rows = read_rows(world.artifact, world.image_token)
    pixels = world.patches()
    pixels.prepare([row.conversation for row in rows])
    scorer = Scorer(policy.model, pixels, temperature=0.9, banned=(), features={})
    talks = [row.conversation for row in rows]
    units = share_groups(talks, [row.group_id for row in rows], world.image_token)
    with torch.no_grad():
        before, _ = scorer(talks, units)
    logps, _ = scorer(talks, units)
    logps.sum().backward()
    pixels.close()
    torch.testing.assert_close(logps.detach(), before)
    return before, {name: parameter.grad for name, parameter in chosen.items()}


def test_it_computes_with_the_weights_that_the_4_bits_mean(base, world):
    four, plain = make(base, FOUR), make(base, LORA)
    rounded, rounding = linears(four), 0.0
    for name, linear in linears(plain).items():
        packed = rounded[name].weight
        assert packed.dtype == torch.uint8 and packed.numel() * 2 == linear.weight.numel()
        meant = dequantize_4bit(packed.data, packed.quant_state)
        rounding = max(rounding, float((meant - linear.weight).abs().max()))
        linear.weight.data.copy_(meant)
    assert len(rounded) == 14 and rounding > 0
    (logps, gradients), (expected, reference) = passes(four, world), passes(plain, world)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == reference.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


def test_vision_tower_and_head_keep_their_precision(base):
    policy = unwrap(make(base, FOUR).model)
    kept = [*policy.model.visual.parameters(), policy.lm_head.weight, policy.model.get_input_embeddings().weight]
    assert {parameter.dtype for parameter in kept} == {torch.float32}


def test_its_policy_is_an_adapter_of_the_whole_base(base, tmp_path):
    """What is saved is loaded under either precision, and merged into the weights as they were."""
    policy = make(base, FOUR)
    checkpoint.save(policy, tmp_path / "policy", learning_rate=0.0, seed=0)
    for config in (FOUR, LORA):
        loaded = checkpoint.load(tmp_path / "policy", config, "cpu", base)
        for name, value in checkpoint.gather_adapter(policy).items():
            assert torch.equal(value, checkpoint.gather_adapter(loaded)[name]), name
    checkpoint.export_merged(tmp_path / "policy", tmp_path / "merged", base=base)
    from safetensors.torch import load_file

    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert dtypes == {torch.float32}
