"""What a person looks at: conversations with their pictures, scores and advantages, and the pages of them."""

import base64
import copy
import gc
import html
import io
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from chat_codecs import qwen_directory, stock_codec
from ledger_store import make_scores, settings
from PIL import Image
from viewed_store import (
    BOX,
    COLOURS,
    HOSTILE,
    ViewedStore,
    crop_of,
    draw,
    sample_of,
    trajectory_of,
    trajectory_table,
)

from thinkimg.analysis.compare_policies import compare_evaluations, find_evaluation, read_pairs, sign_test
from thinkimg.analysis.view import Entry, View, read_system_prompt
from thinkimg.cli import main as cli
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.store.tables import read_batches

GREEDY = ("red", "green", "violet")


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    root = tmp_path_factory.mktemp("viewed") / "store"
    return ViewedStore(Store(root), settings(root))


def view_of(viewed, artifact) -> View:
    return View(viewed.store, artifact, settings(viewed.store.root))


def run(viewed, capsys, *words) -> str:
    overrides = [f"where.store={viewed.store.root}", "where.tracking.enabled=false"]
    flags = [word for override in overrides for word in ("--set", override)]
    with pytest.raises(SystemExit) as stopped:
        cli.app([*words, "--preset", "tiny", *flags], exit_on_error=False)
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


# the conversations ----------------------------------------------------------------------------------------------------


def test_every_rollout_comes_with_its_pictures_its_scores_and_its_advantage(viewed):
    entries = list(view_of(viewed, viewed.rollouts).entries())
    assert [entry.row for entry in entries] == viewed.rows
    advantages, values = viewed.policy.advantages(), viewed.scores.values()
    for number, entry in enumerate(entries):
        assert entry.images.keys() == set(entry.row.images)
        assert all(pixel_hash(image) == sha256 for sha256, image in entry.images.items())
        assert entry.sample.sample_id == entry.row.sample_id
        for name, component in entry.components.items():
            value = values[name][number]
            assert (component["value"] is None and np.isnan(value)) or component["value"] == value
        (weighed,) = entry.weighed
        stored = advantages[entry.row.trajectory_id]
        assert weighed["trained"] and weighed["by"] == f"policy/{viewed.policy.short}"
        assert {key: weighed[key] for key in ("total", "advantage", "reason")} == {
            key: stored[key] for key in ("total", "advantage", "reason")
        }
    judged = [entry.components["self"]["judgements"] for entry in entries if entry.components["self"]["evidence"]]
    assert judged and all(judgement["model"] == "judge" for (judgement,) in judged)


def test_scores_show_their_rollouts_and_some_ids_are_those_of_all(viewed):
    everything = {entry.row.trajectory_id: entry for entry in view_of(viewed, viewed.scores).entries()}
    chosen = view_of(viewed, viewed.scores).group("t-s-green")
    assert [entry.row.group_id for entry in chosen] == ["t-s-green"] * 5
    for entry in chosen:
        assert entry.weighed == everything[entry.row.trajectory_id].weighed


@pytest.mark.parametrize("blind", [False, True])
def test_pictures_that_an_evaluation_did_not_keep_are_made_again(viewed, blind):
    entries = list(view_of(viewed, viewed.evaluation(8 + blind, GREEDY, blind=blind)).entries())
    for entry in entries:
        made_again = entry.images[entry.row.images[1]]
        expected = Image.new("RGB", made_again.size, (128, 128, 128)) if blind else crop_of(draw(entry.sample.answer))
        assert made_again.tobytes() == expected.tobytes()
    assert [entry.is_right for entry in entries if entry.row.index == 0] == [True, True, False]


def test_a_picture_that_a_call_no_longer_gives_is_a_sentence(viewed, monkeypatch):
    monkeypatch.setattr("thinkimg.analysis.pictures.pixel_hash", lambda image: "0" * 64)
    with pytest.raises(UserError, match="crop_image of e7-s-red-0 does not give the image that it gave"):
        list(view_of(viewed, viewed.evaluation(7, GREEDY)).entries())


def test_of_several_scores_the_newest_are_shown_and_the_presets_mix_where_none_was_trained(tmp_path):
    viewed = ViewedStore(Store(tmp_path), settings(tmp_path))
    later = make_scores(viewed.store, viewed.dataset, viewed.rollouts, model="a later judge")
    view = view_of(viewed, viewed.rollouts)
    assert view.scores.reference == later.reference
    (weighed,) = next(view.entries()).weighed
    assert not weighed["trained"] and weighed["by"] == "preset tiny"
    assert view_of(viewed, viewed.scores).scores.reference == viewed.scores.reference


def test_without_a_loop_the_system_prompt_is_that_of_the_settings(viewed, caplog):
    """A single stage records none; most settings leave it to the tools' descriptions."""
    assert view_of(viewed, viewed.rollouts).system == "Look closely."
    for tools, part in ((["crop_image"], "- crop_image"), ([], "Answer the question"), (["nowhere.tool"], None)):
        conversation = {"protocol": "think", "system": None, "tools": tools}
        manifest = copy.deepcopy(viewed.rollouts.manifest)
        manifest["recipe"]["config"]["conversation"] = conversation
        caplog.clear()
        system = read_system_prompt(viewed.store, type(viewed.rollouts)(viewed.rollouts.directory, manifest))
        assert system is None if part is None else part in system and "- rotate" not in system
        assert ("this version of thinkimg renders it" in caplog.text) is (part is not None)


@pytest.mark.parametrize("relation", ["played", "learned", "dropped"])
def test_the_system_prompt_is_the_one_in_the_tokens_where_the_store_has_the_tokenizer(relation, tmp_path, caplog):
    """Of the policy that played or of one that learned from it; a tool's docstring may have changed since."""
    store, before = Store(tmp_path), "Tools: crop_image, as it was described then."
    tokens = tuple(stock_codec("qwen2_5_vl").prompt(before, []))

    def policy(work):
        with work.part("policy") as path:
            shutil.copytree(qwen_directory(), path / "model")

    def played(work):
        row = replace(trajectory_of(sample_of("red"), 0, "red"), tokens=tokens, roles=(0,) * len(tokens))
        work.table("trajectories-00000.parquet", trajectory_table([row]))

    def build(kind, inputs, produce, **settings):
        return store.build(kind, Recipe(kind, 1, 1, settings, inputs), produce)[0]

    first = build("policy", {}, policy if relation != "learned" else lambda work: work.text("weights", "w"))
    talk = {"conversation": {"protocol": "think", "tools": ["crop_image"]}}
    rollouts = build("rollouts", {"policy": first.reference}, played, **talk)
    if relation == "learned":
        build("policy", {"policy": first.reference, "rollouts": rollouts.reference}, policy)
    if relation == "dropped":
        first.directory.with_suffix(".dropped").touch()
    system = read_system_prompt(store, rollouts)
    assert (system == before) is (relation != "dropped")
    assert ("this version of thinkimg renders it" in caplog.text) is (relation == "dropped")


def test_what_holds_no_conversations_is_refused(viewed):
    with pytest.raises(UserError, match="holds no conversations"):
        view_of(viewed, viewed.dataset)


def test_without_the_extra_view_names_it_and_makes_nothing(viewed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    log_dir, store = tmp_path / "logs", f"where.store={viewed.store.root}"
    words = ["view", viewed.rollouts.short, "--log-dir", str(log_dir), "-s", store]
    with pytest.raises(UserError, match=r"needs Inspect, .* Hint: pip install 'thinkimg\[inspect\]'"):
        cli.app([*words, "--preset", "tiny"], exit_on_error=False)
    assert not log_dir.exists()


# pages ----------------------------------------------------------------------------------------------------------------


def check_page(text: str) -> list[Image.Image]:
    """The page loads nothing, runs nothing and says what strangers wrote as text; return its pictures."""
    tags = re.findall(r"<(\w+)", text)
    assert "default-src 'none'" in text and not {"script", "iframe", "link", "a", "object"} & set(tags)
    assert not re.search(r"<[^>]*\son\w+=", text) and html.escape(HOSTILE.partition(" & ")[0]) in text
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert tags.count("img") == len(sources) and not re.search(r"(?:href|url|@import)\b", text)
    assert all(re.fullmatch(r"data:image/(?:png|jpeg);base64,[\w+/=]+", source) for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def boxes(text: str, kind: str) -> list[tuple[float, ...]]:
    matches = re.findall(rf'<rect class="{kind}" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', text)
    return [tuple(map(float, box)) for box in matches]


def test_one_trajectory_is_one_page_with_its_group_boxes_reasons_and_advantage(viewed, tmp_path, capsys):
    path = tmp_path / "page.html"
    printed = run(viewed, capsys, "explain", "t-s-green-1", "--html", str(path))
    text = path.read_text()
    pictures = check_page(text)
    assert len(pictures) == 1 + 6 * 2, "the question's, and source and crop of its turn and of those of its group"
    crop = crop_of(draw("green"))
    assert [picture.size for picture in pictures[1:]] == [(480, 336), crop.size] * 6, "small copies"
    assert boxes(text, "target") == [(140, 72, 112, 84)]
    doubled = tuple(2 * BOX[edge] for edge in ("x", "y", "width", "height"))
    assert set(boxes(text, "cut")) == {doubled}, "in pixels of the picture, not of the model's view"
    own = viewed.policy.advantages()["t-s-green-1"]["advantage"]
    assert f"advantage {own:+.4f}" in text and f"advantage {own:+.4f}" in printed
    assert all(f"t-s-green-{index}" in text for index in range(5)) and "t-s-red-" not in text
    assert text.count("<article class=own>") == 1 and "The judge was away." in text and "The engine broke." in text


def test_a_name_that_is_no_page_is_refused_before_anything_is_read(viewed, tmp_path):
    for words in (["explain", "t-s-green-1"], ["diff", "none", "none"]):
        with pytest.raises(UserError, match=r"is no name of a page"):
            cli.app([*words, "--html", str(tmp_path / "page.txt"), "--preset", "tiny"], exit_on_error=False)


# two policies ---------------------------------------------------------------------------------------------------------


def test_two_evaluations_differ_by_the_answers_that_were_lost_gained_or_changed(viewed):
    first = viewed.evaluation(1, ("red", "violet", "violet"))
    second = viewed.evaluation(2, ("blue", "green", "red"))
    changes = compare_evaluations(viewed.store, first, second)
    listed = [(row["sample_id"], row["change"]) for row in changes["rows"]]
    assert listed == [("s-red", "lost"), ("s-green", "gained"), ("s-blue", "other answer")]
    assert changes["accuracy"] == [viewed.accuracy(first), viewed.accuracy(second)] == pytest.approx([1 / 3, 1 / 3])
    assert changes["compared"] == 3 and changes["recipe"]["config.number"] == [1, 2]
    again = compare_evaluations(viewed.store, first, first)
    assert not again["rows"] and not again["recipe"] and again["p_value"] is None
    failed = compare_evaluations(viewed.store, first, viewed.evaluation(3, ("red", None, "violet")))
    assert [row["change"] for row in failed["rows"]] == ["judged otherwise"]


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, None), (0, 6, 2 / 64), (5, 5, 1.0), (1, 0, 1.0)])
def test_the_sign_test_is_exact(lost, gained, p):
    assert sign_test(lost, gained) == (None if p is None else pytest.approx(p))


def test_the_page_of_two_policies_shows_the_pairs_that_changed_and_no_others(viewed, tmp_path, capsys):
    first, second = (
        viewed.evaluation(number, answers) for number, answers in ((4, GREEDY), (5, ("red", "blue", "blue")))
    )
    path = tmp_path / "pairs.html"
    printed = run(viewed, capsys, "diff", first.short, second.short, "--html", str(path))
    text = path.read_text()
    assert "1 lost, 1 gained" in printed and "1 lost, 1 gained" in text
    assert len(check_page(text)) == 2 * (1 + 2 * 2)
    assert "lost: s-green" in text and "gained: s-blue" in text and "s-red" not in text


def test_one_pair_is_in_memory_at_a_time(viewed):
    """Pictures in full resolution are large, and policies differ in many answers."""
    evaluations = viewed.evaluation(13, GREEDY), viewed.evaluation(14, ("blue", "blue", "blue"))
    changes = compare_evaluations(viewed.store, *evaluations)
    pairs, headings = read_pairs(changes, *(view_of(viewed, evaluation) for evaluation in evaluations)), []
    for heading, first, second in pairs:
        assert heading.endswith(first.sample.sample_id) and first.row.sample_id == second.row.sample_id
        headings.append(heading)
        del first, second
        gc.collect()
        assert sum(isinstance(item, Entry) for item in gc.get_objects()) <= 2
    assert headings == ["lost: s-red", "lost: s-green", "gained: s-blue"]


@pytest.mark.parametrize("times", [1, 20])
def test_each_evaluation_is_read_once_however_many_answers_differ(viewed, times, monkeypatch):
    evaluations = viewed.evaluation(15, GREEDY), viewed.evaluation(16, ("blue", "blue", "blue"))
    changes = compare_evaluations(viewed.store, *evaluations)
    views = [view_of(viewed, evaluation) for evaluation in evaluations]
    scans = []

    def recorded(paths, *arguments, **options):
        scans.append([path.name for path in paths])
        return read_batches(paths, *arguments, **options)

    monkeypatch.setattr("thinkimg.store.kinds.read_batches", recorded)
    pairs = list(read_pairs(changes | {"rows": changes["rows"] * times}, *views))
    assert len(pairs) == 3 * times and scans == [["trajectories-00000.parquet"]] * 2
    monkeypatch.undo()
    read = [[], []]
    for side, view in zip(read, views, strict=True):
        side += view.entries()
    for heading, *entries in pairs[:3]:
        for entry, side in zip(entries, read, strict=True):
            (same,) = [other for other in side if other.row.trajectory_id == entry.row.trajectory_id]
            assert entry.row.turns == same.row.turns and entry.components == same.components
            assert entry.images == same.images and entry.sample == same.sample and entry.sample.sample_id in heading


def test_a_policy_stands_for_its_newest_evaluation_that_sees(viewed):
    evaluations = [viewed.evaluation(6, answers) for answers in (GREEDY, COLOURS)]
    viewed.evaluation(6, COLOURS, blind=True)
    policy = viewed.policy
    with pytest.raises(UserError, match=r"has no evaluation\. Hint: thinkimg evaluate --policy"):
        find_evaluation(viewed.store, policy)
    manifest = dict(policy.manifest, digest="6" * 64)
    newest = find_evaluation(viewed.store, type(policy)(policy.directory, manifest))
    assert newest.reference == max(evaluations, key=lambda entry: entry.manifest["finished"]).reference
    with pytest.raises(UserError, match="can't be compared with an evaluation"):
        find_evaluation(viewed.store, viewed.rollouts)


def test_evaluations_of_other_data_are_not_compared(viewed):
    first, second = viewed.evaluation(11, GREEDY), viewed.evaluation(12, GREEDY)
    manifest = copy.deepcopy(second.manifest)
    manifest["recipe"]["inputs"]["dataset"]["digest"] = "0" * 64
    with pytest.raises(UserError, match="are of different data sets"):
        compare_evaluations(viewed.store, first, type(second)(second.directory, manifest))
