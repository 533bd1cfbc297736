"""The flow of the stage `warmstart`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import warmstart as stages

warmstart = stage_flow(stages.warmstart)

if __name__ == "__main__":
    main(warmstart)
