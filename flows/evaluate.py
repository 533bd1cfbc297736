"""The flow of the stage `evaluate`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import evaluate as stages

evaluate = stage_flow(stages.evaluate)

if __name__ == "__main__":
    main(evaluate)
