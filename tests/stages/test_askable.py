"""Questions that can never be asked: prepare refuses just those that a conversation would refuse, and says why."""

import json

import numpy as np
import pytest
from chat_codecs import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.conversation.episode import ConversationSpec, Episode
from thinkimg.conversation.picture import make_picture
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.models.askable import find_unaskable
from thinkimg.records import AnswerType, Sample
from thinkimg.stages.prepare import ask_settings, prepare
from thinkimg.store.artifacts import Store

PICTURE = Image.fromarray(np.zeros((112, 112, 3), np.uint8))


def write(root, questions):
    for i in range(len(questions)):
        noise = np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": text, "answer": "yes"} for i, text in enumerate(questions)]
    path = root / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(seed: int, count: int) -> str:
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), (count, 7))
    return " ".join("".join(word) for word in letters)


def test_every_third_question_is_too_long(tmp_path):
    """The handed case: 400 random words, against a conversation of 512 tokens."""
    questions = [words(i, 400) if i % 3 == 0 else f"Is it number {i}?" for i in range(15)]
    path = write(tmp_path, questions)
    own = [f"data.path={path}", "data.source=jsonl", "where.workers=2"]
    with pytest.raises(
        UserError, match=r"5 of 15 rows are refused.*tokens, conversation.max_tokens is 512. \(length\)"
    ):
        build_stage(prepare, load_config("tiny", own), Store(tmp_path / "store"))
    dataset, _ = build_stage(prepare, load_config("tiny", [*own, "data.max_refused=0.5"]), Store(tmp_path / "store"))
    assert sorted(sample.question for sample in dataset.samples()) == sorted(q for q in questions if len(q) < 100)
    refused = dataset.table("refused").to_pylist()
    assert [row["reason"] for row in refused] == ["length"] * 5
    assert [row["where"] for row in refused] == [f"data.jsonl line {i + 1}" for i in range(0, 15, 3)]


def test_a_tokenizer_that_is_not_needed_is_not_loaded_and_one_that_is_missing_is_a_sentence(tmp_path):
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3_vl"}')
    own = ["data.source=jsonl", "where.workers=2", f"model.path={model}", "data.max_refused=0.5"]
    short = [*own, f"data.path={write(tmp_path, [f'Is it {i}?' for i in range(6)])}"]
    build_stage(prepare, load_config("development", short), Store(tmp_path / "store"))
    long = [*own, f"data.path={write(tmp_path, [words(i, 3000) for i in range(6)])}"]
    with pytest.raises(UserError, match="the tokenizer of .*model can't be loaded"):
        build_stage(prepare, load_config("development", long), Store(tmp_path / "store"))


def sample(question: str, images: int) -> Sample:
    return Sample("s", question, ("a",), AnswerType.TEXT, (), (pixel_hash(PICTURE),) * images, "t", "train")


@given(
    st.lists(st.sampled_from([*CORPUS, "12345", "<|im_end|>", "\n", "é", "  "]), max_size=60),
    st.integers(1, 5),
    st.integers(60, 400),
    st.sampled_from(["qwen2_5_vl", "qwen3_vl", "qwen3_5"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_refused_is_what_a_conversation_refuses(tiny_models, texts, images, room, family):
    limits = [f"conversation.max_tokens={room}", "conversation.max_images=4", f"model.tiny.family={family}"]
    config = load_config("tiny", limits)
    asked = ask_settings(config).model_copy(update={"tiny": None, "start": str(tiny_models[0])})
    question = sample(" ".join(texts) or "?", images)
    reason = find_unaskable(asked, [question], {question.images[0]: PICTURE.size}).get("s")
    spec = ConversationSpec.load(config.talk(), config.view(), tiny_models[0])
    pictures = [make_picture(PICTURE, asked.images)] * images
    episode = Episode(question, pictures, spec, policy="p", group_id="g", index=0)
    assert episode.error == reason
