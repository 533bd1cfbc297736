"""Table of models and GPUs: the presets that fit, by the memory check of a dry run; Markdown for docs/hardware.md.

    .venv/bin/python benchmarks/memory_tiers.py

The shapes are those of the published config.json files, as transformers, vLLM and other public code state them
(November 2026): nothing is downloaded, and nothing but shapes is computed with. No GPU was at hand to compare with.
"""

import argparse
import itertools
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from thinkimg.analysis import forecast
from thinkimg.analysis.engine_memory import EngineMemory, predict_engine
from thinkimg.config.load import load_config
from thinkimg.trainer.memory import GIB, Requirement, plan

TIERS = (16, 24, 32, 48, 80)
USABLE = 0.97  # of the GiB on the box: the driver keeps some
LEAST = 4  # conversations of the greatest length that are to play at once
PRESETS = ("high-quality", "balanced", "memory-efficient")
"""From the largest down; `development` takes what `balanced` does, `research` what `high-quality` does."""
TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}


def qwen2_5_vl(hidden: int, layers: int, heads: tuple[int, int], inner: int, vocabulary: int) -> dict[str, Any]:
    """Return the config of a Qwen2.5-VL. heads: of queries and of keys."""
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "intermediate_size": inner, "vocab_size": vocabulary,
        "max_position_embeddings": 128000, "tie_word_embeddings": hidden == 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden}
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, **TOKENS}


def qwen3_tower(deep: bool, hidden: int) -> dict[str, Any]:
    """Return the vision tower of Qwen3-VL and Qwen3.5: of the small models, or of the others (`deep`)."""
    if deep:
        size = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
    else:
        size = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return size | {"num_heads": 16, "out_hidden_size": hidden, "num_position_embeddings": 2304, "patch_size": 16}


def qwen3_vl(hidden: int, layers: int, heads: int, inner: int, *, deep: bool, tied: bool) -> dict[str, Any]:
    """Return the config of a Qwen3-VL with eight heads of keys."""
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": inner, "vocab_size": 151936, "max_position_embeddings": 262144,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    }  # fmt: skip
    levels = [8, 16, 24] if deep else [5, 11, 17]
    vision = qwen3_tower(deep, hidden) | {"deepstack_visual_indexes": levels}
    return {
        "model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **TOKENS,
    }  # fmt: skip


def qwen3_5(hidden: int, inner: int, *, deep: bool, tied: bool) -> dict[str, Any]:
    """Return the config of a Qwen3.5 of 32 layers."""
    text = {
        "hidden_size": hidden, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "intermediate_size": inner, "vocab_size": 248320, "max_position_embeddings": 262144,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "tie_word_embeddings": tied,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    return {
        "model_type": "qwen3_5", "text_config": text, "vision_config": qwen3_tower(deep, hidden),
        "tie_word_embeddings": tied,
    }  # fmt: skip


MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen2_5_vl(2048, 36, (16, 2), 11008, 151936) | {"tie_word_embeddings": True},
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen2_5_vl(3584, 28, (28, 4), 18944, 152064) | {"tie_word_embeddings": False},
    "Qwen/Qwen3-VL-2B-Instruct": qwen3_vl(2048, 28, 16, 6144, deep=False, tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_vl(2560, 36, 32, 9728, deep=False, tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_vl(4096, 36, 32, 12288, deep=True, tied=False),
    "Qwen/Qwen3.5-4B": qwen3_5(2560, 9216, deep=False, tied=True),
    "Qwen/Qwen3.5-9B": qwen3_5(4096, 12288, deep=True, tied=False),
}


@dataclass(frozen=True)
class Fit:
    """Forecast of one model, preset and GPU."""

    step: Requirement
    layers: int
    """Decoder layers of the model."""
    free: int
    """Bytes that the trainer may take, its weights included."""
    engine: EngineMemory

    @property
    def fits(self) -> bool:
        """True if engine and trainer both do."""
        needed = self.step.weights + self.step.total * forecast.FRAGMENTED
        return needed <= self.free and self.engine.conversations >= LEAST


def main() -> None:
    """Print a table of what fits, and one of what it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="only these; may be given again")
    chosen = parser.parse_args().model or list(MODELS)
    print("| model | weights | " + " | ".join(f"{tier} GB" for tier in TIERS) + " |")
    print("|---" * (2 + len(TIERS)) + "|")
    details = [
        "| model | preset | trainer | layers computed again | engine's share | conversations |",
        "|---|---|---|---|---|---|",
    ]
    for name in chosen:
        base = read_shape(MODELS[name])
        fits = {preset: forecast_all(name, base, preset) for preset in PRESETS}
        cells = [next((f"`{p}`" for p in PRESETS if fits[p][tier].fits), "–") for tier in TIERS]
        weights = fits["balanced"][80].engine.weights / GIB
        short = name.removeprefix("Qwen/").removesuffix("-Instruct")
        print(f"| {short} | {weights:.1f} GiB | {' | '.join(cells)} |", flush=True)
        for preset, tier in itertools.product(PRESETS, TIERS):
            fit = fits[preset][tier]
            if fit.fits and (tier == TIERS[0] or not fits[preset][TIERS[TIERS.index(tier) - 1]].fits):
                taken = (fit.step.weights + fit.step.total * forecast.FRAGMENTED) / GIB
                details.append(
                    f"| {short} | `{preset}`, {tier} GB | {taken:.1f} of {fit.free / GIB:.1f} GiB | "
                    f"{fit.step.layers} of {fit.layers} | {fit.engine.share / GIB:.1f} GiB | "
                    f"{fit.engine.conversations} |"
                )
    print("\n" + "\n".join(details))


def read_shape(shape: dict[str, Any]) -> PretrainedConfig:
    """Return the config as transformers reads it."""
    return AutoConfig.for_model(**shape)


def forecast_all(name: str, base: PretrainedConfig, preset: str) -> dict[int, Fit]:
    """Return the forecast on a GPU of each tier. The largest micro-batch is the same on all."""
    config = load_config(preset, [f"model.path={name}"])
    forecast.gpu_memory = lambda *_: (80 * GIB, 80 * GIB)  # kernels and dtypes of a GPU
    costs, largest = forecast.measure_largest(config, base)
    fits = {}
    for tier in TIERS:
        size = int(tier * GIB * USABLE)
        forecast.gpu_memory = lambda *_, size=size: (size, size)
        free = forecast.free_memory(config)
        step = plan(costs, largest.options, free - costs.weights)
        fits[tier] = Fit(step, costs.layers, free, predict_engine(config, base, size))
    return fits


if __name__ == "__main__":
    main()
