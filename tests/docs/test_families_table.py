"""The table of docs/families.md is that which the tests' results give, and names tests that there are."""

import ast
from pathlib import Path

import pytest
from family_table import BEGIN, COLUMNS, DOCS, END, ROWS, read_results, render, replace_table

TESTS = Path(__file__).parents[1]
CASES = [
    ("engine.test_families", "test_log_probabilities_are_the_trainers[qwen3_vl]", ""),
    ("engine.test_families", "test_weights_are_replaced_in_place[a-qwen3_vl]", ""),
    ("engine.test_families", "test_weights_are_replaced_in_place[b-qwen3_vl]", "<error/>"),
    ("engine.test_families", "test_weights_are_replaced_in_place[qwen3_5]", "<skipped/>"),
    ("families.test_made_up", "test_positions_are_those_of_get_rope_index", ""),
]


@pytest.mark.parametrize("test", sorted({test for tests in ROWS.values() for test in tests}))
def test_each_test_of_the_table_is_there(test):
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_cell_is_what_all_cases_of_a_family_gave(tmp_path):
    cases = [f'<testcase classname="tests.{file}" name="{name}">{outcome}</testcase>' for file, name, outcome in CASES]
    (tmp_path / "results.xml").write_text(f"<testsuite>{''.join(cases)}</testsuite>")
    rows = dict(line.split(" | ", 1) for line in render(read_results([tmp_path / "results.xml"])).splitlines()[2:])
    assert rows["| the engine's prompts are ours, its log-probabilities the trainer's"] == "– | yes | – | – |"
    assert rows["| weights are replaced in place, merged adapters too"] == "– | FAILS | – | – |"
    assert rows["| positions are transformers'"] == "– | – | – | yes |"


def test_the_page_has_a_table_of_results_that_all_passed():
    text = DOCS.read_text(encoding="utf-8")
    table = text.partition(BEGIN)[2].partition(END)[0]
    lines = table.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {label}" for label in ROWS]
    assert lines[0] == "| | " + " | ".join(COLUMNS.values()) + " |" and "FAILS" not in table
    assert replace_table(text, table) == text
