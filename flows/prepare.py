"""The flow of the stage `prepare`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import prepare as stages

prepare = stage_flow(stages.prepare)

if __name__ == "__main__":
    main(prepare)
