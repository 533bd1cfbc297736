"""Parts of a family's model, and changes that leave each out: contexts to be entered with the model."""

from contextlib import contextmanager

import torch


def resetting(value: float, *parts: str):
    """A change: all parameters of these names get a value, the neutral one of a norm or none of a part."""

    @contextmanager
    def change(model):
        chosen = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
        assert chosen, parts
        for parameter in chosen:
            parameter.fill_(value)
        yield

    return change


@contextmanager
def chunk_sections(model):
    """Positions of Qwen2.5-VL in place of the interleaved ones: time, height and width one after the other."""
    turn = model.model.language_model.rotary_emb

    def chunk(frequencies):
        parts = frequencies.split(list(turn.mrope_section), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)] * 2, dim=-1)

    assert callable(turn.recomposition_frequencies)
    turn.recomposition_frequencies = chunk
    yield


CHANGES = [
    ("qwen3_vl", "level 0", resetting(0, "deepstack_merger_list.0.linear_fc2")),
    ("qwen3_vl", "level 1", resetting(0, "deepstack_merger_list.1.linear_fc2")),
    ("qwen3_vl", "norm of a level", resetting(1, "deepstack_merger_list.0.norm.weight")),
    ("qwen3_vl", "learned positions", resetting(0, "pos_embed")),
    ("qwen3_vl", "norms of queries", resetting(1, "q_norm")),
    ("qwen3_vl", "norms of keys", resetting(1, "k_norm")),
    ("qwen3_vl", "biases of the tower", resetting(0, "attn.qkv.bias")),
    ("qwen3_vl", "interleaved sections", chunk_sections),
    ("qwen3_5", "learned positions", resetting(0, "pos_embed")),
    ("qwen3_5", "norms of queries", resetting(0, "q_norm")),  # of 1 + weight
    ("qwen3_5", "norms of keys", resetting(0, "k_norm")),
    ("qwen3_5", "interleaved sections", chunk_sections),
    *[
        ("qwen3_5", f"DeltaNet layer {number}", resetting(0, f"layers.{number}.linear_attn.out_proj"))
        for number in (1, 2)
    ],
    ("qwen3_5", "decay", resetting(3, "A_log")),  # nothing is left of the token before
    ("qwen3_5", "convolution", resetting(0.25, "conv1d")),
    ("qwen3_5", "gated norm", resetting(1, "linear_attn.norm")),
    ("qwen3_5", "attention", resetting(0, "layers.3.self_attn.o_proj")),
]
"""(family, part, change)."""
