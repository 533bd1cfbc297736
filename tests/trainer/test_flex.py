"""FlexAttention, by which packed rows attend on a GPU: forward, backward and whole jobs, run on a CPU.

torch has no kernel of its backward pass for a CPU. Compiled by "aot_eager" it is its mathematical form, with the same
block mask. So mask, grouped heads, recompilation and the jobs around it are tested, and Triton's code is not.
"""

import functools

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from grpo_world import FULL, LORA, TRAIN, World
from torch._dynamo.utils import counters

from thinkimg.trainer import grpo_job, memory
from thinkimg.trainer.forward import flex
from thinkimg.trainer.forward.packed_attention import Layout, attend_packed
from thinkimg.trainer.forward.shared_prompts import Span

TOKENS = 512
SPANS = [[(150, (100, 62)), (50, (150,))], [(1, (255,)), (256, ())], [(512, ())]]  # prefix, and what follows it
MODELS = {"lora": LORA, "lora-bf16": LORA.model_copy(update={"dtype": "bfloat16"}), "full": FULL}


@pytest.fixture
def on_cpu(monkeypatch):
    """Has packed rows attend by FlexAttention on this machine."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    compiled = torch.compile(flex_attention.flex_attention, backend="aot_eager")
    monkeypatch.setattr(flex, "compile_flex", lambda: compiled)
    monkeypatch.setattr(flex, "is_used", lambda device: True)
    # The prediction runs on tensors without data, which the mask needs.
    monkeypatch.setattr(memory, "check_job", lambda passes, shares, options: (2 * bool(options.checkpointing), {}))
    flex.can_group_heads.cache_clear()
    torch.compiler.reset()
    counters.clear()
    yield
    flex.can_group_heads.cache_clear()


def layout_of(groups: list[tuple[int, tuple[int, ...]]]) -> Layout:
    """Layout of a batch of groups: lengths of a prefix and of the rows that share it."""
    spans: list[Span] = []
    for prefix, rows in groups:
        parent = len(spans)
        for length in (prefix, *rows):
            spans.append(Span(sum(span.length for span in spans), length, parent))
    assert sum(span.length for span in spans) == TOKENS
    return Layout(spans, torch.device("cpu"), grouped=True)


@pytest.mark.parametrize(
    ("heads", "dtype"), [((7, 1), torch.float32), ((14, 2), torch.bfloat16), ((4, 4), torch.float32)]
)
def test_values_and_gradients_are_those_of_the_packed_attention(on_cpu, monkeypatch, heads, dtype):
    generator = torch.Generator().manual_seed(0)
    bound = {torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    for groups in SPANS:
        inputs = [
            torch.randn(1, count, TOKENS, 32, generator=generator).to(dtype).requires_grad_()
            for count in (heads[0], heads[1], heads[1])
        ]
        layout = layout_of(groups)
        found, _ = attend_packed(None, *inputs, None, scaling=0.2, layout=layout)
        weights = torch.randn(found.shape, generator=generator).to(dtype)
        gradients = torch.autograd.grad(found, inputs, weights)
        with monkeypatch.context() as patch:
            patch.setattr(flex, "is_used", lambda device: False)
            expected, _ = attend_packed(None, *inputs, None, scaling=0.2, layout=layout)
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
        for value, right in zip(gradients, torch.autograd.grad(expected, inputs, weights), strict=True):
            assert float((value - right).float().norm() / right.float().norm()) < bound


@pytest.mark.parametrize(("name", "checkpointing"), [("lora", False), ("lora-bf16", True), ("full", True)])
def test_a_job_is_that_of_the_packed_attention(world, on_cpu, monkeypatch, name, checkpointing):
    compare_jobs(world, monkeypatch, name, checkpointing)


def test_a_job_with_deepstack_is_that_of_the_packed_attention(on_cpu, monkeypatch, tmp_path):
    """A batch is padded, and the levels are added where its images are; two query heads share a key head."""
    compare_jobs(World(tmp_path, family="qwen3_vl"), monkeypatch, "lora", True)


def compare_jobs(world: World, monkeypatch, name: str, checkpointing: bool) -> None:
    bound = 5e-2 if "bf16" in name else 1e-4

    def train(way: str) -> dict:
        settings = TRAIN.model_copy(update={"token_budget": 400, "gradient_checkpointing": checkpointing})
        job = world.job(f"{way}-{name}-{checkpointing}", model=MODELS[name], train=settings)
        return world.train(job)["metrics"]

    found = train("flex")
    graphs = counters["stats"]["unique_graphs"]
    assert found["packing/fallback"] == 0 and found["packing/computed"] < 1
    assert 0 < graphs <= 4, "masks are data: a job compiles a few times at most"
    monkeypatch.setattr(flex, "is_used", lambda device: False)
    expected = train("packed")
    for metric in ("grad_norm", "loss", "entropy"):
        assert found[metric] == pytest.approx(expected[metric], rel=bound, abs=1e-4), metric


def test_a_backward_pass_that_fails_costs_packing_and_not_the_run(world, on_cpu, monkeypatch, caplog):
    def refuse(query, *_, **__):
        return query + functools.partial(Refusing.apply)(query)

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query):
            return torch.zeros_like(query)

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of resource: shared memory")

    call = flex.call_flex
    monkeypatch.setattr(flex, "call_flex", lambda query, *rest: call(refuse(query), *rest))
    result = world.train(world.job("refusing", model=LORA))
    assert result["metrics"]["packing/fallback"] == 1 and "out of resource" in caplog.text
    assert grpo_job.log.name in {record.name for record in caplog.records}
