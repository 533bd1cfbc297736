"""The flow of the stage `train`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import train as stages

train = stage_flow(stages.train)

if __name__ == "__main__":
    main(train)
