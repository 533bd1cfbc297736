"""Judge `embedding`: CLIP's preference for the processed image over the original, given the question.

value = sigmoid(logit_scale x (cos(processed, question) - cos(original, question))): the probability that CLIP itself
gives the processed image of the two; 0.5 is no difference. Each unique image and question is encoded once. A question
beyond CLIP's context (77 tokens, mostly) is encoded in pieces: cos is that of their mean. An image is squashed to
CLIP's square, so that its borders count, too.
"""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

import thinkimg.settings
from thinkimg.models.clip import weights_digest
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.settings import FilePath, Name
from thinkimg.user_paths import expand_path

LOCAL = "local-dir:"  # open_clip's mark of a folder


def expand_folder(name: str) -> str:
    """Return the name of a model, its folder expanded where it has one."""
    return LOCAL + expand_path(name.removeprefix(LOCAL)) if name.startswith(LOCAL) else name


QUESTION = "whole, squashed"  # raised with any change of the text and of the pixels that CLIP reads


class Settings(thinkimg.settings.Settings):
    """CLIP that judges."""

    model: Annotated[Name, AfterValidator(expand_folder)] = "ViT-B-32"
    """Model of open_clip, `hf-hub:…`, `local-dir:…`; "warmstart": a small one that is trained on the puzzles."""
    pretrained: FilePath | None = "laion2b_s34b_b79k"
    """Tag or file of its weights; null where the model's name says it all."""


def prompt(settings: JudgeSettings) -> str:
    return QUESTION


def identity(context: JudgeContext) -> JudgeIdentity:
    settings = context.settings.image.embedding
    name = settings.model if settings.pretrained is None else f"{settings.model}/{settings.pretrained}"
    return JudgeIdentity("embedding", name, weights_digest(settings, context.clip), QUESTION)


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    encoder = context.resources.encoder(context.settings.image.embedding, context.clip)
    hashes = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
    questions = sorted({pair.question for pair in pairs})
    # Full resolution, so that the image is shrunk once, to CLIP's own size.
    images = dict(zip(hashes, encoder.images(hashes, context.images.decoded, context.map), strict=True))
    texts = dict(zip(questions, encoder.texts(questions), strict=True))
    pieces = {question: len(encoder.split_text(question)) for question in questions}
    judgements = []
    for pair in pairs:
        text, parts = texts[pair.question], pieces[pair.question]
        near, far = float(images[pair.processed] @ text), float(images[pair.original] @ text)
        value = 1 / (1 + math.exp(-encoder.logit_scale * (near - far)))
        evidence = {"cos_processed": near, "cos_original": far, "logit_scale": encoder.logit_scale}
        judgements.append(Judgement(value, None, evidence | ({"pieces": parts} if parts > 1 else {})))
    context.judged(len(pairs))
    return judgements
