"""CLIP's judgement: is the processed image closer to the question than the original is?

value = sigmoid(logit_scale x (cos(processed, question) - cos(original, question))), the probability that CLIP itself gives
the processed image of the two; 0.5 is no difference. Each unique image and question is encoded once.
"""

import math
from collections.abc import Sequence

from thinkimg.rewards.context import Bench
from thinkimg.rewards.judgement import Identity, Judgement, Pair
from thinkimg.rewards.pairs import image_component

NAME = "embedding"
score = image_component(NAME)


def identity(bench: Bench) -> Identity:
    from thinkimg.models.clip import weights_digest

    settings = bench.config.image.embedding
    name = settings.model if settings.pretrained is None else f"{settings.model}/{settings.pretrained}"
    return Identity(NAME, name, weights_digest(settings, bench.clip), "")


def judge(pairs: Sequence[Pair], bench: Bench) -> list[Judgement]:
    from thinkimg.models.clip import load

    encoder = load(bench.config.image.embedding, bench.clip)
    hashes = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
    questions = sorted({pair.question for pair in pairs})
    # Full resolution: CLIP sees the picture at its own size, and shrinks it once.
    images = dict(zip(hashes, encoder.images(hashes, bench.images.decoded, bench.map), strict=True))
    texts = dict(zip(questions, encoder.texts(questions), strict=True))
    found = []
    for pair in pairs:
        text = texts[pair.question]
        near, far = float(images[pair.processed] @ text), float(images[pair.original] @ text)
        value = 1 / (1 + math.exp(-encoder.logit_scale * (near - far)))
        evidence = {"cos_processed": near, "cos_original": far, "logit_scale": encoder.logit_scale}
        found.append(Judgement(value, None, evidence))
    bench.judged(len(pairs))
    return found
