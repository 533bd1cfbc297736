"""Codec between text and token ids; special tokens come from the chat template alone, never out of a text."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tokenizers import Tokenizer

from thinkimg.conversation.protocol import CLOSE_THOUGHT, IMAGE_PART, OPEN_THOUGHT, Content, text_part
from thinkimg.errors import UserError, shorten
from thinkimg.importing import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|im_end|>", "<|image_pad|>"
PICTURE = f"<|vision_start|>{PAD}<|vision_end|>"
USER, REPLY = "<|im_start|>user\n", "<|im_start|>assistant\n"
SLOT = "\ue000{}\ue001"  # placeholder of a text while markup is cut into pieces
PIECES = 1024  # of prompts, and shapes of them, whose tokens and markup are kept
LONGEST_PIECE = 8192  # characters; longer ones, such as strangers send to an endpoint, would fill the memory
KNOWN = "The base model must be of a known family, with its own tokenizer and chat template."


class Codec:
    """Encoder and decoder of conversations with a Qwen tokenizer.

    end, image: ids of <|im_end|> and <|image_pad|>. banned: ids that must never be sampled. thinking: as
    conversation.thinking. opening: text that the chat template puts between <|im_start|>assistant and the first sampled
    token, such as "", "<think>\\n" or "<think>\\n\\n</think>\\n\\n". turn_start: beginning of each turn's text,
    `opening` where that leaves a thought open, else "".

    Texts are untrusted: a question, an error that quotes the model. A text that spells <|im_end|> becomes the pieces of
    that string. The fast tokenizer's switch for this, encode_special_tokens, is set once on a copy, since transformers'
    split_special_tokens flips it on the shared tokenizer with each call. The switch heeds only tokens marked "special";
    in the copy all of the form <|…|> are, as Qwen leaves <|fim_prefix|> and others unmarked.

    A prompt's markup is rendered with slots in place of the texts and cut at its special tokens. Each piece is encoded
    with its texts filled in. Tokenizers cut at special tokens first, so that the result equals apply_chat_template's
    for every text without special tokens. That includes white space and Unicode normalisation at the seams. Where a
    template trims contents, as Qwen3.5's does, white space around a text stays here.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", thinking: bool | None = None) -> None:
        """Read the tokenizer and the form of its chat template.

        Raises UserError for a vocabulary or a template of another form, and for one without the state of `thinking`.
        """
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in description["added_tokens"]:
            token["special"] |= is_markup(token["content"])
        self._plain = Tokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._ids = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
        missing = {END, "<|im_start|>", *re.findall(r"<\|\w+\|>", PICTURE)} - self._ids.keys()
        if missing:
            raise UserError(f"The tokenizer has no {', '.join(sorted(missing))}.", hint=KNOWN)
        self._specials = re.compile("(" + "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) + ")")
        # Conversations repeat all but their question: the markup, the system prompt, what stands before an image.
        self._encode_again = lru_cache(PIECES)(lambda piece: tuple(self.encode(piece)))
        self._markup = lru_cache(PIECES)(self._render_shape)
        self.end: int = self._ids[END]
        self.image: int = self._ids[PAD]
        self.banned = banned_tokens(tokenizer)
        self.thinking = thinking
        self.opening = find_opening(tokenizer, thinking)
        self.turn_start = self.opening if leaves_thought_open(self.opening) else ""

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, *, thinking: bool | None = None) -> Self:
        """Return the codec of a model: a directory, or an id on the Hub, with a tokenizer.json."""
        with importing:
            from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports sklearn: four seconds more

        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls(PreTrainedTokenizerFast.from_pretrained(path, **options), thinking)

    def encode(self, value: str) -> list[int]:
        """Return the ids of a text, none of them a special token. Lone surrogates become "?"."""
        text = value.encode("utf-8", "replace").decode()
        # `encode` would hold Python's lock, for seconds where the text is long, and takes twice as long.
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        # Not transformers' own: that looks at the type of every id first.
        return self._plain.decode(list(ids), skip_special_tokens=False)

    def prompt(
        self, system: str, content: Content, later: Sequence[tuple[str, Content]] = (), *, speaks: bool = False
    ) -> list[int]:
        """Return the compact ids of the first prompt, by the chat template; an empty `system` is left out.

        later: each reply to the message before, from its opening on, and the user's next message. They stand in the
        prompt as turns and observations do (see `observation`): templates would trim replies and drop their thoughts.
        speaks: the reply goes on without a thought, whatever `thinking` is.
        """
        assert not (speaks and later), "a comparison has one message"
        texts: list[str] = []
        slots = insert_slots(content, texts)
        if system:
            texts.append(system)
        shape = tuple(part == IMAGE_PART for part in slots)
        markup = self._markup(shape, bool(system), False if speaks else self.thinking)
        if speaks and leaves_thought_open(markup.rpartition(REPLY)[2]):
            markup += f"\n{CLOSE_THOUGHT}\n\n"
        ids = self._fill(markup, texts)
        for reply, message in later:
            ids += [*self.encode(reply), self.end, *self.observation(message)]
        return ids

    def observation(self, content: Content) -> list[int]:
        """Return the compact ids of a user's message between a turn that ended with `end` and the next turn."""
        texts: list[str] = []
        inner = "".join(PICTURE if part == IMAGE_PART else part["text"] for part in insert_slots(content, texts))
        return self._fill(f"\n{USER}{inner}{END}\n{REPLY}{self.opening}", texts)

    def frame_system(self) -> tuple[str, str, str]:
        """Return markup before the user's first message: without a system prompt, and around one.

        Raises UserError for a template that changes the system prompt's text.
        """
        slot, messages = SLOT.format(0), [{"role": "user", "content": [text_part(SLOT.format(1))]}]
        tail = f"{USER}{SLOT.format(1)}{END}\n{REPLY}{self.opening}"
        bare = render_markup(self._tokenizer, messages, self.thinking)
        system = render_markup(self._tokenizer, [{"role": "system", "content": slot}, *messages], self.thinking)
        if not bare.endswith(tail) or not system.endswith(tail) or system.count(slot) != 1:
            raise UserError("The chat template shows the system prompt more than once or changes it.", hint=KNOWN)
        before, _, after = system.removesuffix(tail).partition(slot)
        return bare.removesuffix(tail), before, after

    def _render_shape(self, shape: tuple[bool, ...], system: bool, thinking: bool | None) -> str:
        """Return the markup of a first prompt with slots for its texts, the system's last. shape: True for an image."""
        slots = map(SLOT.format, count())
        content = [IMAGE_PART if image else text_part(next(slots)) for image in shape]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": next(slots)})
        return render_markup(self._tokenizer, messages, thinking)

    def _fill(self, markup: str, texts: list[str]) -> list[int]:
        ids: list[int] = []
        for piece in self._specials.split(markup):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                piece = re.sub(SLOT.format(r"(\d+)"), lambda slot: texts[int(slot[1])], piece)
                ids += self._encode_again(piece) if len(piece) <= LONGEST_PIECE else self.encode(piece)
        return ids


def render_markup(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], thinking: bool | None
) -> str:
    """Return the markup of messages and of the beginning of a reply, by the chat template."""
    switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    return cast(
        str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **switch)
    )


def find_opening(tokenizer: "PreTrainedTokenizerBase", thinking: bool | None) -> str:
    """Return the text with which the chat template opens a reply.

    Raises UserError for a template in another form than <|im_start|>role … <|im_end|>, and for one that has no switch
    `enable_thinking` and by itself does not open a reply as asked for.
    """
    messages = [{"role": "user", "content": [IMAGE_PART, text_part(SLOT.format(0))]}]
    message = f"{USER}{PICTURE}{SLOT.format(0)}{END}\n{REPLY}"

    def opening(state: bool | None) -> str:
        try:
            _, exact, rest = render_markup(tokenizer, messages, state).rpartition(message)
        except Exception as error:  # a template is a program, and there may be none
            raise UserError(f"The chat template can't be rendered: {shorten(str(error))}", hint=KNOWN) from error
        if not exact:
            raise UserError("The chat template has another form than <|im_start|>user … <|im_end|>.", hint=KNOWN)
        return rest

    if thinking is not None and opening(True) == opening(False) and leaves_thought_open(opening(True)) != thinking:
        raise UserError(
            f"conversation.thinking is {str(thinking).lower()}, but the model's chat template has no switch for it.",
            hint=f"Set it to null, or take a model that {'thinks' if thinking else 'can answer without a thought'}.",
        )
    return opening(thinking)


def leaves_thought_open(text: str) -> bool:
    """Tell whether a text ends within a thought."""
    return text.rfind(OPEN_THOUGHT) > text.rfind(CLOSE_THOUGHT)


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
