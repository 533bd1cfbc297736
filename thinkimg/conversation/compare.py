"""The comparison prompt: which of two images makes a question easier to answer? The reply is one token, 1 or 2."""

import hashlib
import json

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import IMAGE, text
from thinkimg.errors import UserError

RATINGS = ("1", "2")
REPLY = "Easier with image "
"""What the reply begins with, so that the next token is the rating whatever the model is used to begin with."""


def instruction(question: str) -> str:
    """The text after the two images."""
    return f"Question: {question} With which of the two images is it easier to answer? Reply with 1 or 2."


def prompt(codec: Codec, question: str) -> list[int]:
    """Compact ids of [image][image] and the instruction, up to where the rating is the next token."""
    return codec.prompt("", [IMAGE, IMAGE, text(instruction(question))]) + codec.encode(REPLY)


def rating_tokens(codec: Codec) -> list[int]:
    """Ids of the two ratings. Raises UserError if the tokenizer has no token of its own for each."""
    start = codec.encode(REPLY)
    found = [codec.encode(REPLY + rating) for rating in RATINGS]
    if any(ids[:-1] != start for ids in found):
        raise UserError(
            "The tokenizer does not write 1 and 2 as tokens of their own.", hint="The policy must be a Qwen2.5-VL."
        )
    return [ids[-1] for ids in found]


def prompt_hash() -> str:
    """sha256 of everything that is said besides the question."""
    return hashlib.sha256(json.dumps([instruction("{}"), REPLY, RATINGS]).encode()).hexdigest()
