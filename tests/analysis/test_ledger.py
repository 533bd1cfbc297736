"""The ledger on a small real store: remix, explain and diff, as functions and as commands."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ledger_store import COMPONENTS, CROP, GROUPS, MIX, SHA, SIZE, make_dataset, make_policy, make_rollouts, make_scores
from ledger_store import settings as configured

from thinkimg.analysis.diff import compare_scores
from thinkimg.analysis.explain import explain_reward, find_trajectory
from thinkimg.analysis.joined import open_scores, weighings
from thinkimg.analysis.remix import compare_mixes, read_mixes
from thinkimg.cli import main as cli
from thinkimg.cli.tables import conversation_lines, mix_lines
from thinkimg.config.load import load_config
from thinkimg.console import console
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Store


class Made:
    def __init__(self, root):
        self.root, self.store = root, Store(root)
        self.dataset = make_dataset(self.store)
        self.rollouts = make_rollouts(self.store, self.dataset)
        self.scores = make_scores(self.store, self.dataset, self.rollouts)
        self.config = configured(root)

    def policy(self, *overrides):
        config = configured(self.root, *overrides)
        return make_policy(self.store, self.dataset, self.rollouts, self.scores, config)

    def change(self, edit, **config):
        """Scores of the same rollouts that `edit(row)` has changed."""
        return make_scores(self.store, self.dataset, self.rollouts, edit, **config)

    def remixed(self, *mixes):
        scored = open_scores(self.scores, self.store)
        own = weighings(self.store, self.scores, self.config)
        return compare_mixes(scored, own + read_mixes(list(mixes), own[0], scored))


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path / "store")


def mix_file(path, text):
    path.write_text(text)
    return path


def value(number):
    return {"value": number, "status": "ok", "reason": None, "evidence": None}


# remix ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("only_if_right", ["true", "false"])
def test_the_runs_own_mix_reproduces_what_it_was_trained_with(made, tmp_path, scale, only_if_right):
    policy = made.policy(
        f"train.loss.scale_rewards={scale}", f"image.only_if_right={only_if_right}", "train.min_std=0.1"
    )
    text = "\n".join(
        f"{name}: {json.dumps(value)}" for name, value in made.remixed()[0].items() if name in ("mix", "image")
    )
    own, again = made.remixed(mix_file(tmp_path / "same.yaml", text))
    stored = policy.advantages()
    for entry in (own, again):
        assert entry["advantages"] == {name: row["advantage"] for name, row in stored.items()}
        assert entry["included"] == sum(row["included"] for row in stored.values())
        assert (entry["best_changed"], entry["sign_changed"]) == (0, 0)
        assert entry["spearman"] == pytest.approx([1.0, 1.0])
    assert (own["reproduced"], again["reproduced"]) == (0.0, None) and own["included"] > 0
    assert own["silent"] == len({row["group_id"] for row in stored.values() if row["reason"] == "silent"})


def test_a_mix_of_one_column_is_judged_by_that_column_alone(made, tmp_path):
    made.policy()
    _, entry = made.remixed(mix_file(tmp_path / "a.yaml", "mix: {answer: 1.0}"))
    values, (ids, groups) = made.scores.values(), made.scores.identities()
    groups, counted = np.array(groups), np.array([not name.endswith(("-3", "-4")) for name in ids])
    assert entry["rows"] == counted.sum() == GROUPS * 3
    assert entry["mean_total"] == pytest.approx(values["answer"][counted].mean())
    answers = {name: value for name, value in zip(ids, values["answer"], strict=True)}
    for group in np.unique(groups):
        rows = [name for name, own, one in zip(ids, groups, counted, strict=True) if own == group and one]
        ranked = sorted(rows, key=lambda name: entry["advantages"][name])
        assert [answers[name] for name in ranked] == sorted(answers[name] for name in rows)
        assert sum(entry["advantages"][name] for name in rows) == pytest.approx(0)


def test_a_turned_mix_changes_every_best_row_and_groups_that_hardly_vary_are_silent(made, tmp_path):
    def turned(row):
        row["tool"] = value(1 - row["format"]["value"])

    made.scores = made.change(turned)
    made.config = configured(made.root, "mix={format: 1.0}")
    mixes = [mix_file(tmp_path / f"{name}.yaml", f"mix: {{{name}: 1.0}}") for name in ("tool", "format")]
    own, other, same = made.remixed(*mixes)[:3]
    assert own["name"] == "preset tiny" and own["reproduced"] is None
    assert (other["best_changed"], same["best_changed"]) == (GROUPS, 0)
    assert other["spearman"][0] < -0.9 < 0.99 < same["spearman"][0]
    assert other["sign_changed"] == own["included"] == GROUPS * 3  # three distinct values: none is the mean
    made.config = configured(made.root, "mix={format: 1.0}", "train.min_std=100")
    nothing = made.remixed(mixes[1])[1]
    assert (nothing["silent"], nothing["included"], nothing["best_changed"]) == (GROUPS, 0, 0)


def test_each_policy_that_was_trained_on_the_scores_is_a_line(made):
    made.policy()
    made.policy("mix={answer: 1.0}")
    entries = made.remixed()
    assert [entry["mix"] for entry in entries] == [made.config.mix, {"answer": 1.0}]
    assert [entry["reproduced"] for entry in entries] == [0.0, 0.0]


# explain --------------------------------------------------------------------------------------------------------------


def told(made, name):
    artifact, found, _ = find_trajectory(made.store, name)
    return explain_reward(made.store, artifact, found, made.config)


def test_a_story_adds_up(made):
    policy = made.policy()
    stored = policy.advantages()
    for name, row in stored.items():
        found = told(made, name)
        (weighed,) = found["weighed"]
        assert weighed["trained"] and weighed["advantage"] == row["advantage"] and weighed["reason"] == row["reason"]
        if row["reason"] != "invalid":
            assert sum(term["adds"] for term in weighed["terms"]) == pytest.approx(row["total"])
        assert [one["trajectory_id"] for one in weighed["group"]] == [
            n for n in stored if n.split("-")[0][:2] == name[:2]
        ]
        assert set(found["components"]) == set(COMPONENTS)
        for component, score in found["components"].items():
            (term,) = [t for t in weighed["terms"] if t["column"] == component] or [None]
            assert (score["value"] is None) == (score["status"] == "missing") == term["group_mean"]
            judged = [one["key"] for one in score["judgements"]]
            assert judged == ([f"judge:{name}"] if component == "self" and score["value"] is not None else [])
            assert all((one["model"], one["evidence"]) == ("judge", {"p": [0.25, 0.75]}) for one in score["judgements"])


def test_a_story_tells_what_was_said_and_shown(made):
    made.policy()
    right, wrong, malformed, over, broke = (told(made, f"t0{i}") for i in range(SIZE))
    assert (right["question"], right["right_answer"], right["answer"]) == ("Which colour?", "red", "red")
    assert right["coordinates"] == "pixels" and "\nTurns (coordinates are pixels)" in conversation_lines(right)
    assert [turn["tool"] for turn in right["turns"]] == ["crop_image", None]
    assert [(image["sha256"], image["width"], image["made_by_turn"]) for image in right["images"]] == [
        (SHA, 112, None), (CROP, 28, 0)
    ]  # fmt: skip
    assert "every turn in order" in over["weighed"][0]["why"] and not over["weighed"][0]["included"]
    assert "failed" in broke["weighed"][0]["why"] and broke["error"] == "the engine broke"
    assert malformed["turns"][0]["error"] and wrong["answer"] == "blue"


def test_without_judgements_keys_are_named_and_without_a_policy_the_presets_mix_is_shown(made):
    made.scores = made.change(lambda row: None, kept=False)
    row = next(row for row in made.scores.table("scores").to_pylist() if row["self"]["evidence"])
    found = explain_reward(made.store, made.scores, row["trajectory_id"], made.config)
    assert found["components"]["self"]["judgements"] == [{"key": f"judge:{row['trajectory_id']}"}]
    assert [weighed["trained"] for weighed in found["weighed"]] == [False]
    other = load_config("tiny", ["image.types=[attention]", "image.weights={attention: 1}"])
    assert "attention" not in found["components"]
    unweighed = explain_reward(made.store, made.scores, row["trajectory_id"], other)
    assert unweighed["weighed"] == [] and any("--set mix" in line for line in mix_lines(unweighed))


def test_an_id_is_found_by_its_beginning_in_the_newest_scores(made):
    again = made.change(lambda row: None)
    artifact, name, others = find_trajectory(made.store, "t31")
    assert (artifact.reference, name) == (again.reference, "t31-1")
    assert [one.reference for one in others] == [made.scores.reference]
    assert find_trajectory(made.store, "t31", made.scores)[0].reference == made.scores.reference
    with pytest.raises(UserError, match="5 trajectories .* begin with 't3'.*t30-0"):
        find_trajectory(made.store, "t3")
    for nothing in ("x", ""):
        with pytest.raises(UserError, match="traject"):
            find_trajectory(made.store, nothing)


# diff -----------------------------------------------------------------------------------------------------------------


def test_a_diff_with_itself_is_empty(made):
    for other in (made.scores, made.change(lambda row: None)):
        found = compare_scores(made.scores, other)
        assert found["recipe"] == {} and found["rows"] == [] and found["compared"] == GROUPS * SIZE
        assert all(not only for side in found["only_in"].values() for only in side.values())
        assert {name: entry["changed"] for name, entry in found["components"].items()} == dict.fromkeys(COMPONENTS, 0)


def test_a_diff_names_rows_settings_and_reasons(made):
    def edit(row):
        if row["trajectory_id"] == "t10-0":
            row["tool"] = {"value": None, "status": "missing", "reason": "It broke.", "evidence": None}
        if row["trajectory_id"] == "t20-0":
            row["format"] = row["format"] | {"evidence": '{"turns": 3}'}

    other = made.change(edit, tolerance=0.5)
    found = compare_scores(made.scores, other)
    assert found["recipe"] == {"config.tolerance": ["(none)", 0.5]}
    rows = {(row["trajectory_id"], row["component"]): row for row in found["rows"]}
    assert set(rows) == {("t10-0", "tool"), ("t20-0", "format")}
    broken, proved = rows["t10-0", "tool"], rows["t20-0", "format"]
    assert broken["why"] == ["status", "reason"] and broken["to"]["value"] is None is broken["change"]
    assert proved["why"] == ["evidence: all"] and proved["change"] == 0
    backwards = compare_scores(other, made.scores)
    assert [(row["from"], row["to"]) for row in backwards["rows"]] == [
        (row["to"], row["from"]) for row in found["rows"]
    ]


def test_a_diff_tells_which_judge_is_behind_it(made):
    def lower(row):
        if row["self"]["value"] is not None:
            row["self"] = row["self"] | {"value": row["self"]["value"] / 2}

    found = compare_scores(made.scores, made.change(lower, model="teacher"))
    assert found["recipe"] == {"config.judge.model": ["judge", "teacher"]}
    assert found["rows"] and {row["component"] for row in found["rows"]} == {"self"}
    for row in found["rows"]:
        (change,) = row["judgements"]
        assert change["model"] == ["judge", "teacher"] and change["value"] == [row["from"]["value"], row["to"]["value"]]
        assert set(change) == {"model", "value"}
        assert row["why"] == ["judgement: model", "judgement: value"] and row["change"] < 0
    summary = found["components"]["self"]
    assert summary["changed"] == summary["why"]["judgement: model"] == len(found["rows"])


def test_a_diff_tells_a_judge_that_does_not_repeat_itself(made):
    def lower(row):
        if row["trajectory_id"] == "t00-0":
            row["self"] = {
                "value": 0.125,
                "status": "ok",
                "reason": None,
                "evidence": '{"judgements": ["judge:t00-0"]}',
            }

    before = made.change(
        lambda row: lower(row) or (row["self"].update(value=0.75) if row["self"]["value"] == 0.125 else 0)
    )
    (row,) = compare_scores(before, made.change(lower))["rows"]
    assert row["judgements"] == [{"value": [0.75, 0.125]}] and row["why"] == ["judgement: value"]


def test_a_diff_of_other_rollouts_names_what_only_one_has(made):
    from ledger_store import group

    fewer = make_rollouts(made.store, made.dataset, [group(i) for i in range(GROUPS - 1)], number=2)
    found = compare_scores(made.scores, make_scores(made.store, made.dataset, fewer))
    assert found["only_in"]["one"]["trajectories"] == [f"t5{i}-{i}" for i in range(SIZE)]
    assert set(found["recipe"]) == {"inputs.rollouts"} and found["rows"] == []


# the commands ---------------------------------------------------------------------------------------------------------


def run(made, *arguments):
    """What a command prints; it gets through the real parser."""
    with console.capture() as captured:
        cli.app([*arguments, "-p", "tiny", "-s", f"where.store={made.root}", *(f"-s={text}" for text in MIX)],
                result_action="return_value")  # fmt: skip
    return captured.get()


def test_the_commands_print_tables_for_people(made, tmp_path):
    policy = made.policy()
    answer = mix_file(tmp_path / "answer.yaml", "mix: {answer: 1.0}")
    shown = run(made, "remix", made.scores.fingerprint[:10], "--mix", str(answer))
    assert policy.short in shown and "answer 1" in shown and f"{GROUPS * 3} of {GROUPS * SIZE} rows count" in shown
    assert "differ from those of the training" not in shown
    shown = run(made, "explain", "t00")
    for text in (
        "Which colour?",
        "crop_image",
        CROP[:16],
        "image: self",
        "In the loss",
        "> t00-0",
        "<answer>red</answer>",
    ):
        assert text in shown
    other = made.change(lambda row: row.update(tool=value(0.5)), model="other")
    shown = run(made, "diff", str(made.scores.directory), str(other.directory))
    for text in ("config.judge.model", "30 trajectories", "t00-0", "judgement: model"):
        assert text in shown
    assert "No score differs" in run(made, "diff", str(other.directory), str(other.directory))


def test_the_commands_print_json(made, capsys):
    made.policy()
    run(made, "remix", made.scores.fingerprint, "--json")
    assert [entry["reproduced"] for entry in json.loads(capsys.readouterr().out)["mixes"]] == [0.0]
    run(made, "explain", "t00-0", "--scores", made.scores.fingerprint[:8], "--json")
    assert json.loads(capsys.readouterr().out)["trajectory_id"] == "t00-0"
    run(made, "diff", made.scores.fingerprint, made.scores.fingerprint, "--json")
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "nobody"], "nobody"),
        (["remix", "0123456789"], "0123456789"),
        (["diff", "0123456789", "0123456789"], "0123456789"),
        (["remix", "SCORES", "--mix", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2_and_nothing_is_written(made, arguments, said):
    arguments = [made.scores.fingerprint if text == "SCORES" else text for text in arguments]
    before = sorted(made.root.rglob("*"))
    command = [sys.executable, "-m", "thinkimg", *arguments, "-p", "tiny", "-s", f"where.store={made.root}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("thinkimg: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and sorted(made.root.rglob("*")) == before
