"""Table of docs/families.md: what each family of models can, from the results of the tests that show it.

    pytest tests/families tests/engine/test_families.py tests/trainer tests/images/test_patches.py --junitxml=FILE
    python tests/support/family_table.py FILE … --write

`make families` does both, with the long tests among them.
"""

import re
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table of the tests -->\n", "<!-- end of the table -->"
COLUMNS = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5", "made_up": "made up"}
LOOPS, MADE_UP = "families/test_loops", "families/test_made_up"
ENGINE, TRAINER = "engine/test_families", "trainer/test_families"
ROWS = {
    "pixels are the processor's, byte for byte": [
        "images/test_patches::test_patches_of_a_view_are_those_of_the_image_processor",
        f"{MADE_UP}::test_pixels_are_those_of_the_models_own_processor",
    ],
    "positions are transformers'": [
        "trainer/test_packing::test_positions_are_those_of_get_rope_index",
        f"{MADE_UP}::test_positions_are_those_of_get_rope_index",
    ],
    "padded rows are single rows, values and gradients": [
        "trainer/test_packing::test_batched_logps_and_gradients_are_those_of_single_forward_passes_of_transformers",
        f"{MADE_UP}::test_batches_packed_rows_and_single_ones_are_the_models_own_forward",
    ],
    "rows that share prompts are single rows": [
        "trainer/test_sharing::test_packed_groups_are_single_rows",
        f"{MADE_UP}::test_batches_packed_rows_and_single_ones_are_the_models_own_forward",
    ],
    "the engine's prompts are ours, its log-probabilities the trainer's": [
        f"{ENGINE}::test_log_probabilities_are_the_trainers",
    ],
    "the engine has every part of the architecture": [f"{ENGINE}::test_the_server_has_every_part_of_its_family"],
    "weights are replaced in place, merged adapters too": [f"{ENGINE}::test_weights_are_replaced_in_place"],
    "four judges score its images": [
        f"{LOOPS}::test_all_judges_have_a_value",
    ],
    "GRPO steps in full, from the stored policy bit by bit": [
        f"{LOOPS}::test_a_stored_policy_trains_on_bit_by_bit",
        f"{MADE_UP}::test_a_stored_policy_trains_on_bit_by_bit",
    ],
    "GRPO steps with LoRA, merged and played": [
        f"{LOOPS}::test_an_adapter_is_trained_merged_and_played",
        f"{MADE_UP}::test_a_merged_adapter_is_the_policy",
    ],
    "adapters reach every linear layer": [f"{TRAINER}::test_an_adapter_reaches_every_linear_layer_and_is_merged"],
    "the export renders what was trained": [
        f"{LOOPS}::test_the_export_renders_what_was_trained",
        f"{MADE_UP}::test_the_export_renders_what_was_trained",
    ],
    "attention is read where it can be": [
        "trainer/test_relative_attention::test_it_reads_what_transformers_eager_attention_shows",
        f"{MADE_UP}::test_rules_and_attention_score_and_the_trainer_agrees_with_transformers",
    ],
    "FSDP2: two processes are one": [
        "trainer/test_sharded_loading::test_a_step_with_a_head_of_its_own_is_that_of_one_process",
    ],
    "memory of a step is predicted within 15 %": [
        "trainer/test_preflight::test_the_peak_is_predicted_within_15_percent"
    ],
    "another grid or mean in its files is refused": [
        f"{TRAINER}::test_files_that_state_other_values_than_the_family_are_refused",
        f"{MADE_UP}::test_other_values_in_its_files_are_refused",
    ],
}
"""What is shown -> the tests that show it, "folder/file::function"."""


def read_results(paths: Iterable[Path]) -> dict[tuple[str, str], bool]:
    """Return (test, family) -> True where all of its cases of the family have passed, from JUnit files."""
    results: dict[tuple[str, str], bool] = {}
    for case in chain.from_iterable(ElementTree.parse(path).iter("testcase") for path in paths):
        if case.find("skipped") is not None:
            continue
        file = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        name, _, parameters = case.get("name", "").partition("[")
        families = [name for name in COLUMNS if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", parameters)]
        passed = case.find("failure") is None and case.find("error") is None
        for family in ["made_up"] if file == MADE_UP else families:
            key = f"{file}::{name}", family
            results[key] = results.get(key, True) and passed
    return results


def render(results: dict[tuple[str, str], bool]) -> str:
    """Return the table: "yes" where the tests have passed, "FAILS" where one has not, "–" where there is none."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for label, tests in ROWS.items():
        cells = []
        for family in COLUMNS:
            outcomes = [results[test, family] for test in tests if (test, family) in results]
            cells.append(("yes" if all(outcomes) else "FAILS") if outcomes else "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replace_table(text: str, table: str) -> str:
    """Return the page with another table."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:] if argument != "--write"]
    table = render(read_results(files))
    if "--write" in sys.argv:
        DOCS.write_text(replace_table(DOCS.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)
