"""What the question looks at: relative attention of the policy on the processed image.

One forward in transformers over one user turn [original][processed] text, read in one layer. a(text) is the attention mass
on the processed image's tokens, mean over heads and over the query rows; rel = a(question) / a(generic instruction), the
relative attention of arXiv 2502.17422; value = rel / (1 + rel), 0.5 where the question looks no more than any text does.
"""

from collections.abc import Sequence

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import IMAGE, text
from thinkimg.rewards.context import Bench
from thinkimg.rewards.judgement import Identity, Judgement, Pair
from thinkimg.rewards.pairs import image_component

NAME = "attention"
GENERIC = "Write a general description of the image."  # arXiv 2502.17422, section 4
score = image_component(NAME)


def identity(bench: Bench) -> Identity:
    settings = bench.config.image.attention
    return Identity(NAME, "policy", bench.policy.digest, bench.hashed(GENERIC, settings.layer, settings.rows))


def judge(pairs: Sequence[Pair], bench: Bench) -> list[Judgement]:
    settings = bench.config.image.attention
    place = f"{settings.layer}/{settings.rows}"
    return [verdict(found[place], place) for found in look(pairs, bench, [settings.layer])]


def verdict(found: dict, place: str) -> Judgement:
    if not (found["generic"] > 0 and found["question"] >= 0):  # NaN is neither: a question without words, say
        return Judgement(None, "Question or generic instruction look at no part of the processed image.", {})
    relative = found["question"] / found["generic"]
    return Judgement(relative / (1 + relative), None, found | {"relative": relative, "at": place})


def look(pairs: Sequence[Pair], bench: Bench, layers: Sequence[int]) -> list[dict]:
    """Per pair "<layer>/<rows>" -> attention masses, as trainer/attention_job.py measures them in the kept trainer worker."""
    from thinkimg.models.base import base_entry
    from thinkimg.rollout import view_limits

    config, trainer = bench.config, bench.crew.trainer  # it gets up while pictures are measured
    hashes = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
    grids = dict(zip(hashes, bench.map(lambda sha: bench.picture(sha).grid, hashes), strict=True))
    prompts = {words: prompt(bench.codec, words) for words in {GENERIC, *(pair.question for pair in pairs)}}
    job = {
        "kind": "attention",
        "policy": {"directory": str((bench.policy.directory / "policy").resolve()), "digest": bench.policy.digest},
        "base": base_entry(config),
        "model": config.model.model_dump(mode="json"),
        "layers": list(layers),
        "images": {"tables": [str(table.directory.resolve()) for table in bench.tables], **view_limits(config)},
        "token_budget": config.train.token_budget,
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
    done = 0

    def progress(line: dict) -> None:  # of forwards, two to a pair; with several processes it is the first one's
        nonlocal done
        bench.judged(line["step"] * len(pairs) // line["steps"] - done)
        done = line["step"] * len(pairs) // line["steps"]

    return trainer.submit(job, progress)["pairs"]


def prompt(codec: Codec, words: str) -> dict:
    """Compact ids of the user turn, and [first, end) of the text's tokens in it."""
    tokens = codec.prompt("", [IMAGE, IMAGE, text(words)])
    length = len(codec.encode(words))
    end = len(tokens) - 1 - tokens[::-1].index(codec.end)
    return {"tokens": tokens, "text": [end - length, end]}
