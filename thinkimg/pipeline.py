"""Pipeline, stated once: flows/loop.py runs it on Prefect, a dry run looks for its artifacts, tests build it.

prepare ──► dataset ─┬─► rollout ──► rollouts ──► score ──► scores ──► train ──► policy ─┐
                     │      ▲                    (one column per      (mix, advantages,  │
                     │      └── policy ◄──────────  reward component)  GRPO steps) ◄─────┘   × iterations
                     └─► evaluate ──► evaluation
"""

from thinkimg.config.tree import Config
from thinkimg.scheduler import H, Run
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare, puzzles
from thinkimg.stages.rollout import rollout
from thinkimg.stages.score import score
from thinkimg.stages.train import train
from thinkimg.stages.train_clip import train_clip
from thinkimg.stages.warmstart import warmstart


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
        player = policies[-1]
        rollouts = run(rollout, dataset=data, policy=player, iteration=i)
        scores = run(score, dataset=data, rollouts=rollouts, player=player, clip=clip, first=first)
        policies.append(
            run(train, dataset=data, policy=policies[-1], rollouts=rollouts, scores=scores, reference=first)
        )
        samples = config.evaluate.samples_ends if i == config.iterations else config.evaluate.samples
        evaluation = run(evaluate, dataset=data, policy=policies[-1], samples=samples)
        run.report(i, rollout=rollouts, score=scores, train=policies[-1], evaluate=evaluation)
    return policies[-1]
