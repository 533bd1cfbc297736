"""lmms-eval, unmodified, at the endpoint: `make test-evaluators` installs it into an environment of its own."""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_server import Endpoint
from paths import REPOSITORY

from thinkimg.config.load import load_config
from thinkimg.images.decode import ImageLimits
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.serve import Sources, connect_once, in_a_thread, make_connect, make_service
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import settings_of
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store

pytestmark = pytest.mark.extra

LMMS_EVAL = REPOSITORY / ".venv-evaluators" / "bin" / "lmms-eval"
WRITE_TASK = REPOSITORY / "examples" / "evaluators" / "write_task.py"
# A tenth of the warm start of the tiny preset: the policy calls tools and answers, mostly wrongly.
SETTINGS = ["warmstart.steps=160", "warmstart.batch=16", "evaluate.k=1", "where.tracking.enabled=false"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "OPENAI_API_KEY": "none"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A warm-started policy behind an endpoint, with its evaluation on all held-out puzzles."""
    root = tmp_path_factory.mktemp("evaluators") / "artifacts"
    overrides = [*SETTINGS, f"where.store={root}"]
    config = load_config("tiny", overrides)
    with Resources(config.where, say=lambda line: None) as resources, ExitStack() as stack:
        builder = Builder(config, Store(root), resources)
        dataset = builder.make(prepare)
        policy = builder.make(warmstart, dataset=dataset)
        evaluation = builder.make(evaluate, dataset=dataset, policy=policy, samples=300)
        settings = settings_of(config)
        connect = make_connect(policy, settings, resources)
        asyncio.run(connect_once(connect))
        sources, keeper = Sources(ImageLimits(), None, ()), EngineKeeper(in_a_thread(connect))
        endpoint = Endpoint(make_service(policy, settings, resources, sources, keeper, stack))
        yield SimpleNamespace(url=endpoint.url, dataset=dataset, evaluation=evaluation, overrides=overrides)
        endpoint.close()


def run(argv: list[object], folder: Path) -> str:
    environment = os.environ | OFFLINE | {"HOME": str(folder)}
    done = subprocess.run(list(map(str, argv)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_lmms_eval_gets_the_greedy_answers_of_evaluate(served, tmp_path):
    settings = [word for setting in served.overrides for word in ("--set", setting)]
    written = run([sys.executable, WRITE_TASK, served.dataset.short, "task", "--preset", "tiny", *settings], tmp_path)
    assert "300 questions: task\n" in written
    (tmp_path / "task").rename(tmp_path / "moved")
    said = run(
        [
            LMMS_EVAL, "--model", "openai",
            "--model_args", f"model_version=policy,base_url={served.url}/v1",
            "--tasks", "thinkimg_held_out", "--include_path", tmp_path / "moved", "--batch_size", "1",
            "--log_samples", "--output_path", "out",
        ],
        tmp_path,
    )  # fmt: skip
    log = next(tmp_path.glob("out/**/*_samples_thinkimg_held_out.jsonl"), None)
    assert log is not None, said[-3000:]  # lmms-eval ends with status 0 after an error, too
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    answers = {row["target"]: row["filtered_resps"] for row in logged}
    greedy = {row.sample_id: row for row in served.evaluation.trajectories() if row.index == 0}
    assert answers == {name: row.answer or "?" for name, row in greedy.items()} and len(answers) == 300
    assert len(set(answers.values())) > 4 and sum(len(row.images) > 1 for row in greedy.values()) > 200
    rights = {sample.sample_id: sample.answers for sample in served.dataset.split("held_out")}
    right = [name for name, answer in answers.items() if answer.casefold() in map(str.casefold, rights[name])]
    (results,) = tmp_path.glob("out/**/*_results.json")
    accuracy = json.loads(results.read_text())["results"]["thinkimg_held_out"]["exact_match,none"]
    assert accuracy == pytest.approx(len(right) / 300) and right
