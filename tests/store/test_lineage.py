"""What came from what; proving it by replay; clearing up; handing on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pyarrow as pa
import pytest
from chat_codecs import tiny_directory
from disk import Crash
from paths import REPOSITORY
from single_stage import build_stage, recipe_of

from thinkimg import records
from thinkimg.analysis.export import export_policy
from thinkimg.analysis.verify_calls import replay
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.records import Trajectory, from_row, to_row
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.prepare import prepare
from thinkimg.store import files
from thinkimg.store import gc as collector
from thinkimg.store.artifacts import Store
from thinkimg.store.lineage import Graph, draw_tree
from thinkimg.store.manifest import Recipe, Reference

BASE = Reference("base", "ab" * 32)


def make(store, kind, stage, inputs, config=None, *, tokenizer=False, **metrics):
    """An artifact with a file of its own, as a stage of that name would have made it."""
    recipe = Recipe(
        stage, 1, 1, {"name": repr(config), "model": {}} | (config or {}), {role: made for role, made in inputs.items()}
    )

    def produce(work):
        work.metrics |= metrics
        with work.part("policy" if kind == "policy" else "rows") as path:
            path.mkdir()
            if tokenizer:
                shutil.copytree(tiny_directory(), path / "model")
            (path / "model").mkdir(exist_ok=True)
            (path / "model" / "weights").write_text(recipe.fingerprint)

    return store.build(kind, recipe, produce)[0]


def two_mixes(root, *, tokenizer=False):
    """A data set, a first policy, and from its rollouts two mixes: of one two iterations, of the other one."""
    store = Store(root)
    data = make(store, "dataset", "prepare", {}, train=4)
    first = make(store, "policy", "warmstart", {"dataset": data.reference, "base": BASE})
    policy, made = first, {"data": data, "first": first}
    for iteration in (1, 2):
        shared = {"dataset": data.reference, "policy": policy.reference}
        rollouts = make(store, "rollouts", "rollout", shared, {"iteration": iteration})
        scores = make(
            store,
            "scores",
            "score",
            {"dataset": data.reference, "rollouts": rollouts.reference},
            **{"reward/answer": 0.5},
        )
        inputs = shared | {"rollouts": rollouts.reference, "scores": scores.reference}
        if iteration == 1:
            made["other"] = make(store, "policy", "train", inputs, {"mix": {"tool": 1.0}})
        policy = make(store, "policy", "train", inputs, {"mix": {"answer": 1.0}}, tokenizer=tokenizer)
        evaluation = make(store, "evaluation", "evaluate", {"policy": policy.reference, "dataset": data.reference})
        made |= {f"rollouts{iteration}": rollouts, f"scores{iteration}": scores, f"policy{iteration}": policy}
        made[f"evaluation{iteration}"] = evaluation
    return store, made


def names(artifacts):
    return {str(artifact.reference) for artifact in artifacts}


# lineage --------------------------------------------------------------------------------------------------------------


def test_the_tree_goes_from_the_data_straight_down_to_the_policy(tmp_path):
    store, made = two_mixes(tmp_path)
    lines = [*draw_tree(Graph.of(store), str(made["policy2"].reference))]
    line = ["data", "first", "rollouts1", "scores1", "policy1", "rollouts2", "scores2", "policy2", "evaluation2"]
    for text, name in zip(lines, line, strict=True):
        sign = "◉" if name == "policy2" else "●"
        assert text.startswith(f"{sign} {made[name].kind} {made[name].short}"), text
    assert (
        "+ base ababab" in lines[1] and "train 4" in lines[0] and "iteration 2" in lines[5] and "answer 0.5" in lines[3]
    )


def test_other_mixes_and_evaluations_are_branches(tmp_path):
    store, made = two_mixes(tmp_path)
    lines = [*draw_tree(Graph.of(store), str(made["scores1"].reference))]
    assert [text for text in lines if made["other"].short in text][0].startswith("└── ● policy")
    assert "mix tool=1" in "\n".join(lines) and len(lines) == 11
    alone = [*draw_tree(Graph.of(store), str(made["other"].reference))]
    assert len(alone) == 5 and made["policy1"].short not in "\n".join(alone)
    whole = [*draw_tree(Graph.of(store), str(made["other"].reference), everything=True)]
    assert len(whole) == 11 and sum("◉" in text for text in whole) == 1


def test_what_is_gone_is_told_and_a_long_line_is_drawn(tmp_path):
    store, made = two_mixes(tmp_path)
    shutil.rmtree(made["rollouts1"].directory)
    text = "\n".join(draw_tree(Graph.of(store), str(made["policy2"].reference)))
    assert f"rollouts {made['rollouts1'].short} (gone)" in text
    policy = made["policy2"]
    for number in range(150):
        policy = make(store, "policy", "train", {"policy": policy.reference}, {"mix": {"answer": float(number)}})
    assert len([*draw_tree(Graph.of(store), str(policy.reference))]) > 150


# collecting -----------------------------------------------------------------------------------------------------------


def test_nothing_that_a_line_of_training_needs_is_removed(tmp_path):
    store, made = two_mixes(tmp_path)
    todo = collector.find_garbage(store)
    assert names(todo.kept) == names([made["policy2"], made["other"]])
    assert (todo.remove, todo.drop, todo.remains) == ([], [], [])


def test_what_no_kept_policy_needs_goes_and_the_rest_stays_as_it_was(tmp_path):
    store, made = two_mixes(tmp_path)
    orphan = make(store, "scores", "score", {"rollouts": made["rollouts1"].reference}, {"other": "rewards"})
    todo = collector.find_garbage(store, [made["policy1"]])
    gone = [made[name] for name in ("other", "scores2", "policy2", "evaluation2")]
    # rollouts2 was played by the kept policy: the beginning of its next iteration, as are their scores
    assert names(todo.remove) == names([*gone, orphan]) - names([made["scores2"]])
    collector.collect(store, todo)
    assert names(store.list()) == names(made.values()) - names(todo.remove)
    assert all(store.verify(artifact) == [] for artifact in store.list())
    assert collector.find_garbage(store, [made["policy1"]]).remove == []


def test_of_old_ancestors_the_files_go_and_the_manifests_stay(tmp_path):
    store, made = two_mixes(tmp_path)
    todo = collector.find_garbage(store, [made["policy2"]], keep_last=1)
    assert names(todo.drop) == names(made[name] for name in ("first", "rollouts1", "scores1", "policy1"))
    before = {artifact.directory: artifact.manifest for artifact in store.list()}
    collector.collect(store, todo)
    for artifact in store.list():
        assert artifact.manifest == before[artifact.directory] and store.verify(artifact) == []
    old = store.find("policy", made["first"].fingerprint)  # so a loop that goes on finds it cached
    assert old.dropped and sorted(path.name for path in old.directory.iterdir()) == ["manifest.json"]
    with pytest.raises(UserError, match=f"policy/{old.short} were dropped by gc.*--force"):
        old.checked("policy")
    assert "files dropped" in "\n".join(draw_tree(Graph.of(store), str(made["policy2"].reference)))
    assert collector.find_garbage(store, [made["policy2"]], keep_last=1).drop == []
    with pytest.raises(UserError, match="would keep no policy"):
        collector.find_garbage(store, [], keep_last=0)


def test_the_policy_that_the_kl_term_is_measured_against_keeps_its_files(tmp_path):
    store, made = two_mixes(tmp_path)
    inputs = {"policy": made["policy2"].reference, "reference": made["first"].reference}
    last = make(store, "policy", "train", inputs, {"mix": {"answer": 2.0}})
    dropped = names(collector.find_garbage(store, [last], keep_last=1).drop)
    assert str(made["policy2"].reference) in dropped and str(made["first"].reference) not in dropped


@pytest.mark.parametrize("keep", [2, 3])
def test_a_loop_keeps_its_last_policies_the_best_one_and_those_that_others_go_on_from(tmp_path, keep):
    """Accuracies rise to iteration 2, and fall; another mix was trained from iteration 4."""
    store, accuracies = Store(tmp_path), [0.2, 0.5, 0.9, 0.4, 0.3, 0.3, 0.3, 0.3]
    data = make(store, "dataset", "prepare", {})
    line = [make(store, "policy", "warmstart", {"dataset": data.reference, "base": BASE})]
    for number, accuracy in enumerate(accuracies):
        shared = {"dataset": data.reference, "policy": line[-1].reference}
        make(store, "evaluation", "evaluate", shared, {"blind": False}, accuracy=accuracy)
        make(store, "evaluation", "evaluate", shared, {"blind": True}, accuracy=1.0)
        rollouts = make(store, "rollouts", "rollout", shared, {"iteration": number + 1})
        inputs = shared | {"rollouts": rollouts.reference}
        if number == 4:
            make(store, "policy", "train", inputs, {"mix": {"tool": 1.0}})
        line.append(make(store, "policy", "train", inputs, {"mix": {"answer": 1.0}}))
        collector.drop_old_policies(store, line[-1], keep)
    kept = [number for number, policy in enumerate(line) if not policy.dropped]
    assert kept == sorted({0, 2, 4, *range(len(line) - keep, len(line))})
    assert all(store.verify(artifact) == [] for artifact in store.list())
    assert not any(artifact.dropped for artifact in store.list() if artifact.kind != "policy")


class StopAt:
    """A hook of the file layer that stops at its n-th event; None only counts."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = 0, stop_at

    def __call__(self, event, *paths):
        self.seen += 1
        if self.seen == self.stop_at:
            raise Crash(event, *paths)


def test_a_collection_that_is_killed_anywhere_gets_through(tmp_path, monkeypatch):
    store, made = two_mixes(tmp_path / "whole")

    def collect(root, hook):
        copy = Store(root)
        monkeypatch.setattr(files, "hook", hook)
        with contextlib.suppress(Crash):
            collector.collect(
                copy, collector.find_garbage(copy, [copy.resolve(str(made["policy1"].reference))], keep_last=1)
            )
        monkeypatch.setattr(files, "hook", lambda event, *paths: None)
        return copy

    counter = StopAt()
    shutil.copytree(store.root, tmp_path / "counted")
    whole = names(collect(tmp_path / "counted", counter).list())
    assert counter.seen > 50
    for stop_at in range(1, counter.seen + 1, 2):
        root = tmp_path / str(stop_at)
        shutil.copytree(store.root, root)
        copy = collect(root, StopAt(stop_at))
        assert all(copy.verify(artifact) == [] for artifact in copy.list())
        collect(root, StopAt())
        assert names(copy.list()) == whole and copy.sweep() == []
        assert sum(artifact.dropped for artifact in copy.list()) == 1
        left = [
            path for path in root.rglob("*") if path.is_file() and path.suffix != ".dropped" and path.name != ".lock"
        ]
        assert len(left) == sum(1 if artifact.dropped else 1 + len(artifact.files) for artifact in copy.list())
        shutil.rmtree(root)


def test_a_mark_that_outlived_its_artifact_does_not_hit_the_next_attempt(tmp_path):
    made = make(Store(tmp_path), "dataset", "prepare", {})
    made.directory.with_suffix(".dropped").write_text("{}")
    shutil.rmtree(made.directory)
    again = make(Store(tmp_path), "dataset", "prepare", {})
    assert again.attempt == "0001" and not again.dropped and again.digest == made.digest


def test_nothing_is_collected_while_a_stage_is_at_work(tmp_path):
    store, made = two_mixes(tmp_path)
    todo = collector.find_garbage(store, [made["policy1"]])
    started, leave = threading.Event(), threading.Event()

    def produce(work):
        started.set()
        leave.wait(30)

    worker = threading.Thread(target=lambda: store.build("toy", Recipe("toy", 1, 1, {}), produce))
    worker.start()
    assert started.wait(10)
    try:
        with pytest.raises(UserError, match="A stage is at work on toy/"):
            collector.collect(store, todo)
    finally:
        leave.set()
        worker.join()
    assert names(made.values()) <= names(store.list())


def test_a_damaged_manifest_stops_a_collection(tmp_path):
    store, made = two_mixes(tmp_path)
    (made["scores1"].directory / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not what was published"):
        collector.find_garbage(store)


# replaying ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    """A real data set and its scripted conversations, with the tools' images."""
    settings = ["data.train=12", "data.held_out=4", "conversation.max_images=8", "warmstart.pairs=0"]
    config, store = load_config("tiny", settings), Store(tmp_path_factory.mktemp("replay"))
    dataset, _ = build_stage(prepare, config, store)
    made, _ = build_stage(demonstrate, config, store, dataset=dataset)
    return store, made, recipe_of(demonstrate, config, dataset=dataset)


def test_every_tool_call_is_replayed(demonstrated):
    store, made, _ = demonstrated
    found = replay(made, store)
    turns = [turn for row in made.table("trajectories")["turns"].to_pylist() for turn in row]
    assert found.calls == sum(turn["image"] is not None for turn in turns) > 5
    assert found.images == made.table("images").num_rows > 5 and found.problems == [] and found.note == ""


@pytest.mark.parametrize("change", ["args", "source", "image"])
def test_a_forged_call_is_found_though_every_hash_is_right(demonstrated, tmp_path, change):
    """Forged before it was published: no manifest shows that, the replay does."""
    store, made, recipe = demonstrated
    copy = Store(tmp_path / "store")
    shutil.copytree(store.root / "dataset", copy.root / "dataset")
    rows = [from_row(Trajectory, row) for row in made.table("trajectories").to_pylist()]
    at = next(number for number, row in enumerate(rows) if any(turn.tool == "crop_image" for turn in row.turns))
    turns = list(rows[at].turns)
    number = next(number for number, turn in enumerate(turns) if turn.tool == "crop_image")
    args = json.loads(turns[number].args)
    forged = {
        "args": {"args": json.dumps(args | {"x": args["x"] + 1})},
        "source": {"source": turns[number].source + 1},
        "image": {"image": "cd" * 32},
    }[change]
    turns[number] = replace(turns[number], **forged)
    rows[at] = replace(rows[at], turns=tuple(turns))

    def produce(work):
        with work.part("images.parquet") as path:
            shutil.copyfile(made.path("images.parquet"), path)
        work.table(
            "trajectories.parquet", pa.Table.from_pylist([to_row(row) for row in rows], records.trajectory_schema())
        )

    artifact, _ = copy.build("demonstrations", recipe, produce)
    assert copy.verify(artifact) == []
    (problem,) = replay(artifact, copy).problems
    assert rows[at].trajectory_id in str(problem) and "crop_image" in str(problem)


def test_without_its_data_set_nothing_is_replayed_and_that_is_said(demonstrated, tmp_path):
    store, made, _ = demonstrated
    shutil.copytree(store.root / "demonstrations", tmp_path / "demonstrations")
    copy = Store(tmp_path)
    found = replay(copy.resolve(str(made.reference)), copy)
    assert found.calls == 0 and "its data set cannot be read" in found.note


# handing on -----------------------------------------------------------------------------------------------------------


def test_a_pack_has_all_that_an_auditor_needs_and_proves_itself(tmp_path):
    store, made = two_mixes(tmp_path / "store", tokenizer=True)
    pack = export_policy(store, made["policy2"], tmp_path / "out" / "pack")
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=pack, check=True)
    listed = {line.split("  ")[1] for line in (pack / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(files.files_under(pack)) - {"SHA256SUMS"}
    template = (pack / "chat_template.jinja").read_text()
    assert template == (pack / "policy/model/chat_template.jinja").read_text() and "<|im_start|>" in template
    assert (pack / "policy/model/weights").read_bytes() == made["policy2"].path("policy/model/weights").read_bytes()
    ancestors = {json.loads(path.read_text())["fingerprint"] for path in (pack / "ancestors").iterdir()}
    wanted = ["data", "first", "rollouts1", "scores1", "policy1", "rollouts2", "scores2", "evaluation2"]
    assert ancestors == {made[name].fingerprint for name in wanted}
    tools = {tool["name"]: tool for tool in json.loads((pack / "tools.json").read_text())["tools"]}
    assert len(tools) == 11 and "width" in tools["crop_image"]["parameters"]["properties"]
    stages = json.loads((pack / "config.json").read_text())["stages"]
    assert stages[str(made["policy2"].reference)]["mix"] == {"answer": 1.0}
    assert made["policy2"].short in (pack / "lineage.txt").read_text()
    with pytest.raises(UserError, match="exists already"):
        export_policy(store, made["policy2"], pack)
    (made["policy1"].directory / "policy/model/weights").write_text("x" * 64)
    with pytest.raises(UserError, match="damaged: policy/model/weights"):
        export_policy(store, made["policy1"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# the command line -----------------------------------------------------------------------------------------------------


def thinkimg(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "thinkimg", "artifacts", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_commands_take_prefixes_and_tell_mistakes_in_a_sentence(tmp_path):
    store, made = two_mixes(tmp_path / "artifacts")
    listed = thinkimg("ls", cwd=tmp_path)
    assert listed.returncode == 0 and all(artifact.short in listed.stdout for artifact in made.values())
    assert "other" not in thinkimg("ls", "policy", cwd=tmp_path).stdout
    policy = made["policy2"]
    shown = thinkimg("show", policy.fingerprint[:8], "--store", store.root, cwd=tmp_path)
    assert f"artifact: {policy.reference}" in shown.stdout
    drawn = thinkimg("lineage", policy.fingerprint[:8], cwd=tmp_path).stdout.splitlines()
    assert drawn[0].startswith("● dataset") and len(drawn) == 9
    assert "11 of 11 artifacts are as they were published." in thinkimg("verify", cwd=tmp_path).stdout
    for arguments, said in (
        (["show", "nothing"], "begins with 'nothing'"),
        (["show", "policy/"], "Several artifacts begin with 'policy/'"),
        (["ls", "--store", "elsewhere"], "no artifact store at elsewhere"),
        (["export", made["scores1"].fingerprint[:8], "pack"], "No policy under artifacts begins"),
    ):
        refused = thinkimg(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.startswith("thinkimg: ") and said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_gc_shows_before_it_does_and_verify_ends_with_1_on_damage(tmp_path):
    store, made = two_mixes(tmp_path / "artifacts")
    keep = ["gc", "--keep", made["policy1"].fingerprint[:8]]
    shown = thinkimg(*keep, cwd=tmp_path).stdout
    assert f"remove  policy/{made['other'].short}" in shown and "Add --yes" in shown
    assert names(store.list()) == names(made.values())
    (freed,) = [line.split(" would")[0] for line in shown.splitlines() if "would be freed" in line]
    assert f"{freed} freed." in thinkimg(*keep, "--yes", cwd=tmp_path).stdout and not freed.startswith("0 ")
    assert names(store.list()) == names(made.values()) - names([made["other"], made["policy2"], made["evaluation2"]])
    (made["policy1"].directory / "policy/model/weights").write_text("y" * 64)
    damaged = thinkimg("verify", cwd=tmp_path)
    assert damaged.returncode == 1 and "DAMAGED policy/" in damaged.stdout and "policy/model/weights" in damaged.stdout
