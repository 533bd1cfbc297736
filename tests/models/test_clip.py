"""CLIP: the small one learns what it is shown and is an open_clip model like any other; each image is encoded once."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.models import clip
from thinkimg.puzzles.geometry import Geometry
from thinkimg.puzzles.scenes import Family, make_puzzle, photographs
from thinkimg.resources import Resources
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.judges import embedding
from thinkimg.rewards.judges.embedding import Settings as EmbeddingSettings
from thinkimg.rewards.quality import auc, auc_interval
from thinkimg.stages.score import judge_settings
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe

RED, BLUE, GREY = "Find something red.", "Find something blue.", "whatever"


def picture(colour, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 60, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(np.clip(noise + np.array(colour), 0, 255).astype(np.uint8))


def triples(count: int, first: int = 0):
    """A red or blue image is right for its question; grey is the original, the other colour wrong."""
    for i in range(first, first + count):
        colours = [(190, 0, 0), (0, 0, 190)]
        right, wrong = colours if i % 2 else colours[::-1]
        yield RED if i % 2 else BLUE, picture(right, 3 * i), picture((90, 90, 90), 3 * i + 1), picture(wrong, 3 * i + 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(artifact of a small CLIP, its metrics)"""
    store = Store(tmp_path_factory.mktemp("clip"))

    def produce(work):
        with work.part("clip") as directory:
            work.metrics |= clip.train_tiny(directory, list(triples(32)), seed=0, steps=12, batch=16)

    return store.build("clip", Recipe("clip", 1, 1, {}), produce)[0]


class Images:
    def __init__(self, pictures):
        self.pictures = {pixel_hash(image): image for image in pictures}
        self.asked: list[str] = []

    def decoded(self, sha256: str) -> Image.Image:
        self.asked.append(sha256)
        return self.pictures[sha256]


def context_of(trained, images) -> JudgeContext:
    config = load_config("tiny", ["image.embedding={model: warmstart, pretrained: null}"])
    return JudgeContext(judge_settings(config), Resources(config.where), None, None, trained, (), images)


def test_it_learns_which_image_belongs_to_a_question_and_each_image_is_encoded_once(trained):
    fresh = list(triples(12, first=100))
    images = Images([image for _, *found in fresh for image in found])
    sides = [
        [Pair(question, pixel_hash(original), pixel_hash(image)) for question, original, image in found]
        for found in (
            [(question, original, right) for question, right, original, _ in fresh],
            [(question, original, wrong) for question, _, original, wrong in fresh],
        )
    ]
    found = embedding.judge([*sides[0], *sides[1]], context_of(trained, images))
    values = np.array([one.value for one in found]).reshape(2, -1)
    assert auc(*values) > 0.9 and values[0].mean() > 0.5 > values[1].mean()
    assert sorted(images.asked) == sorted(images.pictures)  # 36 images, 24 pairs
    for one in found:
        shown = one.evidence
        logit = shown["logit_scale"] * (shown["cos_processed"] - shown["cos_original"])
        assert one.value == pytest.approx(1 / (1 + math.exp(-logit)))


def test_an_image_against_itself_is_no_preference_and_swapping_turns_it_around(trained):
    question, right, original, _ = next(triples(1))
    images = Images([right, original])
    a, b = pixel_hash(right), pixel_hash(original)
    pairs = [Pair(question, a, a), Pair(question, a, b), Pair(question, b, a)]
    same, there, back = (one.value for one in embedding.judge(pairs, context_of(trained, images)))
    assert same == 0.5 and there + back == pytest.approx(1.0)


def test_its_vectors_are_unit_vectors_whatever_the_batch(trained):
    encoder = clip.load_encoder(*clip.locate_clip(EmbeddingSettings(model="warmstart", pretrained=None), trained))
    pictures = {str(i): picture((i, 50, 90), i) for i in range(5)}
    together = encoder.images(list(pictures), pictures.__getitem__)
    alone = np.concatenate([encoder.images([name], pictures.__getitem__) for name in pictures])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    assert encoder.texts([RED, GREY]).shape == (2, clip.TINY["embed_dim"])


def test_no_word_of_a_long_question_is_lost(trained):
    """Two questions of 104 words that differ at their ends; one that fits has the vector that it always had."""
    encoder = clip.load_encoder(*clip.locate_clip(EmbeddingSettings(model="warmstart", pretrained=None), trained))
    words = [f"word{i}" for i in range(103)]
    first, second = (" ".join([*words, end]) for end in ("red", "blue"))
    for text in (first, second, "x" * 500, " " * 90 + RED, ""):
        pieces = encoder.split_text(text)
        assert "".join("".join(pieces).split()) == "".join(text.split())
        assert all(encoder.split_text(piece) == [piece] for piece in pieces)
    assert len(encoder.split_text(first)) > 1 == len(encoder.split_text(RED))
    vectors = encoder.texts([first, RED, second])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-4
    np.testing.assert_allclose(vectors[1:2], encoder.texts([RED]), atol=1e-6)
    images = Images(found[1] for found in [next(triples(1))])
    (sha,) = images.pictures
    long, short = embedding.judge([Pair(first, sha, sha), Pair(RED, sha, sha)], context_of(trained, images))
    assert long.evidence["pieces"] == len(encoder.split_text(first)) and "pieces" not in short.evidence


def test_the_borders_of_a_wide_or_tall_image_count(tmp_path, trained):
    """Also where a model's own preprocessing cuts the middle square out, as most of open_clip's do."""
    folder = shutil.copytree(trained.directory / "clip", tmp_path / "cropping")
    settings = json.loads((folder / clip.CONFIG).read_text())
    settings["preprocess_cfg"]["resize_mode"] = "shortest"
    (folder / clip.CONFIG).write_text(json.dumps(settings))
    encoder = clip.load_encoder(f"local-dir:{folder}", None)
    plain, bordered = np.zeros((2, 300, 900, 3), dtype=np.uint8)
    bordered[:, :250], bordered[:, 650:] = 255, 200
    for turn in (lambda pixels: pixels, lambda pixels: pixels.swapaxes(0, 1)):
        images = {name: Image.fromarray(turn(pixels)) for name, pixels in {"a": plain, "b": bordered}.items()}
        vectors = encoder.images(["a", "b"], images.__getitem__)
        assert not np.allclose(*vectors, atol=1e-3)


def test_the_small_ones_questions_fit_into_its_context(trained):
    encoder = clip.load_encoder(*clip.locate_clip(EmbeddingSettings(model="warmstart", pretrained=None), trained))
    names = sorted(photographs())[:3]
    for number in range(64):
        question = make_puzzle(list(Family), names, number, seed=1, geometry=Geometry(28)).question
        assert encoder.split_text(question) == [question]


def test_an_encoder_is_kept_until_another_one_is_asked_for(trained, tmp_path):
    small = EmbeddingSettings(model="warmstart", pretrained=None)
    shutil.copytree(trained.path("clip"), tmp_path / "clip")
    local = EmbeddingSettings(model=f"local-dir:{tmp_path / 'clip'}", pretrained=None)
    with Resources(load_config("tiny").where) as resources:
        first = resources.encoder(small, trained)
        assert resources.encoder(small, trained) is first
        other = resources.encoder(local, None)
        assert other is not first and resources.encoder(local, None) is other
        assert resources.encoder(small, trained) is not first


def test_training_again_gives_the_same_bytes(trained, tmp_path):
    again = clip.train_tiny(tmp_path / "again", list(triples(32)), seed=0, steps=12, batch=16)
    assert again == {name: trained.metrics[name] for name in again}
    assert (tmp_path / "again" / clip.WEIGHTS).read_bytes() == (trained.path("clip") / clip.WEIGHTS).read_bytes()


def test_a_folder_is_known_by_its_content_and_a_missing_one_is_one_sentence(trained, tmp_path):
    folder = trained.path("clip")
    local = EmbeddingSettings(model=f"local-dir:{folder}", pretrained=None)
    assert len(clip.weights_digest(local, None)) == 64
    assert clip.weights_digest(EmbeddingSettings(), None) == "ViT-B-32/laion2b_s34b_b79k"
    with pytest.raises(UserError, match="no CLIP model"):
        clip.weights_digest(EmbeddingSettings(model=f"local-dir:{tmp_path / 'gone'}", pretrained=None), None)
    with pytest.raises(UserError, match="can't be loaded"):
        clip.load_encoder("ViT-of-nobody", None)


def test_the_controls_of_the_measure_are_what_they_should_be():
    rng = np.random.default_rng(0)
    assert auc(np.ones(50), np.zeros(50)) == 1.0 and auc(np.ones(5), np.ones(7)) == 0.5
    mid, low, high = auc_interval(rng.uniform(size=300), rng.uniform(size=300))
    assert low < 0.5 < high and low < mid < high and high - low < 0.12
    assert auc_interval(np.ones(1), np.zeros(1)) == (1, 1, 1), "half of three pairs is one"
    right, wrong = rng.normal(1, 1, 20), rng.normal(0, 1, 30)
    assert auc(right, wrong) == pytest.approx(np.mean(right[:, None] > wrong[None]))
