"""Take GRPO steps from scored rollouts to the next policy."""

import logging
import shutil
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from thinkimg.config.tree import Config
from thinkimg.conversation.codec import Codec
from thinkimg.disk import writing
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import AdvantageResult, Inclusion, group_advantages, select_included_rows
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import BaseSource
from thinkimg.models.settings import ModelConfig
from thinkimg.records import StopReason
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.rewards.joined import Joined, join
from thinkimg.rewards.mix import Mix
from thinkimg.rewards.registry import load_components
from thinkimg.stages.stage import Input, Job, Lineage, Parameter, Slice, Stage
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.gc import drop_old_policies
from thinkimg.store.kinds import Dataset, Policy, Rollouts, Scores, open_artifact
from thinkimg.store.manifest import MANIFEST, OPTIMIZER, TRIMMED, Artifact
from thinkimg.trainer.settings import TrainConfig

log = logging.getLogger(__name__)

KEPT = 2  # policies of a loop that keep their optimizer's state


class TrainSettings(Slice):
    """Slice of `train`."""

    mix: Mapping[str, Any]
    """`mix`, and `image` where the mix names it, as Mix.fingerprinted returns them."""
    images: ViewLimits
    model: ModelConfig
    temperature: float
    max_tokens: int
    train: TrainConfig
    """`parity` decides whether there is an output, not which."""
    seed: int
    lag: int
    """`loop.lag`: loops of two lags go apart after their first policy, and the first to finish trims its optimizer."""
    base: BaseSource = Field(exclude=True)

    def fingerprinted(self) -> dict[str, Any]:
        excluded: dict[str, Any] = {"mix": True, "train": {"parity"}} | ({} if self.lag else {"lag": True})
        tree = self.model_dump(mode="json", exclude=excluded)
        return tree | {"model": self.model.defining()} | dict(self.mix)


def explain_lag(config: Config) -> str:
    """Return the reason why the policy to be trained does not follow from its rollouts; "" if it does."""
    return (
        "with loop.lag=1 the policy to be trained may be a later one than that which played." if config.loop.lag else ""
    )


def check_mix(config: Config) -> None:
    """Raise UserError where the mix names a component that is never scored."""
    Mix.from_config(config.mix, config.image).check(load_components(config.rewards, config.image))


def settings_of(config: Config) -> TrainSettings:
    """Return the slice of the config."""
    return TrainSettings(
        mix=Mix.from_config(config.mix, config.image).fingerprinted(),
        images=config.view(),
        model=config.model,
        temperature=config.rollout.temperature,
        max_tokens=config.conversation.max_tokens,
        train=config.train,
        seed=config.seed,
        lag=config.loop.lag,
        base=BaseSource.of(config.model),
        family=config.family().name,
    )


def run(job: Job[TrainSettings]) -> None:
    """Write the content: policy/, advantages.parquet. Raises UserError where the parity gate refuses.

    Where no group has anything to learn from, no step is taken and the next policy has the same weights. The metric
    train/no_step is then 1, and a warning says why.
    """
    settings, work = job.settings, job.work
    dataset, policy, player, rollouts, scores = (
        job.inputs[role] for role in ("dataset", "policy", "player", "rollouts", "scores")
    )
    reference = job.inputs.get("reference")
    check_optimizer(policy)
    check_correction(policy, player, settings.train)
    joined = join(rollouts, scores)
    ids, valid = joined.ids, joined.counted
    totals, result = compute_advantages(Mix.from_tree(settings.mix), settings.train, joined)
    rows = select_included_rows(
        result.included, joined.stops == StopReason.TRUNCATED,
        mask_truncated_completions=settings.train.loss.mask_truncated_completions,
    )  # fmt: skip
    if not work.has("advantages.parquet"):
        work.table("advantages.parquet", advantages_table(joined, totals, result))
    included = job.resources.scratch / "advantages.parquet"  # the trainer's copy: included rows only
    with writing(included):
        pa.parquet.write_table(
            pa.table({"trajectory_id": [ids[i] for i in rows], "advantage": result.advantages[rows]}), included
        )
    codec = Codec.load(policy.vocabulary)
    order = {
        "kind": "train",
        "policy": describe_policy(policy),
        "player": describe_policy(player),
        "base": settings.base.entry(policy),
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json"),
        "rollouts": str(rollouts.directory.resolve()),
        "images": {"tables": [str(a.directory.resolve()) for a in (dataset, rollouts)], **settings.images.model_dump()},
        "advantages": str(included),
        "conversation": {
            "temperature": settings.temperature,
            "banned": list(codec.banned),
            "max_tokens": settings.max_tokens,
        },
        "reference": reference and str((reference.directory / "policy").resolve()),
        "seed": settings.seed,
    }
    work.discard("policy")  # of a killed run: its metrics are lost, so that it is trained again
    with work.part("policy") as output:
        if len(rows):
            order["output"] = str(output.resolve())
            done = job.resources.trainer.submit(order, progress=lambda line: job.progress(line["step"], line["steps"]))
            work.metrics |= done["metrics"]
        else:
            log.warning(
                "no step is taken, as there is nothing to learn: %d of %d groups are silent, %d of %d rows don't count",
                len(result.silent_groups), len(set(joined.groups.tolist())), int((~valid).sum()), len(ids),
            )  # fmt: skip
            shutil.copytree(policy.checked("policy"), output)
    work.metrics |= {
        "reward/total": float(totals[valid].mean()) if valid.any() else None,
        "train/rows": len(rows),
        "train/no_step": float(len(rows) == 0),
        "train/silent_groups": len(result.silent_groups) / len(set(joined.groups.tolist())),
    }
    for reason in Inclusion:
        work.metrics[f"train/rows_{reason}"] = int((result.reasons == reason).sum())


def advantages_table(joined: Joined, totals: np.ndarray, result: AdvantageResult) -> pa.Table:
    """Return each row's total and advantage, and whether it entered the loss, in the order of the rollouts."""
    columns = {
        "trajectory_id": joined.ids,
        "group_id": joined.groups,
        "total": totals,
        "advantage": result.advantages,
        "included": result.included,
        "reason": [str(reason) for reason in result.reasons],
    }
    return pa.table(columns)


def check_optimizer(policy: Artifact) -> None:
    """Raise UserError where training can't go on from a policy, before a trainer is started."""
    name = f"policy/{OPTIMIZER}"
    if name in policy.files and policy.is_trimmed(name):
        raise UserError(
            f"The policy {policy.fingerprint[:12]} of these rollouts has no optimizer state any more: "
            f"only the last {KEPT} policies of a loop keep theirs.",
            hint="Train from the scores of the loop's first or last iteration; "
            "`thinkimg remix` shows what another mix would change in any scores.",
        )


def check_correction(policy: Artifact, player: Artifact, train: TrainConfig) -> None:
    """Raise UserError where another policy played, and the loss does not correct for it."""
    if policy.digest != player.digest and not train.loss.vllm_importance_sampling_correction:
        raise UserError(
            f"These rollouts were played by policy/{player.short}, not by policy/{policy.short}.",
            hint="Set train.loss.vllm_importance_sampling_correction=true, or train the policy that played.",
        )


def describe_policy(policy: Policy) -> dict[str, str]:
    """Return a policy as the trainer's jobs name it."""
    return {"directory": str((policy.directory / "policy").resolve()), "digest": policy.digest}


def tidy(store: Store, newest: Artifact, where: ResourcesConfig) -> None:
    """Remove what a loop's older policies need no more, and drop those that the settings don't keep."""
    trim_optimizers(store, newest)
    if where.keep_policies is not None:
        drop_old_policies(store, newest, where.keep_policies)


def trim_optimizers(store: Store, newest: Artifact) -> None:
    """Remove the optimizer states of the policies before the last two: they are two thirds of a policy.

    Such a policy can still be served, evaluated, merged and exported, but no longer trained on.
    """
    policy, age = newest, 0
    while policy.manifest["recipe"]["stage"] == train.name:
        name = f"policy/{OPTIMIZER}"
        if age >= KEPT and name in policy.files and not policy.dropped:
            if policy.is_trimmed(name):
                return  # all before it are trimmed, too
            files.write(policy.directory.with_suffix(TRIMMED), "")  # first: a file that is missing would be damage
            files.remove(policy.directory / name)
        directory = store.root / str(policy.inputs["policy"])
        if not (directory / MANIFEST).is_file():
            return  # kept elsewhere
        policy, age = open_artifact(directory), age + 1


def compute_advantages(mix: Mix, train: TrainConfig, joined: Joined) -> tuple[np.ndarray, AdvantageResult]:
    """Return the totals of a mix, and the advantages within groups, over the rows that count."""
    totals, scale = joined.totals(mix), train.loss.scale_rewards
    return totals, group_advantages(totals, joined.groups, joined.counted, scale_rewards=scale, min_std=train.min_std)


MixWeight = Annotated[float, Field(ge=0, le=1000)]

train = Stage(
    name="train",
    version=4,
    makes=Policy,
    settings=settings_of,
    run=run,
    reads={
        "scores": Input(Scores),
        "rollouts": Input(Rollouts, origin=Lineage("scores", "rollouts")),
        "dataset": Input(Dataset, origin=Lineage("rollouts", "dataset")),
        "policy": Input(Policy, origin=Lineage("rollouts", "policy"), shown=True, ambiguous=explain_lag),
        "player": Input(Policy, origin=Lineage("rollouts", "policy"), implied=True),
        # Reference of the KL term; with LoRA it is the base model, which is no artifact.
        "reference": Input(
            Policy,
            origin=Lineage("policy", "policy", first=True),
            counts=lambda config: config.train.loss.beta > 0 and config.model.adaptation == "full",
            shown=True,
        ),
    },
    offers={
        "mix": Parameter(
            dict[str, MixWeight] | None,
            None,
            "Weight of each reward component, all of them; left out, as the preset says.",
        )
    },
    packages=lambda settings: ("torch", "transformers", "peft", "pillow"),
    uses=lambda config: frozenset({"trainer"}),
    check=check_mix,
    tidy=tidy,
)
