"""Questions that can never be asked: their prompts exceed the limits of a conversation, whatever a model answers.

`prepare` refuses them. The tokenizer is loaded only where a text may be too long for certain.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import ConversationSpec, find_excess, measure_prompt, render_system_prompt
from thinkimg.conversation.question import state_question
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError, shorten
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import view_size
from thinkimg.models.family import load_family
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import write_tokenizer
from thinkimg.process import scratch
from thinkimg.records import Sample
from thinkimg.settings import Settings
from thinkimg.store import files

MARKUP = 128  # tokens of a prompt beside its texts and images, at most
LETTERS = 2  # bytes of a system prompt per token, at least; a question's may be tokens of their own


class AskSettings(Settings):
    """Settings on which it depends whether a question can be asked."""

    conversation: ConversationConfig
    """System prompt as it is rendered, max_images, max_tokens, coordinates, thinking; others have their defaults."""
    images: ViewLimits
    tiny: TinyModel | None
    """Tiny model, whose vocabulary is made from the questions; None for a model that exists."""
    start: str = Field(exclude=True)
    """Directory or Hub id of the model to start from."""
    revision: str | None = Field(exclude=True)

    def fingerprinted(self) -> dict[str, Any]:
        """Return the settings that enter a data set's fingerprint; the tokenizer by content, that of the Hub by name.

        A model's commits on the Hub rarely change its tokenizer, and to ask for them takes a network.
        """
        tokenizer = f"{self.start}@{self.revision or 'main'}"
        if (path := Path(self.start, "tokenizer.json")).is_file():
            tokenizer = files.sha256_once(path)
        return {
            "conversation": self.conversation.model_dump(
                mode="json", include={"system", "max_images", "max_tokens", "coordinates", "thinking"}
            ),
            "images": self.images.model_dump(mode="json"),
            "tokenizer": tokenizer if self.tiny is None else [self.tiny.family, self.tiny.vocab_size],
        }


def find_unaskable(
    settings: AskSettings, samples: Sequence[Sample], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Return sample id -> the reason why a question can't be asked, for those that can't.

    sizes: (width, height) in pixels of the images by hash. Raises UserError where a tokenizer is needed and can't be
    loaded.
    """
    views: dict[str, list[tuple[int, int]]] = {}
    reasons: dict[str, str] = {}
    for sample in samples:
        try:
            views[sample.sample_id] = [view_size(*sizes[sha], settings.images) for sha in sample.images]
        except ValueError as error:  # of an image's aspect
            reasons[sample.sample_id] = str(error)
            continue
        if reason := find_excess(0, len(sample.images), settings.conversation):
            reasons[sample.sample_id] = reason
    left = [sample for sample in samples if sample.sample_id not in reasons]
    long = [sample for sample in left if may_exceed(settings, sample, views[sample.sample_id])]
    while long:
        codec = load_codec(settings, [(sample, views[sample.sample_id]) for sample in left])
        spec = ConversationSpec(settings.conversation, settings.images, codec)
        lengths = [measure_prompt(sample, views[sample.sample_id], spec) for sample in long]
        excesses = [find_excess(length, 0, settings.conversation) for length in lengths]
        refused = {sample.sample_id: why for sample, why in zip(long, excesses, strict=True) if why is not None}
        if not refused:
            break
        reasons |= refused
        left, long = ([one for one in part if one.sample_id not in refused] for part in (left, long))
        if settings.tiny is None:
            break  # a tokenizer that exists measures the others as before
    return reasons


def may_exceed(settings: AskSettings, sample: Sample, views: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a prompt may have more tokens than a conversation, with as many tokens as its question has bytes."""
    system = len(render_system_prompt(settings.conversation).encode()) // LETTERS
    question = len(state_question(sample, views, settings.conversation.unit).encode())
    images = sum(map(settings.images.count_tokens, views))
    return MARKUP + system + question + images >= settings.conversation.max_tokens


def load_codec(settings: AskSettings, asked: Sequence[tuple[Sample, list[tuple[int, int]]]]) -> Codec:
    """Return the codec of the model; that of a tiny one is made from the questions that are left, as it will be."""
    if settings.tiny is None:
        try:
            return Codec.load(settings.start, settings.revision, thinking=settings.conversation.thinking)
        except UserError:
            raise
        except Exception as error:  # the library raises what its downloader or parser raises
            raise UserError(
                f"Some questions may be too long, and the tokenizer of {settings.start} can't be loaded to measure "
                f"them: {shorten(str(error))}",
                hint="Check model.path and that the Hub can be reached; or raise conversation.max_tokens.",
            ) from error
    texts = [render_system_prompt(settings.conversation), "system\n", "user\n", "assistant\n"]
    with scratch() as folder:
        texts += [state_question(*one, settings.conversation.unit) for one in asked]
        write_tokenizer(folder, texts, settings.tiny.vocab_size, load_family(settings.tiny.family))
        return Codec.load(folder, thinking=settings.conversation.thinking)
