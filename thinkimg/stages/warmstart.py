"""Make the first policy from demonstrations, a checkpoint, or the base model as it is."""

from typing import Any

from pydantic import Field

from thinkimg.config.tree import Config
from thinkimg.conversation.codec import Codec
from thinkimg.errors import UserError
from thinkimg.models.settings import ModelConfig
from thinkimg.stages.demonstrate import DemonstrateSettings, demonstrate, demonstrate_fields, locate_start
from thinkimg.stages.stage import Input, Job, Lineage, Stage
from thinkimg.store.kinds import Dataset, Demonstrations, Pairs, Policy
from thinkimg.store.manifest import Reference
from thinkimg.trainer.settings import Recomputation, WarmstartConfig


class WarmstartSettings(DemonstrateSettings):
    """Slice of `warmstart`."""

    model: ModelConfig
    warmstart: WarmstartConfig
    token_budget: int
    gradient_checkpointing: Recomputation = Field(exclude=True)  # changes memory and time alone

    def fingerprinted(self) -> dict[str, Any]:
        learning: dict[str, Any] = {}
        if self.demonstrates:
            learning = self.warmstart.model_dump(
                mode="json", include={"steps", "batch", "learning_rate", "warmup_steps"}
            )
            learning |= {"images": self.images.model_dump(mode="json"), "token_budget": self.token_budget}
        elif self.tiny is not None:  # the tokenizer is made for its texts
            learning = {"conversation": self.conversation.model_dump(mode="json")}
        return {"model": self.model.defining(), "warmstart": learning, "seed": self.seed}

    def outside(self) -> dict[str, Reference]:
        return {role: reference for role, reference in super().outside().items() if role != "script"}


def settings_of(config: Config) -> WarmstartSettings:
    """Return the slice of the config."""
    return WarmstartSettings(
        **demonstrate_fields(config),
        model=config.model,
        warmstart=config.warmstart,
        token_budget=config.train.token_budget,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )


def require_training(config: Config) -> None:
    """Raise UserError where a loop would train on a benchmark, which has no training split."""
    role = getattr(config.data, "role", "training")
    if role == "benchmark" and (config.iterations or config.has_demonstrations):
        raise UserError(
            "With data.role=benchmark every row is held out, so that there is nothing to train on.",
            hint="Train on other data, or set iterations=0 to evaluate the model as it is.",
        )


def run(job: Job[WarmstartSettings]) -> None:
    """Write the content: policy/. Without demonstrations the policy is the model to start from."""
    settings, work = job.settings, job.work
    demonstrations = job.inputs.get("demonstrations")
    start = locate_start(settings, job.inputs["dataset"], job.resources)
    steps = settings.warmstart.steps if demonstrations else 0
    order = {
        "kind": "warmstart",
        "base": settings.base.entry() | {"directory": str(start.resolve())},
        "model": settings.model.model_dump(mode="json"),
        "warmstart": settings.warmstart.model_dump(mode="json") | {"steps": steps},
        "rollouts": demonstrations and str(demonstrations.directory.resolve()),
        "images": {
            "tables": [str(artifact.directory.resolve()) for artifact in job.inputs.values()],
            **settings.images.model_dump(),
        },
        "token_budget": settings.token_budget,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "conversation": {"temperature": 1.0, "banned": list(Codec.load(start).banned)},
        "seed": settings.seed,
    }
    work.discard("policy")  # of a killed run: its metrics are lost, so that it is trained again
    with work.part("policy") as output:
        order["output"] = str(output.resolve())
        result = job.resources.trainer.submit(order, progress=lambda line: job.progress(line["step"], line["steps"]))
    work.metrics |= result["metrics"]


warmstart = Stage(
    name="warmstart",
    version=5,
    makes=Policy,
    settings=settings_of,
    run=run,
    reads={
        "dataset": Input(Dataset),
        "demonstrations": Input(Demonstrations, origin=demonstrate, counts=lambda config: config.has_demonstrations),
        # They hold the images that the demonstrations compare.
        "pairs": Input(
            Pairs,
            origin=Lineage("demonstrations", "pairs"),
            counts=lambda config: config.compares_pairs,
            implied=True,
        ),
    },
    packages=lambda settings: ("torch", "transformers", "tokenizers", "peft"),
    outside=WarmstartSettings.outside,
    check=require_training,
    uses=lambda config: frozenset({"trainer"}),
)
