"""The comparison prompt: two images, a question, and a reply of one token that names the more helpful image, 1 or 2."""

import hashlib
import json

from thinkimg.conversation.codec import KNOWN, Codec
from thinkimg.conversation.protocol import IMAGE_PART, text_part
from thinkimg.errors import UserError

RATINGS = ("1", "2")
REPLY = "Easier with image "
"""Beginning of the reply, so that the next token is the rating whatever the model usually begins with."""


def render_instruction(question: str) -> str:
    """Return the text after the two images."""
    return f"Question: {question} With which of the two images is it easier to answer? Reply with 1 or 2."


def encode_comparison(codec: Codec, question: str) -> list[int]:
    """Return the compact ids of both images, instruction and begun reply; the next token is the rating.

    The reply has no thought, since in an opened one the model would not rate.
    """
    content = [IMAGE_PART, IMAGE_PART, text_part(render_instruction(question))]
    return codec.prompt("", content, speaks=True) + codec.encode(REPLY)


def rating_tokens(codec: Codec) -> list[int]:
    """Return the ids of the two ratings. Raises UserError if the tokenizer has no token of its own for each."""
    start = codec.encode(REPLY)
    replies = [codec.encode(REPLY + rating) for rating in RATINGS]
    if any(ids[:-1] != start for ids in replies):
        raise UserError("The tokenizer does not write 1 and 2 as tokens of their own.", hint=KNOWN)
    return [ids[-1] for ids in replies]


def hash_prompt() -> str:
    """Return the sha256 of the prompt without its question."""
    return hashlib.sha256(json.dumps([render_instruction("{}"), REPLY, RATINGS]).encode()).hexdigest()
