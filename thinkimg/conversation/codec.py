"""Between text and token ids: special tokens come from us and from the chat template, never out of a text."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tokenizers import Tokenizer

from thinkimg.conversation.protocol import IMAGE, Content, text
from thinkimg.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|im_end|>", "<|image_pad|>"
PICTURE = f"<|vision_start|>{PAD}<|vision_end|>"
SLOT = "\ue000{}\ue001"  # stands for a text while markup is taken apart


class Codec:
    """A Qwen2.5-VL tokenizer as conversations use it.

    `end` and `image` are the ids of <|im_end|> and <|image_pad|>; `banned` are the ids that must never be sampled.

    Texts are untrusted (a question, an error that quotes the model): where one spells <|im_end|>, it becomes the pieces
    of that string. The fast tokenizer has a switch for it, encode_special_tokens, which transformers'
    split_special_tokens flips on the shared tokenizer with each call; here it is set once, on a copy. It heeds only
    tokens marked "special"; in the copy all of the form <|…|> are, as Qwen leaves <|fim_prefix|> and others unmarked.

    The prompt's markup is rendered with slots in place of the texts, cut at its special tokens, and each piece encoded
    with its texts filled in. As tokenizers cut at special tokens first of all, the result equals apply_chat_template's
    for every text without special tokens, white space and Unicode normalisation at the seams included.
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
        """The codec of a model: a directory or an id on the Hub, with a tokenizer.json."""
        from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports sklearn: four seconds more

        where: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls(PreTrainedTokenizerFast.from_pretrained(path, **where))

    def encode(self, value: str) -> list[int]:
        """Ids of a text as it stands: none of them is a special token. Lone surrogates become "?"."""
        return self._plain.encode(value.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        kept = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cast(str, self._tokenizer.decode(list(ids), **kept))

    def prompt(self, system: str, content: Content) -> list[int]:
        """Compact ids of the first prompt by the tokenizer's chat template. An empty `system` is left out."""
        texts: list[str] = []
        messages: list[dict[str, Any]] = [{"role": "user", "content": slots(content, texts)}]
        if system:
            messages.insert(0, {"role": "system", "content": slots([text(system)], texts)[0]["text"]})
        markup = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._fill(cast(str, markup), texts)

    def observation(self, content: Content) -> list[int]:
        """Compact ids of a user's message between a turn that ended with `end` and the next one."""
        texts: list[str] = []
        inner = "".join(PICTURE if part == IMAGE else part["text"] for part in slots(content, texts))
        return self._fill(f"\n<|im_start|>user\n{inner}{END}\n<|im_start|>assistant\n", texts)

    def _fill(self, markup: str, texts: list[str]) -> list[int]:
        ids: list[int] = []
        for piece in self._specials.split(markup):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids += self.encode(re.sub(SLOT.format(r"(\d+)"), lambda slot: texts[int(slot[1])], piece))
        return ids


def slots(content: Content, texts: list[str]) -> Content:
    """The content with a slot in place of each text; the texts are appended to `texts`."""
    parts = []
    for part in content:
        if part == IMAGE:
            parts.append(part)
        else:
            parts.append(text(SLOT.format(len(texts))))
            texts.append(part["text"])
    return parts


def banned_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that must not be sampled, sorted: image and vision tokens, <|im_start|> and the like; all but <|im_end|>.

    A sampled placeholder has no image, and a sampled <|im_start|> would let the model speak as somebody else.
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = {token.content: i for i, token in added if token.special or is_markup(token.content)}
    return tuple(sorted(i for content, i in specials.items() if content != END))


def is_markup(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")
