"""Accuracy of the image rewards, which should tell right processing from wrong, and their speed.

    python benchmarks/rewards.py --store artifacts --policy 3f2a    (else the tiny preset's warm-started one)
    python benchmarks/rewards.py --memory                               memory of reading attention, one layer of the 7B

The known pairs are of held-out photographs (thinkimg/puzzles/known_pairs.py). Each sets a right processing against a
wrong one: a crop on the target, the right light, the right turn. Prints each judge's AUC with its 95 %
interval beside a scripted perfect judge and a coin. Then come pairs per second, the gain of batching, and the cost of
`self` in prefills.
The teacher is the policy's own server, asked through its OpenAI-compatible endpoint.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thinkimg.analysis.calibrate import calibrate_attention, known_side
from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.conversation import compare
from thinkimg.engine.media import Media
from thinkimg.engine.request import Sampling
from thinkimg.engine.server import SERVED_NAME
from thinkimg.models import clip
from thinkimg.models.base import BaseSource
from thinkimg.resources import Resources
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judge import Judge
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.judges import self
from thinkimg.rewards.quality import auc_interval
from thinkimg.rewards.settings import JUDGES
from thinkimg.scheduler import Builder
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import settings_of
from thinkimg.stages.score import judge_settings
from thinkimg.stages.train_clip import train_clip
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Policy

TOKENS, QUERIES = 2800, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--policy")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", choices=("forward", "read"))
    args = parser.parse_args()
    if args.child:
        print(peak_of_a_forward(args.child == "read"))
        return
    if args.memory:
        memory()
        return
    config = load_config(args.preset, [f"where.store={args.store}", *args.set])
    store = Store(config.where.store)
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        if args.policy:
            policy = store.resolve(args.policy, "policy")
        else:
            policy = builder.make(warmstart, dataset=builder.make(prepare))
        small = builder.make(train_clip) if config.image.embedding.model == clip.OWN_CLIP else None
        pairs = builder.make(known_pairs, split="held_out", count=args.pairs)
        asyncio.run(warm(resources, config, policy))
        url = config.where.engine.urls[0] if config.where.engine.urls else own_url(resources, config, policy)
        teacher = {"url": f"{url}/v1"}
        config = load_config(
            args.preset,
            [f"where.store={args.store}", *args.set, f"where.teacher={teacher}", f"image.teacher.model={SERVED_NAME}"],
        )
        resources.where = config.where  # which says now where the teacher answers
        context = JudgeContext(judge_settings(config), resources, policy, policy, small, (pairs,), ImageTable([pairs]))
        quality(context, pairs.rows())
        where(config, policy, store, args.pairs)
        speed(context, pairs.rows())


def memory() -> None:
    """Each in a process of its own, whose highest memory is what counts; random weights of the 7B's geometry."""
    peaks = {}
    for kind in ("forward", "read"):
        command = [sys.executable, __file__, "--child", kind]
        peaks[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(f"one layer of the 7B over {TOKENS} tokens, peak above the weights: {peaks['forward']:.0f} MB")
    more = peaks["read"] - peaks["forward"]
    print(f"with its attention read at {QUERIES} query rows {peaks['read']:.0f} MB: {more:+.0f} MB")


def peak_of_a_forward(read: bool) -> float:
    """MB above what is held before it."""
    import torch
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    from thinkimg.trainer.forward.attention import Reader, use_attention
    from thinkimg.trainer.forward.packed_attention import NAME, attend_packed

    config = Qwen2_5_VLConfig(text_config={
        "vocab_size": 64, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1,
        "num_attention_heads": 28, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }).text_config  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2_5_VLTextModel(config).eval()

    use_attention(model.config, NAME, attend_packed)

    def forward(count: int, reader: Reader | None = None) -> None:
        positions = torch.arange(count).expand(3, 1, count)
        with torch.inference_mode():
            model(
                inputs_embeds=torch.ones(1, count, 3584), position_ids=positions, reader=reader,
                attention_mask={"full_attention": None}, use_cache=False,
            )  # fmt: skip

    forward(64)  # whatever is loaded once
    columns = torch.arange(TOKENS - QUERIES, TOKENS)
    reader = Reader([0], torch.zeros_like(columns), columns, stop=False) if read else None  # to the end, as the forward
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
    before = high_water_kb()
    forward(TOKENS, reader)
    return (high_water_kb() - before) / 1024


def high_water_kb() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


async def warm(resources: Resources, config: Config, policy: Policy) -> None:
    engine = await resources.engine(policy, settings_of(config).engine, BaseSource.of(config.model))
    await engine.__aexit__()


def own_url(resources: Resources, config: Config, policy: Policy) -> str:
    """Where the server answers that was started."""
    return resources.servers(policy, None, settings_of(config).engine, BaseSource.of(config.model)).urls[0]


def quality(context: JudgeContext, rows: Sequence[dict[str, str]]) -> None:
    families = np.array([row["family"] for row in rows])
    both = [*known_side(rows, "right"), *known_side(rows, "wrong")]
    coin = np.random.default_rng(0).uniform(size=(2, len(rows)))
    values = {"perfect judge": np.repeat([[1.0], [0.0]], len(rows), axis=1), "coin": coin}
    seconds: dict[str, float] = {}
    for name in JUDGES.shipped:
        start = time.perf_counter()
        found = Judge(name, JUDGES[name]).judge(both, context)
        seconds[name] = time.perf_counter() - start
        values[name] = np.array([np.nan if one.value is None else one.value for one in found]).reshape(2, -1)
    print(f"{len(rows)} pairs of held-out photographs, AUC with its 95 % interval")
    print(
        f"{'':<14} {'all':<20} "
        + " ".join(f"{family:<8}" for family in sorted(set(families)))
        + " right wrong  pairs/s"
    )
    for name, (right, wrong) in values.items():
        there = ~np.isnan(right + wrong)
        mid, low, high = auc_interval(right[there], wrong[there])
        per = [
            auc_interval(*(side[there & (families == family)] for side in (right, wrong)))[0]
            for family in sorted(set(families))
        ]
        rate = f"{len(both) / seconds[name]:8.0f}" if name in seconds else ""
        print(
            f"{name:<14} {mid:.3f} [{low:.3f}, {high:.3f}] " + " ".join(f"{one:<8.3f}" for one in per)
            + f" {np.nanmean(right):.2f}  {np.nanmean(wrong):.2f} {rate}"
        )  # fmt: skip


def where(config: Config, policy: Policy, store: Store, count: int) -> None:
    print("\nattention: chosen on one half of the pairs, told on the other")
    for place in calibrate_attention(config, policy, store, count=count)[:4]:
        chosen, told = ("{:.3f} [{:.3f}, {:.3f}]".format(*auc) for auc in (place.selection, place.test))
        print(f"  layer {place.layer:<2} rows {place.rows:<5} {chosen}   {told}")


def speed(context: JudgeContext, rows: Sequence[dict[str, str]]) -> None:
    both = [*known_side(rows, "right"), *known_side(rows, "wrong")]
    encoder = context.resources.encoder(context.settings.image.embedding, context.clip)
    hashes = sorted({sha for pair in both for sha in (pair.original, pair.processed)})
    ready = {sha: encoder._preprocess(context.images.decoded(sha)) for sha in hashes}  # the model's part alone

    def encode(batch: int) -> float:
        before, clip.BATCH = clip.BATCH, batch
        start = time.perf_counter()
        encoder._encode(encoder._model.encode_image, ([ready[s] for s in part] for part in clip.split_batches(hashes)))
        elapsed = time.perf_counter() - start
        clip.BATCH = before
        return elapsed

    encode(64)
    one, many = encode(1), encode(64)
    unique = f"{len(hashes)} unique images of {2 * len(both)}"
    print(f"\nembedding: {unique}: batches of 64 take 1/{one / many:.1f} of one by one")
    judged, prefilled = asyncio.run(prefill(context, both))
    print(f"self: {2 * len(both)} forwards in {judged:.1f} s, {judged / prefilled:.2f} x a prefill of the same prompts")


async def prefill(context: JudgeContext, both: Sequence[Pair]) -> tuple[float, float]:
    """Seconds of judging, and of sampling one token after the same prompts; each with empty caches."""
    prompts = {pair.question: compare.encode_comparison(context.codec, pair.question) for pair in both}
    settings, resources = context.settings, context.resources
    engine = await resources.engine(context.policy, settings.engine(prompts.values()), settings.base)
    media = Media(resources.media)
    seen = {sha: context.picture(sha) for pair in both for sha in (pair.original, pair.processed)}
    refs = {sha: media.ref(picture.uuid, picture.view) for sha, picture in seen.items()}
    ratings = compare.rating_tokens(context.codec)
    sampling = Sampling(temperature=1.0, max_tokens=1, seed=0, stop_token_ids=())
    seconds = {"judge": [], "prefill": []}
    async with engine:
        pictures = [[refs[pair.original], refs[pair.processed]] for pair in both]
        for _ in range(3):
            for name in seconds:
                for url in engine.urls:
                    for cache in ("prefix", "mm", "encoder"):
                        await engine._post(url, f"/reset_{cache}_cache", {})
                start = time.perf_counter()
                if name == "judge":
                    await asyncio.gather(
                        *(
                            self._compare(engine, shown, prompts[p.question], ratings)
                            for p, shown in zip(both, pictures, strict=True)
                        )
                    )
                else:
                    await asyncio.gather(
                        *(
                            engine.generate(prompts[p.question], order, sampling)
                            for p, shown in zip(both, pictures, strict=True)
                            for order in (shown, shown[::-1])
                        )
                    )
                seconds[name].append(time.perf_counter() - start)
    return min(seconds["judge"]), min(seconds["prefill"])


if __name__ == "__main__":
    main()
