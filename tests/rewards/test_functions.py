"""A user's own reward functions: TRL's calling convention, and what happens when they break it."""

import hashlib
import importlib
import json
import sys
from dataclasses import replace

import pytest
from PIL import Image
from rewards_rows import batch, call, failed, final, malformed, sample, trajectory

from thinkimg.errors import UserError
from thinkimg.rewards.batch import Score, Status
from thinkimg.rewards.registry import load_components
from thinkimg.rewards.settings import JUDGES, RULES, ImageConfig, RewardsConfig
from thinkimg.rewards.user_function import load_function

IMAGE = Image.new("RGB", (3, 2))
ROWS = [trajectory(final("a"), answer="a"), trajectory(final("abc"), answer="abc")]


class Images:
    def decoded(self, sha256):
        return IMAGE


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module `own` of the user; returns the function that scores ROWS with one of its functions."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body, name="mine", rows=ROWS, one=None):
        (tmp_path / "own.py").write_text(body)
        sys.modules.pop("own", None)
        importlib.invalidate_caches()
        load_function.cache_clear()
        config = RewardsConfig(functions=(f"own:{name}",))
        return load_components(config, ImageConfig())[name](batch(rows, one, Images(), functions=config.functions))

    yield write
    sys.modules.pop("own", None)
    load_function.cache_clear()


def values(scores):
    return [one.value for one in scores]


def test_a_function_of_trls_form_is_one_more_component(module):
    body = "def mine(completions, **columns):\n    return [len(c[-1]['content']) / 100 for c in completions]\n"
    scores = module(body)
    assert values(scores) == [len(row.turns[-1].text) / 100 for row in ROWS]
    config = RewardsConfig(functions=("own:mine",))
    assert list(load_components(config, ImageConfig(types=tuple(JUDGES)))) == [*sorted([*RULES, *JUDGES]), "mine"]
    assert config.sources() == {"own:mine": hashlib.sha256(body.encode()).hexdigest()}


def test_the_source_on_record_is_the_one_that_runs(module, tmp_path):
    assert values(module("def mine(completions, **columns): return [1, 1]")) == [1, 1]
    config = RewardsConfig(functions=("own:mine",))
    recorded = config.sources()
    (tmp_path / "own.py").write_text("def mine(completions, **columns): return [0.25, 0.25]")
    assert (
        values(load_components(config, ImageConfig())["mine"](batch(ROWS))) == [1, 1] and config.sources() == recorded
    )


def test_it_is_called_as_trl_calls_it(module, tmp_path):
    """The messages are what GRPOTrainer would give; the arguments are those of its `_calculate_rewards`."""
    body = f"""
import json
def mine(prompts, completions, completion_ids, images, **columns):
    assert callable(columns.pop("log_extra")) and callable(columns.pop("log_metric"))
    sizes = [[image.size for image in each] for each in images]
    with open({str(tmp_path / "seen")!r}, "w") as file:
        json.dump([prompts, completions, completion_ids, sizes, columns], file)
    return [0.5] * len(completions)
"""
    row = trajectory(call(x=1), malformed(), final("red"), answer="red")
    own = {"level": 3, "question": "not ours", "trainer_state": 1, "log_metric": 2}
    one = sample("blue", "choice", ("red", "blue"), targets=((1, 2.5, 3, 4),))
    module(body, rows=[failed(), row], one=replace(one, columns=own))
    prompts, completions, ids, sizes, columns = json.loads((tmp_path / "seen").read_text())
    assert prompts == [[{"role": "user", "content": "Which colour?"}]]
    tool_call = {"type": "function", "function": {"name": "crop_image", "arguments": {"x": 1}}}
    assert completions == [[
        {"role": "assistant", "content": row.turns[0].text, "tool_calls": [tool_call]},
        {"role": "tool", "name": "crop_image", "content": "Image 1."},
        {"role": "assistant", "content": "what?"},
        {"role": "user", "content": "Error: Begin."},
        {"role": "assistant", "content": "<think>So.</think><answer>red</answer>"},
    ]]  # fmt: skip
    assert ids == [[7, 8, 9]] and sizes == [[[3, 2]]]
    assert columns == {
        "question": ["Which colour?"], "answer": ["blue"], "answers": [["blue"]], "answer_type": ["choice"],
        "choices": [["red", "blue"]],
        "sample_id": ["s0"], "source": ["test"], "final_answer": ["red"], "level": [3], "trainer_state": None,
        "columns": [own],
        "targets": [[[1, 2.5, 3, 4]]],
    }  # fmt: skip


def test_trls_own_functions_run_unchanged():
    """think_format_reward of TRL reads the first message of each completion."""
    path = "trl.rewards:think_format_reward"
    assert values(
        load_components(RewardsConfig(functions=(path,)), ImageConfig())["think_format_reward"](batch(ROWS))
    ) == [
        1,
        1,
    ]


@pytest.mark.parametrize(
    "given, score",
    [("None", Score(None, Status.MISSING, "The function gave None.")),
     ("float('nan')", Score(None, Status.MISSING, "The function gave nan.")),
     ("-float('inf')", Score(None, Status.MISSING, "The function gave -inf.")),
     ("0", Score(0.0, Status.ZERO, "The function gave 0.")),
     ("True", Score(1.0, Status.OK)),
     ("-2.5", Score(-2.5, Status.OK, "The value is outside of [0, 1].")),
     ("1.5", Score(1.5, Status.OK, "The value is outside of [0, 1]."))],
)  # fmt: skip
def test_each_value_is_kept_missing_or_remarked_on(module, given, score):
    assert module(f"def mine(completions, **columns): return [0.5, {given}]") == [Score(0.5, Status.OK), score]


@pytest.mark.parametrize(
    "given", ["np.array([0.25, 0.75], np.float32)", "(v for v in (0.25, 0.75))", "np.array([1, 3]) / 4"]
)
def test_numbers_of_other_libraries_are_numbers(module, given):
    assert values(module(f"import numpy as np\ndef mine(completions, **columns): return {given}")) == [0.25, 0.75]


def test_an_async_function_and_a_decorated_one_work(module):
    body = """
import asyncio, functools
async def slow(completions, **columns):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)
@functools.wraps(slow)
def mine(*args, **columns):
    return slow(*args, **columns)
"""
    assert values(module(body, "slow")) == values(module(body)) == [1, 1]


def test_what_it_logs_is_evidence(module):
    body = """
def mine(completions, log_extra, log_metric, **columns):
    log_extra("length", [len(c) for c in completions])
    log_extra("odd", [float("nan"), object])
    log_metric("mean", 0.5)
    return [0.5, None]
"""
    first, second = module(body)
    assert first.evidence == {"length": 1, "odd": "nan"} and second.evidence["length"] == 1
    assert json.loads(second.row()["evidence"]) == second.evidence


def test_failed_conversations_are_missing_and_not_shown(module):
    body = "def mine(completions, **columns): return [1 / len(completions)] * len(completions)"
    scores = module(body, rows=[failed(), *ROWS, failed()])
    assert values(scores) == [None, 0.5, 0.5, None]
    assert scores[0] == Score(None, Status.MISSING, "The conversation failed.")
    assert values(module(body, rows=[failed()])) == [None] and module(body, rows=[]) == []


@pytest.mark.parametrize(
    "body, says",
    [("raise KeyError('width')", "own:mine failed: KeyError: 'width' (own.py, line "),
     ("return [0.5]", "returned 1 values for 2 completions"),
     ("return [0.5] * 3", "returned 3 values for 2 completions"),
     ("return 0.5", "failed: TypeError"),
     ("return None", "failed: TypeError"),
     ("return ['0.5', '0.5']", "failed: TypeError: '0.5' is no number"),
     ("columns['log_extra']('a', [1]); return [1, 1]", "returned 1 values of a for 2 completions")],
)  # fmt: skip
def test_a_function_that_breaks_the_contract_is_named(module, body, says):
    with pytest.raises(UserError, match="The reward function own:mine") as caught:
        module(f"def mine(completions, **columns): {body}")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "path, says",
    [("own", "is no import path"), ("own:", "is no import path"), ("own:a.b", "is no import path"),
    (":f", "is no import path"),
     ("own.py:f", "cannot be imported"), ("missing_module:f", "cannot be imported"),
     ("math:nothing", "no function 'nothing'"),
     ("math:pi", "no function 'pi'"), ("own:plain", "does not take all columns"),
     ("own:answer", "cannot be called 'answer'"),
     ("own:total", "cannot be called 'total'"), ("own:Callable", "has no source")],
)  # fmt: skip
def test_a_function_that_cannot_be_used_is_refused_before_anything_runs(module, path, says):
    body = """
def mine(completions, **columns): return []
def plain(completions): return []
def answer(completions, **columns): return []
def total(completions, **columns): return []
class Own:
    def __call__(self, completions, **columns): return []
Callable = Own()
"""
    module(body, rows=[])
    with pytest.raises(UserError) as caught:
        load_components(RewardsConfig(functions=(path,)), ImageConfig())
    assert says in str(caught.value)


def test_a_module_that_raises_is_the_users_mistake(module):
    with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError"):
        module("1 / 0")


def test_two_functions_of_one_name_are_refused(module):
    module("def mine(completions, **columns): return []", rows=[])
    with pytest.raises(UserError, match="the name is taken"):
        load_components(RewardsConfig(functions=("own:mine", "own:mine")), ImageConfig())
