"""The vision tower waits for its device as often with many blocks as with few, and computes the same."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText

from thinkimg.models.family import list_families
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import SPECIAL_TOKENS
from thinkimg.trainer.forward import vision
from thinkimg.trainer.forward.attention import use_attention
from thinkimg.trainer.forward.vision import attend_equal, batch_equal_chunks

FAMILIES = list_families()
SIDES = [(4, 6), (10, 4), (2, 2), (18, 14)]
WAITING = {
    "item", "tolist", "unique", "unique_consecutive", "nonzero", "repeat_interleave", "__bool__", "__int__", "cpu",
}  # fmt: skip
"""Functions whose result has a size or a value that a GPU's queue is waited for."""


class Waits(TorchFunctionMode):
    """Counter of the calls that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in WAITING:
            self.calls[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def attend_alone(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **_):
    """Attention that finds its chunks in every block."""
    lengths = cu_seq_lens_q.diff()
    distinct = lengths.unique().tolist()
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)
    if len(distinct) == 1:
        return attend_equal(stacked, distinct[0], scaling)[None], None
    per_token = lengths.repeat_interleave(lengths)
    indices = [torch.nonzero(per_token == length).squeeze(1) for length in distinct]
    parts = [attend_equal(stacked[:, own], length, scaling) for own, length in zip(indices, distinct, strict=True)]
    return torch.cat(parts)[torch.argsort(torch.cat(indices))][None], None


def tower(family: str, blocks: int, device: str = "cpu"):
    """A model of so many blocks of a vision tower, and features of pictures of several sizes."""
    own = FAMILIES[family]
    ids = {token: 200 + i for i, token in enumerate(SPECIAL_TOKENS)}
    shape = TinyModel(
        vocab_size=280, hidden_size=32, layers=1, heads=2, vision_layers=blocks, vision_hidden_size=32, vision_heads=2,
        family=family,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(own.make_config(shape, ids)).eval().to(device)
    grids = torch.tensor([(1, 2 * high, 2 * wide) for high, wide in SIDES])
    patches = torch.randn(int(grids.prod(1).sum()), own.processor.patch_values, device=device)

    def compute() -> tuple[torch.Tensor, Counter[str]]:
        with torch.no_grad(), Waits() as waits:
            return own.compute_features(model.model.visual, patches, grids), waits.calls

    return model, compute


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_waits_as_often_with_many_blocks_as_with_few(family):
    counts = {}
    for blocks in (3, 9):
        model, compute = tower(family, blocks)
        stock, counts["stock", blocks] = compute()
        use_attention(model.model.visual.config, "flash_alone", attend_alone)
        before, counts["before", blocks] = compute()
        batch_equal_chunks(model)
        after, counts["after", blocks] = compute()
        assert torch.equal(after, before) and float(after.norm()) > 0
        torch.testing.assert_close(after, stock, atol=1e-5, rtol=1e-4)
        assert torch.equal(compute()[0], after), "nothing is kept from call to call"
    totals = {way: count.total() for way, count in counts.items()}
    assert counts["after", 3] == counts["after", 9] and totals["after", 3] > 0
    assert totals["before", 9] >= totals["before", 3] + 6 * 2
    assert totals["after", 9] < totals["before", 9]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_reads_nothing_from_its_device(family):
    """On one without data, where every read raises; the grids are on the host."""
    model, compute = tower(family, 3, "meta")
    use_attention(model.model.visual.config, "flash_alone", attend_alone)
    with pytest.raises(RuntimeError, match="meta"):
        compute()
    batch_equal_chunks(model)
    features, _ = compute()
    assert features.shape[0] == sum(high * wide for high, wide in SIDES) and features.is_meta


def test_windows_and_pictures_have_chunks_of_their_own():
    """One tower's call has two kinds of chunks, found once each."""
    model, compute = tower("qwen2_5_vl", 6)
    batch_equal_chunks(model)
    found = []
    of = vision.Chunks.of.__func__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision.Chunks, "of", classmethod(lambda cls, *own: found.append(of(cls, *own)) or found[-1]))
        compute()
    windows, pictures = found
    assert {4 * high * wide for high, wide in SIDES} == set(pictures.lengths)
    assert max(windows.lengths) <= 64
    assert sorted(torch.cat(list(windows.indices)).tolist()) == [*range(len(windows.order))]
