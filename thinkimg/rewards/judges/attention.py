"""Judge `attention`: relative attention of the policy on the processed image.

One forward pass in transformers over one user turn [original][processed] text, measured in one layer. a(text) is the
attention mass on the processed image's tokens, mean over heads and over the query rows. rel = a(question) / a(generic
instruction) is the relative attention of arXiv 2502.17422. value = rel / (1 + rel), 0.5 where the question looks at the
image no more than any text does.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field

import thinkimg.settings
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import IMAGE_PART, text_part
from thinkimg.models.family import Family
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair

USES = ("trainer",)
GENERIC = "Write a general description of the image."  # arXiv 2502.17422, section 4


class Settings(thinkimg.settings.Settings):
    """Layer and rows in which attention is measured; `thinkimg calibrate attention` finds both for a model."""

    layer: int | None = Field(None, ge=0)
    """Layer of the language model, from 0; null is the family's: 22 of a Qwen2.5-VL, else the layer with attention that
    is nearest to two thirds of the depth."""
    rows: Literal["text", "last"] = "text"
    """Query rows: all tokens of the text, or the last token of the prompt."""

    def completed(self, family: Family) -> Self:
        """Return the settings with the family's layer in place of null, where it does not depend on the depth."""
        return self if self.layer is not None else self.model_copy(update={"layer": family.attention_layer})


def prompt(settings: JudgeSettings) -> str:
    own, model = settings.image.attention, settings.model
    asked = (GENERIC, own.layer, own.rows, model.precision, model.load_in_4bit, settings.token_budget)
    return settings.hashed(*asked)


def identity(context: JudgeContext) -> JudgeIdentity:
    assert context.policy is not None
    return JudgeIdentity("attention", "policy", context.policy.digest, prompt(context.settings))


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    settings = context.settings.image.attention
    layers = None if settings.layer is None else [settings.layer]
    measured = [
        next((at, masses) for at, masses in figures.items() if at.endswith(f"/{settings.rows}"))
        for figures in measure_attention(pairs, context, layers)
    ]
    return [judge_masses(masses, at) for at, masses in measured]


def judge_masses(masses: dict[str, float], at: str) -> Judgement:
    """Return the judgement of the attention masses of question and generic instruction. at: "<layer>/<rows>"."""
    if not (masses["generic"] > 0 and masses["question"] >= 0):  # NaN is neither: a question without words, say
        return Judgement(None, "Question or generic instruction look at no part of the processed image.", {})
    relative = masses["question"] / masses["generic"]
    return Judgement(relative / (1 + relative), None, masses | {"relative": relative, "at": at})


def measure_attention(
    pairs: Sequence[Pair], context: JudgeContext, layers: Sequence[int] | None
) -> list[dict[str, dict[str, float]]]:
    """Return for each pair "<layer>/<rows>" -> attention masses, as trainer/attention_job.py measures them.

    layers: None: the one of the policy's family.
    """
    assert context.policy is not None
    settings, trainer = context.settings, context.resources.trainer  # it starts while images are resized
    hashes = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
    grids = dict(zip(hashes, context.map(lambda sha: context.picture(sha).grid, hashes), strict=True))
    prompts = {words: encode_prompt(context.codec, words) for words in {GENERIC, *(pair.question for pair in pairs)}}
    job = {
        "kind": "attention",
        "policy": {"directory": str((context.policy.directory / "policy").resolve()), "digest": context.policy.digest},
        "base": settings.base.entry(context.policy),
        "model": settings.model.model_dump(mode="json"),
        "layers": None if layers is None else list(layers),
        "images": {
            "tables": [str(table.directory.resolve()) for table in context.tables],
            **settings.view.model_dump(),
        },
        "token_budget": settings.token_budget,
        "pairs": [
            {
                "images": [pair.original, pair.processed],
                "grids": [grids[pair.original], grids[pair.processed]],
                "region": pair.region,
                "prompts": [prompts[pair.question], prompts[GENERIC]],
            }
            for pair in pairs
        ],
    }
    judged = 0

    def progress(line: dict[str, Any]) -> None:  # of forwards, two to a pair; of several processes the first one's
        nonlocal judged
        before, judged = judged, line["step"] * len(pairs) // line["steps"]
        context.judged(judged - before)

    return trainer.submit(job, progress)["pairs"]


def encode_prompt(codec: Codec, words: str) -> dict[str, Any]:
    """Return the compact ids of the user turn, and [first, end) of the text's tokens in it."""
    tokens = codec.prompt("", [IMAGE_PART, IMAGE_PART, text_part(words)])
    length = len(codec.encode(words))
    end = len(tokens) - 1 - tokens[::-1].index(codec.end)
    return {"tokens": tokens, "text": [end - length, end]}
