"""The flow of the stage `demonstrate`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import demonstrate as stages

demonstrate = stage_flow(stages.demonstrate)

if __name__ == "__main__":
    main(demonstrate)
