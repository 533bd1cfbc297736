"""The flow of the stage `known_pairs`."""

from flows._common import main
from flows._run import stage_flow
from thinkimg.stages import known_pairs as stages

known_pairs = stage_flow(stages.known_pairs)

if __name__ == "__main__":
    main(known_pairs)
