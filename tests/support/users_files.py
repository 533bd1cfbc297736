"""Files of a user's own, as tests write them outside the clone: a loss, a protocol, a rule."""

REINFORCE = '''"""REINFORCE without a ratio."""

from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, token_mean


class Settings(LossConfig):
    strength: float = 1.0


def per_token(cfg, terms):
    return -cfg.strength * terms.advantages * terms.logps, {}


LOSS = Loss(per_token, token_mean)
'''
BRACKETS = '''"""A call in square brackets."""

from thinkimg.conversation.protocol import IMAGE_PART, Protocol, render_json, text_part


class Brackets(Protocol):
    open_call, close_call, args_key = "[[", "]]", "args"
    call_form = '[[{"name": "…", "args": {…}}]]'
    turn_form = "your thoughts, a blank line\\n\\n"

    def split(self, turn):
        thought, _, rest = turn.partition("\\n\\n")
        return thought, rest

    def render_thought(self, thought):
        return thought + "\\n\\n"

    def render_call(self, name, args):
        return f"[[{render_json(name, self.args_key, args)}]]"

    def observation(self, value, *, image):
        return [IMAGE_PART] * image + [text_part(value)]


PROTOCOL = Brackets()
'''
BREVITY = '''"""Short conversations are worth more."""

import thinkimg.settings
from thinkimg.rewards.batch import Score


class Settings(thinkimg.settings.Settings):
    most: int = 4


def score(batch):
    most = batch.config.brevity.most
    return [Score.of(max(0.0, 1 - len(row.turns) / most), "It is too long.") for row in batch.trajectories]
'''
