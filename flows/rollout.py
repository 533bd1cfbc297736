"""The flow of the stage `rollout`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import rollout as stages

rollout = stage_flow(stages.rollout)

if __name__ == "__main__":
    main(rollout)
