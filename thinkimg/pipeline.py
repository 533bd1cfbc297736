"""Pipeline, stated once: flows/loop.py runs it on Prefect, a dry run looks for its artifacts, tests build it.

prepare ──► dataset ─┬─► rollout ──► rollouts ──► score ──► scores ──► train ──► policy ─┐
                     │      ▲                    (one column per      (mix, advantages,  │
                     │      └── policy ◄──────────  reward component)  GRPO steps) ◄─────┘   × iterations
                     └─► evaluate ──► evaluation
"""

from typing import Any

from thinkimg.config.tree import Config
from thinkimg.models.base import BaseSource
from thinkimg.models.clip import require_weights, weights_digest
from thinkimg.scheduler import H, Run
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare, puzzles
from thinkimg.stages.rollout import rollout
from thinkimg.stages.score import score
from thinkimg.stages.stage import Stage
from thinkimg.stages.train import train
from thinkimg.stages.train_clip import train_clip
from thinkimg.stages.warmstart import warmstart

READERS: tuple[Stage[Any], ...] = (prepare, demonstrate, warmstart, score)
"""Stages that read what is no artifact."""


def outside_inputs(config: Config) -> dict[str, str]:
    """Return what a loop reads beside its config, for its identity: name -> digest.

    A user's data and conversations, weights from outside, and the user's own code. Raises UserError if one is missing,
    or if the commit of a model of the Hub can't be known: its name is no content.
    """
    stages = [stage for stage in READERS if stage.wanted(config)]
    references = [reference for stage in stages for reference in stage.outside(stage.settings(config)).items()]
    code = {f"code of {path}": digest for path, digest in config.sources().items()}
    digests = {role: reference.digest for role, reference in references} | code
    # Each again once its commit is certain: the Hub may have answered only now.
    if "base" in digests:
        base = BaseSource.of(config.model)
        base.require()
        digests["base"] = base.reference().digest
    if "clip" in digests:
        require_weights(config.image.embedding)
        digests["clip"] = weights_digest(config.image.embedding, None)
    return digests


def pipeline(run: Run[H], config: Config) -> H:
    """Call `run` with every stage, and return its handle of the last policy."""
    data = run(prepare)
    pairs = run(known_pairs, dataset=run(puzzles) or data)
    demonstrations = run(demonstrate, dataset=data, pairs=pairs)
    first = run(warmstart, dataset=data, demonstrations=demonstrations, pairs=pairs)
    clip = run(train_clip, pairs=pairs)
    policies = [first]
    evaluation = run(evaluate, dataset=data, policy=first, samples=config.evaluate.samples_ends)
    run.report(
        0, prepare=data, pairs=pairs, demonstrate=demonstrations, warmstart=first, clip=clip, evaluate=evaluation
    )
    for i in range(1, config.iterations + 1):
        player = policies[max(0, i - 1 - config.loop.lag)]
        rollouts = run(rollout, dataset=data, policy=player, iteration=i)
        scores = run(score, dataset=data, rollouts=rollouts, player=player, clip=clip, first=first)
        policies.append(
            run(
                train,
                dataset=data,
                policy=policies[-1],
                player=player,
                rollouts=rollouts,
                scores=scores,
                reference=first,
            )
        )
        last, evaluation = i == config.iterations, None
        if last or i % config.evaluate.every == 0:
            samples = config.evaluate.samples_ends if last else config.evaluate.samples
            evaluation = run(evaluate, dataset=data, policy=policies[-1], samples=samples)
        run.report(i, rollout=rollouts, score=scores, train=policies[-1], evaluate=evaluation)
    return policies[-1]
