"""Schemas of public data sets: each record is read by one schema, rightly, or refused with a reason."""

import copy
import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_rows import BASE64, CALL, IMAGE, ROWS, sharegpt, talk, verl

from thinkimg.answers.right import read_choice
from thinkimg.data.fields import Fields
from thinkimg.data.recognise import SCHEMAS
from thinkimg.data.records.values import claims, read_boxes
from thinkimg.data.refusal import Reason, RowRefused
from thinkimg.data.texts.literals import MAX_LITERAL_LENGTH, read_literal
from thinkimg.data.texts.tidy import tidy

NAMES = sorted(ROWS)
MODULES = {name: SCHEMAS[name] for name in SCHEMAS}
VALUES = ("question", "images", "answer", "answers", "choices", "answer_type", "targets", "box_form", "shuffle")
TEXTS = ["A", "<image>", "[1, 2, 3, 4]", "[" * 500, "{'a': 1}", "<answer>", "\\boxed{", "human", "x###[1]", "\ud800"]
LEAVES = st.none() | st.booleans() | st.just(10**400) | st.integers() | st.floats() | st.text() | st.sampled_from(TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "bbox", "x"]), inner)
    ),
    max_leaves=12,
)


def claiming(record):
    return [name for name, module in MODULES.items() if claims(module, record)]


def convert(name, record):
    """Return the fields of a record by a schema, or the RowRefused."""
    try:
        return MODULES[name].convert(record)
    except RowRefused as refused:
        return refused


def read(fields):
    """Return tidy fields, with the text of the right option for its letter."""
    fields = tidy(fields)
    if not fields.choices:
        return fields
    right = read_choice(fields.answer, str(fields.answer), fields.choices, "any", ambiguous=False)
    return dataclasses.replace(fields, answer=right)


def refusal(name, record):
    fields = convert(name, record)
    assert isinstance(fields, RowRefused), fields
    assert fields.reason == Reason.SCHEMA
    return fields.detail


def values(fields):
    return [getattr(fields, name) for name in VALUES]


def altered(name, **columns):
    """Return (schema, record) of a row with other values."""
    schema, record, _ = ROWS[name]
    return schema, copy.deepcopy(record) | columns


@pytest.mark.parametrize("name", NAMES)
def test_each_public_form_is_claimed_by_one_schema_and_read_as_the_set_means_it(name):
    schema, record, expected = ROWS[name]
    before = copy.deepcopy(record)
    assert claiming(record) == [schema]
    fields = MODULES[schema].convert(record)
    assert isinstance(fields, Fields) and record == before
    assert {key: getattr(read(fields), key) for key in expected} == expected


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_schema_refuses_the_records_of_all_others(name):
    for other, (schema, record, _) in ROWS.items():
        if schema != name:
            assert refusal(name, record), other


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_two_schemas_with_empty_columns_is_read_as_before_or_refused(name):
    schema, record, _ = ROWS[name]
    alone = MODULES[schema].convert(record)
    for other in NAMES:
        mixed = dict.fromkeys(ROWS[other][1]) | record
        for claimant in claiming(mixed):
            fields = convert(claimant, mixed)
            assert isinstance(fields, RowRefused) or values(fields) == values(alone), (claimant, other)


@pytest.mark.parametrize("name", NAMES)
def test_renamed_or_nested_columns_are_no_longer_of_the_schema(name):
    schema, record, _ = ROWS[name]
    module = MODULES[schema]
    sets = [columns for columns in module.COLUMNS if all(column.partition(".")[0] in record for column in columns)]
    for column in set.intersection(*map(set, sets)):
        head = column.partition(".")[0]
        renamed = {f"my_{key}" if key == head else key: value for key, value in record.items()}
        if not any(set(map(lambda c: c.partition(".")[0], columns)) <= renamed.keys() for columns in module.COLUMNS):
            assert schema not in claiming(renamed)
            assert head in refusal(schema, renamed) or "has no" in refusal(schema, renamed)
    assert claiming({"data": record}) == []
    assert refusal(schema, {"data": record})


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_any_value_in_any_column_gives_fields_or_a_refusal(data):
    schema, record, _ = ROWS[data.draw(st.sampled_from(NAMES))]
    columns = data.draw(st.lists(st.sampled_from(sorted(record)), min_size=1, max_size=3, unique=True))
    changed = record | {column: data.draw(JSON) for column in columns}
    for name, module in MODULES.items():
        claims(module, changed)
        fields = convert(name, changed)
        assert isinstance(fields, Fields) or (fields.reason == Reason.SCHEMA and fields.detail)


def places(value, path=()):
    """Yield the paths of all values inside a value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def put(value, path, new):
    """Return a value with another one at a path."""
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_any_value_at_any_depth_gives_fields_or_a_refusal(data):
    schema, record, _ = ROWS[data.draw(st.sampled_from(NAMES))]
    for _ in range(data.draw(st.integers(1, 2))):
        record = put(record, data.draw(st.sampled_from(sorted(places(record), key=repr))), data.draw(JSON))
    fields = convert(schema, record)
    assert isinstance(fields, Fields) or (fields.reason == Reason.SCHEMA and fields.detail)


def test_deeply_nested_values_give_fields_or_a_refusal():
    deep = []
    for _ in range(3000):
        deep = [deep]
    objects = {}
    for _ in range(3000):
        objects = {"image": objects, "content": objects, "bbox": objects}
    for schema, record, _ in ROWS.values():
        for column in record:
            for value in (deep, objects):
                assert isinstance(convert(schema, record | {column: value}), Fields | RowRefused)


@given(st.dictionaries(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1).map("my_".__add__), JSON))
@settings(max_examples=200, deadline=None)
def test_records_of_other_columns_are_of_no_schema(record):
    assert claiming(record) == []
    assert all(refusal(name, record) for name in MODULES)


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.jpg", "question": "What?", "answer": "red"},
        {"image": "a.jpg", "question": "What?", "answer": "A", "choices": ["red", "blue"], "id": 1},
        {"image": "a.jpg", "question": "Where?", "xywh": [1, 2, 3, 4], "qwen": '{"bbox_2d": [1, 2, 3, 4]}'},
        {"file_name": "a.jpg", "question": "What?", "answer": "red"},
        {"images": ["a.jpg"], "prompt": "What?", "answer": "red"},
        {"image": "a.jpg", "text": "a red sign", "category": "signs", "label": "red"},
        {"image": "a.jpg", "label": 3},
    ],
)
def test_tables_with_names_of_roles_are_left_to_the_columns(record):
    assert claiming(record) == []


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_make_a_sample_are_not_kept_as_the_users_own(name):
    schema, record, _ = ROWS[name]
    module = MODULES[schema]
    fields = module.convert(record)
    for column in record:
        other = module.convert if column in module.READS else None
        if other is None:
            changed = convert(schema, record | {column: "other"})
            same = ("question", "images", "answer", "choices", "targets")
            if isinstance(changed, Fields) and column != "dataset":
                assert [getattr(changed, key) for key in same] == [getattr(fields, key) for key in same], column


@pytest.mark.parametrize(
    ("name", "columns", "detail"),
    [
        ("pixel reasoner", {"is_video": True}, "a video"),
        ("swift", {"messages": talk("<image>What?", "red", "Where?", "left")}, "2 answers to 2 questions"),
        ("swift", {"messages": talk("<image>What?", "<answer>a</answer>", "Now?", "<answer>b</answer>")}, "2 answers"),
        ("swift", {"messages": [*talk("<image>What?"), *talk("Where?", "left")]}, "1 answers to 2 questions"),
        ("swift", {"messages": talk("<image>What?", CALL)}, "ends with a call"),
        ("swift", {"messages": talk("<image>What?", "red", "Thanks")}, "does not end with an answer"),
        ("swift", {"videos": ["a.mp4"]}, "a video"),
        ("swift query", {"history": [["a", "b"]]}, "a history"),
        ("trl", {"prompt": [*talk("What?"), *talk("Where?")]}, "2 turns"),
        ("swift grounding", {"messages": talk("<image>What is at <bbox>?", "a sign")}, "the question holds a box"),
        ("swift grounding", {"messages": talk("<image>Find all.", "<bbox><bbox>")}, "not one box"),
        ("swift grounding", {"objects": None}, "places of objects"),
        ("swift grounding", {"objects": None, "messages": talk("<image>Is there a <ref-object>?", "no")}, "places of"),
        ("swift grounding", {"messages": talk("<image>Find it.", "It is at <bbox>.")}, "not one box"),
        ("swift grounding", {"objects": {"ref": ["a"], "bbox": [[1, 2]]}}, "boxes of four numbers"),
        ("swift grounding", {"objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm9"}}, "neither in"),
        ("swift grounding", {"objects": {"bbox": [[1, 2, 3, 4]]}}, "0 names of objects"),
        ("swift grounding", {"objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}}, "not one box"),
        ("swift", {"objects": {"ref": [], "bbox": []}}, "no box, although"),
        ("deepeyes chart", {"reward_model": {"ground_truth": "B"}}, "different right answers"),
        ("vtool", {"reward_model": {"ground_truth": "a|||b"}}, "2 parts"),
        ("open-r1", {"original_answer": "B"}, "different right answers"),
        ("r1-v", {"answer": "4"}, "different right answers"),
        ("hr-bench", {"C": None}, "a later one is not"),
        ("hr-bench", {"A": "", "B": "", "C": "", "D": ""}, "no options"),
        ("treebench", {"target_instances": "[[1, 2, 3]]"}, "boxes of four numbers"),
        ("treebench", {"target_instances": "__import__('os').system('false')"}, "no list of boxes"),
        ("v*", {"options": ["red"]}, "no two options"),
        ("v*", {"bbox": "near the door"}, "no list of boxes"),
        ("visual-cot llava", {"conversations": sharegpt("<image>What?", "red")}, "not a question, a box"),
        ("gqa", {"image": None}, "not joined"),
        ("mathvista choice", {"choices": None}, "no choices"),
        ("mathvista float", {"precision": 1.5}, "decimal places"),
        ("mini-o3 cold start", {"conversations": str(sharegpt("<image>What?", "[1]", "<image>", "[2]"))}, "answers"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_reason(name, columns, detail):
    assert detail in refusal(*altered(name, **columns))


def test_unknown_instructions_of_another_system_are_refused_unless_the_question_has_a_column():
    prompt = "Use <tool_call> to look closer.\nWhat color is the sign?"
    assert "instructions" in refusal("verl", verl(prompt, "red"))
    fields = convert("verl", verl(f"<image>{prompt}", "red", question="What color is the sign?"))
    assert fields.question == "<image>What color is the sign?"
    assert "instructions" in refusal("messages", {"messages": talk(f"<image>{prompt}", "red"), "images": ["a.jpg"]})


def test_a_questions_own_column_is_not_taken_where_it_lacks_the_options_or_is_another_question():
    prompt = "<image>\nWhich?\n(A) red\n(B) blue"
    for column in ("Which?", "What is behind the door?", "", None, 3):
        for text in (prompt, "Which? Options: A. red B. blue"):
            assert convert("verl", verl(text, "A", question=column)).question == text


def test_a_questions_own_column_is_taken_out_of_other_words_and_other_spaces():
    prompt = "<image>\nAs an expert, use <tool_call>.\nWhich  sign is\n red?\nBe brief."
    fields = convert("verl", verl(prompt, "A", question="<image>Which sign is red?"))
    assert fields.question == "<image>Which sign is red?"


def test_calls_of_tools_between_a_question_and_its_answer_are_left_out():
    turns = [
        {"role": "user", "content": "<image><image>Which differs?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "zoom"}]},
        {"role": "tool", "content": "<image>"},
        {"role": "assistant", "content": "the left one"},
    ]
    fields = convert("messages", {"messages": turns, "images": ["a.jpg", "b.jpg", "crop.jpg"]})
    assert (fields.images, fields.answer) == (["a.jpg", "b.jpg"], "the left one")
    turns[0]["content"] = "Which differs?"
    assert "unclear" in refusal("messages", {"messages": turns, "images": ["a.jpg", "b.jpg", "crop.jpg"]})


def test_images_inside_a_conversation_are_those_of_the_question():
    content = [{"type": "image", "image": "a.jpg"}, {"type": "image_url", "image_url": {"url": BASE64}}, "Which?"]
    fields = convert("messages", {"messages": [{"role": "user", "content": content}, *talk("", "left")[1:]]})
    assert fields.images == ["a.jpg", {"url": BASE64}]
    assert fields.question == "<image>\n<image>\nWhich?"


@pytest.mark.parametrize(
    ("question", "label", "kind"),
    [
        ("In which year did sales peak?", "2010", "integer"),
        ("When was it?", ["1985"], "integer"),
        ("How many were sold?", "2010", "number"),
        ("In which year did it fall by 3.2?", "3.2", "number"),
        ("What share?", "45%", "number"),
        ("Is it higher?", "Yes", "number"),
        ("Which years?", "[2007, 2008]", "number"),
    ],
)
def test_years_of_charts_are_exact_and_other_numbers_within_five_percent(question, label, kind):
    fields = convert(*altered("chartqa", query=question, label=label))
    assert (fields.answer_type, fields.tolerance) == (kind, 0.05 if kind == "number" else None)


def test_sentences_are_for_a_judge_and_short_answers_of_the_same_set_are_not():
    assert convert("verl", verl("<image>What?", "It is a red sign.", source="vstar")).answer_type == "judge"
    assert convert("verl", verl("<image>What?", "red", source="vstar")).answer_type is None


@given(JSON)
def test_what_python_and_json_write_is_read_as_it_was(value):
    for text in (repr(value), str([value])):
        assert read_literal(text) is not None
    assert read_literal(str([{"a": "it's", "b": [1, 2.5, None, True]}])) == [{"a": "it's", "b": [1, 2.5, None, True]}]


@pytest.mark.parametrize(
    ("gold", "is_maths"),
    [("5", True), ("-0.5", True), ("3/4", True), ("1,234.5", True), ("3:4", True), ("x=3", True), ("60^\\circ", True),
     ("$12$", True), ("12 cm", False), ("$5", False), ("50 %", False), ("2 million", False), ("1.5e3", False),
     ("60°", False), ("B", False), ("Yes", False), ("triangle ABC", False), (5, False)],
)  # fmt: skip
def test_bare_numbers_and_formulas_of_mathematical_rows_are_maths_and_numbers_with_units_are_numbers(gold, is_maths):
    record = verl("<image>\nFind it.", gold) | {"ability": "math"}
    assert convert("verl", record).answer_type == ("maths" if is_maths else None)
    assert convert("verl", record | {"ability": "vl_chat"}).answer_type is None


def test_texts_of_lists_are_read_up_to_a_length_and_never_run(tmp_path):
    mark = tmp_path / "mark"
    for text in (
        f"[open({str(mark)!r}, 'w')]",
        "[1] + [2]",
        "[" * 5000,
        "[" * 5000 + "]" * 5000,
        "[" + "9" * 9000 + "]",
    ):
        assert read_literal(text) == text
    assert not mark.exists()
    long = "[" + "1," * MAX_LITERAL_LENGTH + "1]"
    assert read_literal(long) == long
    assert read_literal("(see the table)") == "(see the table)"


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3, 4], [[1, 2, 3, 4]], "[1, 2, 3, 4]", "[[1, 2, 3, 4]]", [{"bbox": [1, 2, 3, 4], "name": "x"}],
        {"bbox_2d": [1, 2, 3, 4]}, "[{'bbox': [1, 2, 3, 4]}]", {"x1": 1, "y1": 2, "x2": 3, "y2": 4},
    ],
)  # fmt: skip
def test_boxes_are_read_in_all_forms(value):
    assert read_boxes(value, "boxes") == ((1, 2, 3, 4),)


@pytest.mark.parametrize(
    "value", [[1, 2, 3], [True, 2, 3, 4], [float("nan")] * 4, [10**400] * 4, "1,2,3,4", {"x1": 1}, 3]
)
def test_what_is_no_box_is_refused(value):
    with pytest.raises(RowRefused):
        read_boxes(value, "boxes")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_schema_defines_what_its_contract_says(name):
    module = MODULES[name]
    assert type(module.VERSION) is int and module.TITLE and IMAGE
    assert all(isinstance(columns, set) and columns for columns in module.COLUMNS)
    heads = {column.partition(".")[0] for columns in module.COLUMNS for column in columns}
    kept = {"category", "type", "doc_id", "image_names", "target_object", "questionId", "fullAnswer", "lecture"}
    assert heads - module.READS <= kept  # these say which schema it is, and stay the user's own
    assert all(re.fullmatch(r"[\w -]+", column) for column in module.READS)
