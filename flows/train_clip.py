"""The flow of the stage `train_clip`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import train_clip as stages

train_clip = stage_flow(stages.train_clip)

if __name__ == "__main__":
    main(train_clip)
