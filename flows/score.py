"""The flow of the stage `score`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import score as stages

score = stage_flow(stages.score)

if __name__ == "__main__":
    main(score)
