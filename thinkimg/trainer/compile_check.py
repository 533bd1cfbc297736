"""Trial of compiled decoder layers for a policy on this machine, against the layers as transformers wrote them."""

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from thinkimg.trainer.forward.compilation import use_compiled_layers
from thinkimg.trainer.packing_check import agree, find_difference, find_failure, run_passes
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.stepper import checkpoint_activations

log = logging.getLogger(__name__)


def is_wanted(device: torch.device) -> bool:
    """Return True for a device on which compiled layers save more time than they take to compile.

    On two CPU cores compiling takes a minute or two, longer than the steps of a tiny model's iteration.
    """
    return device.type == "cuda"


@contextmanager
def compile_layers(passes: Passes, *, checkpointing: bool) -> Iterator[dict[str, float]]:
    """Run a policy's decoder layers compiled within this context, where that is wanted and passes a trial.

    All processes call it. checkpointing: as in training. Yields metrics: compilation/fallback is 1 where it is wanted
    and not to be had; a warning then gives the reason.
    """
    policy = passes.policy
    wanted = is_wanted(policy.device)
    reason = find_obstacle(passes, checkpointing=checkpointing) if wanted else None
    if reason and passes.ranks.rank == 0:
        log.warning("Decoder layers are not compiled: %s.", reason)
    with compiled(policy) if wanted and reason is None else nullcontext():
        yield {"compilation/fallback": float(reason is not None)}


def compiled(policy: PolicyModel) -> AbstractContextManager[None]:
    """Return the context in which a policy's decoder layers run compiled."""
    return use_compiled_layers(policy.model, autocast=policy.config.precision == "bfloat16")


def find_obstacle(passes: Passes, *, checkpointing: bool) -> str | None:
    """Return the reason why layers can't be compiled on some process's machine, or None. All processes call it.

    It is tried once for each policy that is loaded.
    """
    policy, ranks = passes.policy, passes.ranks
    if policy.compilation_obstacle is None:
        reason = agree(ranks, name_obstacle(policy))
        if reason is None:
            with checkpoint_activations(policy.model, checkpointing):
                reason = agree(ranks, ranks.together(lambda: try_compilation(passes)))
        policy.compilation_obstacle = reason or ""
    return policy.compilation_obstacle or None


def name_obstacle(policy: PolicyModel) -> str | None:
    """Return the reason why a policy is not even tried, or None."""
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    if policy.sharded:
        return "FSDP2 spreads them over the processes"
    if policy.config.load_in_4bit:
        return "the base is in 4 bits"
    return None


def try_compilation(passes: Passes) -> str | None:
    """Return what compiling raises, or changes in log-probabilities and gradients if it is too much; else None.

    Three rows are tried: two together and one alone, with gradients and without, so that nothing is compiled later.
    """
    policy, rows = passes.policy, passes.rows
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].conversation.tokens))[:3]
    passes.pixels.prepare(passes.conversations(order))
    scorer = copy.copy(passes.scorer)
    scorer.features = None if scorer.features is None else {}  # as in packing_check.try_packing
    batches = [batch for share in (order[:2], order[2:]) if share for batch in passes.split(share)]
    expected = run_passes(policy, scorer, batches, backward=True)

    def compare() -> str | None:
        with compiled(policy):
            actual = run_passes(policy, scorer, batches, backward=True)
            scored, _ = run_passes(policy, scorer, batches, backward=False)
        return find_difference("compiled", policy.config.precision, expected, actual) or find_difference(
            "compiled", policy.config.precision, expected, (scored, expected[1])
        )

    return find_failure(policy, compare)
