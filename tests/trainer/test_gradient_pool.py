"""Micro-batches of a warm start side by side: the gradients, and the bits, of one after another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from grpo_world import FULL, LORA

from thinkimg.trainer import checkpoint, gradient_pool, warmstart_job
from thinkimg.trainer.gradient_pool import CORE_TOKENS, GradientPool
from thinkimg.trainer.policy import train_only
from thinkimg.trainer.ranks import Ranks

BF16 = FULL.model_copy(update={"dtype": "bfloat16"})


@pytest.fixture
def threads():
    """Sets the number of threads; it is one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def warm_up(world, name: str, model=FULL) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of a warm start in micro-batches of few tokens, and the weights after it."""
    job = world.warmstart_job(name, model=model.model_dump(mode="json"), token_budget=200)
    policy = checkpoint.start_from_base(world.base, model, "cpu", seed=0)
    result = warmstart_job.run(job, policy, Ranks(), lambda line: None)
    return [step["loss"] for step in result["steps"]], dict(policy.model.named_parameters())


@pytest.mark.parametrize("model", [FULL, BF16, LORA], ids=["float32", "bfloat16", "lora"])
def test_a_warm_start_has_the_bits_of_micro_batches_one_after_another(world, monkeypatch, threads, model):
    def learn(count: int):
        threads(count)
        losses, weights = warm_up(world, f"pool-{model.adaptation}-{model.dtype}-{count}-{gradient_pool.SMALL}", model)
        with ThreadPoolExecutor(1) as later:
            assert {torch.get_num_threads(), later.submit(torch.get_num_threads).result()} == {count}, "as before"
        return losses, weights

    monkeypatch.setattr(GradientPool, "limit", lambda self, budget: 80)
    runs = [learn(1), learn(3)]
    monkeypatch.setattr(gradient_pool, "SMALL", 0)
    losses, weights = learn(1)
    assert len(set(losses)) == len(losses)
    for other_losses, others in runs:
        assert other_losses == losses
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def pool_of(world, **changes) -> tuple[GradientPool, torch.nn.Parameter]:
    policy = checkpoint.start_from_base(world.base, FULL, "cpu", seed=0)
    for name, value in changes.items():
        setattr(policy, name, value)
    parameter = next(iter(train_only(policy.model, FULL, vision=True).values()))
    parameter.grad = torch.zeros_like(parameter)
    return GradientPool(policy, [parameter], shared_features=False), parameter


def test_gradients_are_added_in_the_order_of_the_batches_whoever_is_first(world, threads):
    """Float32 sums depend on their order: the second batch cancels the first, the third would vanish beside it."""
    threads(3)
    pool, parameter = pool_of(world)
    others = set()

    def compute_loss(factor: float):
        others.add(threading.get_ident())
        time.sleep(0.2 if factor == 1e8 else 0)  # the first is the last to be ready
        return (parameter * factor).sum()

    with pool:
        losses = pool.accumulate(compute_loss, iter([1e8, -1e8, 1.0]))
    assert len(losses) == 3 and losses[0] == -losses[1]
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert threading.get_ident() not in others and len(others) > 1


def test_a_failure_in_a_micro_batch_is_that_of_the_step(world, threads):
    threads(2)
    pool, parameter = pool_of(world)
    with pytest.raises(ArithmeticError, match="third"), pool:
        pool.accumulate(lambda number: (parameter * 1).sum() if number < 3 else fail(), [1, 2, 3, 4])
    assert torch.get_num_threads() == 2


def fail():
    raise ArithmeticError("third")


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("budget", [1, 40, 2048, 16384])
def test_what_is_under_way_is_within_the_budget(world, threads, count, budget):
    threads(count)
    pool, _ = pool_of(world)
    with pool:
        limit = pool.limit(budget)
    assert limit == 1 or limit <= CORE_TOKENS and limit * count <= budget
    assert limit >= min(CORE_TOKENS, budget // count)


def test_a_large_or_sharded_model_goes_one_after_another(world, threads, monkeypatch):
    """And takes a batch when the one before is done, as its images are read meanwhile."""
    threads(2)
    pools = [pool_of(world, sharded=True)]
    monkeypatch.setattr(gradient_pool, "SMALL", 1)
    for pool, parameter in [*pools, pool_of(world)]:
        events = []

        def batches(events=events):
            for number in range(3):
                events.append(f"read {number}")
                yield number

        def compute_loss(number, events=events, parameter=parameter):
            events.append(f"compute {number}")
            return (parameter * number).sum()

        with pool:
            pool.accumulate(compute_loss, batches())
            assert pool.limit(9000) == 9000
        assert events == [f"{verb} {number}" for number in range(3) for verb in ("read", "compute")]
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3))
