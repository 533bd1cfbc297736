"""Codec between text and token ids; special tokens come from the chat template alone, never out of a text."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tokenizers import Tokenizer

from thinkimg.conversation.protocol import IMAGE_PART, Content, text_part
from thinkimg.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|im_end|>", "<|image_pad|>"
PICTURE = f"<|vision_start|>{PAD}<|vision_end|>"
SLOT = "\ue000{}\ue001"  # placeholder of a text while markup is cut into pieces


class Codec:
    """Encoder and decoder of conversations with a Qwen2.5-VL tokenizer.

    end, image: ids of <|im_end|> and <|image_pad|>. banned: ids that must never be sampled.

    Texts are untrusted: a question, an error that quotes the model. A text that spells <|im_end|> becomes the pieces of
    that string. The fast tokenizer's switch for this, encode_special_tokens, is set once on a copy, since transformers'
    split_special_tokens flips it on the shared tokenizer with each call. The switch heeds only tokens marked "special";
    in the copy all of the form <|…|> are, as Qwen leaves <|fim_prefix|> and others unmarked.

    A prompt's markup is rendered with slots in place of the texts and cut at its special tokens. Each piece is encoded
    with its texts filled in. Tokenizers cut at special tokens first, so that the result equals apply_chat_template's
    for every text without special tokens. That includes white space and Unicode normalisation at the seams.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in description["added_tokens"]:
            token["special"] |= is_markup(token["content"])
        self._plain = Tokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._ids = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
        missing = {END, "<|im_start|>", *re.findall(r"<\|\w+\|>", PICTURE)} - self._ids.keys()
        if missing:
            raise UserError(
                f"The tokenizer has no {', '.join(sorted(missing))}.", hint="The base model must be a Qwen2.5-VL."
            )
        self._specials = re.compile("(" + "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) + ")")
        self.end: int = self._ids[END]
        self.image: int = self._ids[PAD]
        self.banned = banned_tokens(tokenizer)

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Self:
        """Return the codec of a model: a directory, or an id on the Hub, with a tokenizer.json."""
        from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports sklearn: four seconds more

        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls(PreTrainedTokenizerFast.from_pretrained(path, **options))

    def encode(self, value: str) -> list[int]:
        """Return the ids of a text, none of them a special token. Lone surrogates become "?"."""
        return self._plain.encode(value.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cast(str, self._tokenizer.decode(list(ids), **options))

    def prompt(self, system: str, content: Content) -> list[int]:
        """Return the compact ids of the first prompt, by the chat template; an empty `system` is left out."""
        texts: list[str] = []
        messages: list[dict[str, Any]] = [{"role": "user", "content": insert_slots(content, texts)}]
        if system:
            messages.insert(0, {"role": "system", "content": insert_slots([text_part(system)], texts)[0]["text"]})
        markup = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._fill(cast(str, markup), texts)

    def observation(self, content: Content) -> list[int]:
        """Return the compact ids of a user's message between a turn that ended with `end` and the next turn."""
        texts: list[str] = []
        inner = "".join(PICTURE if part == IMAGE_PART else part["text"] for part in insert_slots(content, texts))
        return self._fill(f"\n<|im_start|>user\n{inner}{END}\n<|im_start|>assistant\n", texts)

    def _fill(self, markup: str, texts: list[str]) -> list[int]:
        ids: list[int] = []
        for piece in self._specials.split(markup):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids += self.encode(re.sub(SLOT.format(r"(\d+)"), lambda slot: texts[int(slot[1])], piece))
        return ids


def insert_slots(content: Content, texts: list[str]) -> Content:
    """Return the content with a slot in place of each text, and append the texts to `texts`."""
    parts = []
    for part in content:
        if part == IMAGE_PART:
            parts.append(part)
        else:
            parts.append(text_part(SLOT.format(len(texts))))
            texts.append(part["text"])
    return parts


def banned_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids that must not be sampled, sorted: all special tokens but <|im_end|>.

    A sampled placeholder has no image, and with a sampled <|im_start|> the model would speak as another role.
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = {token.content: i for i, token in added if token.special or is_markup(token.content)}
    return tuple(sorted(i for content, i in specials.items() if content != END))


def is_markup(token: str) -> bool:
    """Tell whether a token has the form <|…|>."""
    return token.startswith("<|") and token.endswith("|>")
