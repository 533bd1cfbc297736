"""The train stage: a mix of the raw scores, group-relative advantages, and GRPO steps from one policy to the next."""

import logging
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from thinkimg.config import Config
from thinkimg.conversation.codec import Codec
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import AdvantageResult, Inclusion, advantages, included_rows
from thinkimg.models.base import base_entry
from thinkimg.records import SCHEMA_VERSION, StopReason
from thinkimg.resources import Machines, machines
from thinkimg.rewards.judges.teacher import check_teacher
from thinkimg.rewards.mix import Mix
from thinkimg.rewards.registry import components
from thinkimg.rollout import view_limits
from thinkimg.stages.score import read_scores
from thinkimg.stages.warmstart import model_slice
from thinkimg.store import files
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.store.manifest import MANIFEST, OPTIMIZER, TRIMMED, Reference

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

KEPT = 2  # policies of a loop that keep their optimizer's state
STAGE, VERSION, KIND = "train", 2, "policy"
OVER = (StopReason.MAX_TURNS, StopReason.MAX_TOKENS)


def recipe(config: Config, dataset: Artifact, policy: Artifact, rollouts: Artifact, scores: Artifact,
           reference: Artifact | None) -> Recipe:  # fmt: skip
    inputs = {"dataset": dataset, "policy": policy, "rollouts": rollouts, "scores": scores}
    if reference is not None:
        inputs["reference"] = reference
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={
            "images": view_limits(config),
            **Mix.of_config(config).slice(),
            "model": model_slice(config),
            "temperature": config.rollout.temperature,
            "max_tokens": config.conversation.max_tokens,
            "train": config.train.model_dump(mode="json", exclude={"parity"}),
            "seed": config.seed,
        },
        inputs={name: artifact.reference for name, artifact in inputs.items()},
        packages=package_versions("torch", "transformers", "peft", "pillow"),
    )  # fmt: skip


def train(
    config: Config, dataset: Artifact, policy: Artifact, rollouts: Artifact, scores: Artifact, store: Store, *,
    reference: Artifact | None = None, force: bool = False, progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """The policy after this iteration. reference: the policy that the KL term is measured against (loss.beta > 0).

    Raises UserError where the parity gate refuses. Where no group is left to learn from, no step is taken and the next
    policy has the same weights; the metric train/no_step is 1, and a warning says why.
    """
    check_mix(config)
    reference = reference_of(config, reference)

    def produce(work: Work) -> None:
        check_optimizer(policy)
        with machines(config) as crew:
            step(work, config, dataset, policy, rollouts, scores, reference, crew, progress)

    where = config.where.public()
    plan = recipe(config, dataset, policy, rollouts, scores, reference)
    made, cached = store.build(KIND, plan, produce, seed=config.seed, where=where, force=force)
    trim_optimizers(store, made)
    return made, cached


def check_optimizer(policy: Artifact) -> None:
    """Raise UserError where training can't go on from the policy, before a trainer is started."""
    name = f"policy/{OPTIMIZER}"
    if name in policy.files and policy.trimmed(policy.files[name]):
        raise UserError(
            f"The policy {policy.fingerprint[:12]} that these rollouts are of has no optimizer state any more: only the last "
            f"{KEPT} policies of a loop keep theirs.",
            hint="train from the scores of the loop's first or last iteration; `thinkimg remix` tells of any scores what "
            "another mix would make of them",
        )


def trim_optimizers(store: Store, newest: Artifact) -> None:
    """Remove the optimizer states of the policies behind the last two: they are two thirds of a policy.

    Such a policy still serves, is evaluated, merged and exported; training does not go on from it.
    """
    policy, age = newest, 0
    while policy.manifest["recipe"]["stage"] == STAGE:
        name = f"policy/{OPTIMIZER}"
        if age >= KEPT and name in policy.files and not policy.dropped:
            if policy.trimmed(policy.files[name]):
                return  # and all behind it
            files.write(policy.directory.with_suffix(TRIMMED), "")  # first: a file that is missing would be damage
            files.remove(policy.directory / name)
        directory = store.root / str(Reference(**policy.manifest["recipe"]["inputs"]["policy"]))
        if not (directory / MANIFEST).is_file():
            return  # kept elsewhere
        policy, age = Artifact.open(directory), age + 1


def reference_of(config: Config, first: Artifact | None) -> Artifact | None:
    """The policy of the KL term; with LoRA that is the base model, which needs no artifact."""
    return first if config.train.loss.beta > 0 and config.model.adaptation == "full" else None


def step(work: Work, config: Config, dataset: Artifact, policy: Artifact, rollouts: Artifact, scores: Artifact,
         reference: Artifact | None, crew: Machines, progress) -> None:  # fmt: skip
    import pyarrow as pa

    ends = rollouts.table("trajectories", ["trajectory_id", "stop", "turns"]).to_pydict()
    components, ids, groups = read_scores(scores)
    assert ids == ends["trajectory_id"], "scores are in the order of their rollouts"
    stops = np.array(ends["stop"])
    valid = counted(ends["stop"], ends["turns"])
    totals, result = weigh(config, components, np.array(groups), valid)
    rows = included_rows(
        result.included, stops == StopReason.TRUNCATED,
        mask_truncated_completions=config.train.loss.mask_truncated_completions,
    )  # fmt: skip
    if not work.has("advantages.parquet"):
        work.table("advantages.parquet", advantages_table(ids, groups, totals, result))
    chosen = crew.scratch / "advantages.parquet"  # the job's own copy: included rows only
    pa.parquet.write_table(
        pa.table({"trajectory_id": [ids[i] for i in rows], "advantage": result.advantages[rows]}), chosen
    )
    codec = Codec.load(crew.vocabulary(policy))
    job = {
        "kind": "train",
        "policy": {"directory": str((policy.directory / "policy").resolve()), "digest": policy.digest},
        "base": base_entry(config),
        "model": config.model.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "rollouts": str(rollouts.directory.resolve()),
        "images": {"tables": [str(a.directory.resolve()) for a in (dataset, rollouts)], **view_limits(config)},
        "advantages": str(chosen),
        "conversation": {
            "temperature": config.rollout.temperature,
            "banned": list(codec.banned),
            "max_tokens": config.conversation.max_tokens,
        },
        "reference": reference and str((reference.directory / "policy").resolve()),
        "seed": config.seed,
    }
    work.discard("policy")  # of a killed run: its figures are lost, so that it is trained again
    with work.part("policy") as output:
        if len(rows):
            job["output"] = str(output.resolve())
            done = crew.trainer.submit(job, progress=lambda line: progress(line["step"], line["steps"]))
            work.metrics |= done["metrics"]
        else:
            log.warning(
                "no group is left to learn from: no step is taken (%d of %d groups are silent, %d of %d rows don't count)",
                len(result.silent_groups), len(set(groups)), int((~valid).sum()), len(ids),
            )  # fmt: skip
            shutil.copytree(policy.checked("policy"), output)
    work.metrics |= {
        "reward/total": float(totals[valid].mean()) if valid.any() else None,
        "train/rows": len(rows),
        "train/no_step": float(len(rows) == 0),
        "train/silent_groups": len(result.silent_groups) / len(set(groups)),
    }
    for reason in Inclusion:
        work.metrics[f"train/rows_{reason}"] = int((result.reasons == reason).sum())


def advantages_table(ids: list[str], groups: list[str], totals: np.ndarray, result: AdvantageResult) -> "pa.Table":
    """What each row was worth, and whether it entered the loss; in order of the rollouts."""
    import pyarrow as pa

    columns = {
        "trajectory_id": ids,
        "group_id": groups,
        "total": totals,
        "advantage": result.advantages,
        "included": result.included,
        "reason": [str(reason) for reason in result.reasons],
    }
    return pa.table(columns)


def check_mix(config: Config) -> None:
    """Raise UserError where the mix names a component that is never scored, or a teacher who lives nowhere: before hours
    are spent, not after."""
    check_teacher(config)
    Mix.of_config(config).check(components(config.rewards, config.image))


def counted(stops: list[str], turns: list[list[dict]]) -> np.ndarray:
    """(N,) bool: the rows that count in the loss and in the statistics of their groups.

    A failed row does not. Nor does one that ran out of turns or tokens while every turn of it was in order: with more of
    them it might have been right (over-turn masking, Mini-o3, arXiv 2509.07969). One that spent its turns on malformed text or
    refused calls does count: where such rows were left out nothing held them back, and on the puzzles the share of
    malformed turns rose from 5 to 28 % within four iterations.
    """
    return np.array([
        stop != StopReason.FAILED and (stop not in OVER or any(turn["error"] for turn in row))
        for stop, row in zip(stops, turns, strict=True)
    ])  # fmt: skip


def weigh(
    config: Config, components: dict[str, np.ndarray], groups: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, AdvantageResult]:
    """Totals of the mix and the advantages within groups, over the rows that count."""
    totals = Mix.of_config(config).totals(components, groups, valid)
    scale = config.train.loss.scale_rewards
    return totals, advantages(totals, groups, valid, scale_rewards=scale, min_std=config.train.min_std)
