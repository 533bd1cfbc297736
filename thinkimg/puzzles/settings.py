"""Settings of the scripted demonstrations."""

from thinkimg.settings import Settings, Share


class Flaws(Settings):
    """Shares of scripted demonstrations that are wrong on purpose, so that reinforcement learning can improve."""

    guess: Share = 0.25
    """Answers at once with a random choice, no tool."""
    wrong_call: Share = 0.4
    """Makes one systematically wrong call (the neighbouring cell, too little light, the wrong way round), then
    guesses."""
