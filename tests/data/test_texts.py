"""Texts of records are freed of what public data sets put around them, never silently to something else."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkimg.answers.right import read_choice
from thinkimg.data.fields import Fields
from thinkimg.data.refusal import Reason, RowRefused
from thinkimg.data.texts.tidy import tidy
from thinkimg.records import AnswerType

COLOURS = ["red", "blue", "green", "yellow"]
LAYOUTS = {
    "A) one per line": lambda letter, text: f"\n{letter}) {text}",
    "(A) one per line": lambda letter, text: f"\n({letter}) {text}",
    "A. one per line": lambda letter, text: f"\n{letter}. {text}",
    "A.x one per line": lambda letter, text: f"\n{letter}.{text}",
    "A: one per line": lambda letter, text: f"\n{letter}: {text}",
    "list": lambda letter, text: f"\n- {letter}) {text}",
    "bold": lambda letter, text: f"\n**{letter}.** {text}",
    "Option A:": lambda letter, text: f"\nOption {letter}: {text}",
    "dash": lambda letter, text: f"\n{letter} - {text}",
    "(a) one per line": lambda letter, text: f"\n({letter.lower()}) {text}",
    "(A) in line": lambda letter, text: f" ({letter}) {text}",
    "(A), in line": lambda letter, text: f" ({letter}) {text},",
    "A. in line": lambda letter, text: f" {letter}. {text}",
    "A: in line": lambda letter, text: f" {letter}: {text}",
    "A) in line": lambda letter, text: f" {letter}) {text}",
    "full width": lambda letter, text: f"（{letter}）{text}",
}
LEAD_INS = [
    "",
    "\nChoices:",
    "\nOptions:",
    " Options:",
    "\nOptions:\n",
    "\nThe options are:",
    "\nThere are several options:",
    "\nThe choices are listed below",
]
INSTRUCTIONS = [
    "Answer with the option's letter from the given choices directly.",
    "Please answer directly with a single word or phrase",
    "Answer the question using a single word or phrase.",
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter"
    " (A, B, C, D, or E) of the correct option.\nThe best answer is:",
    "Please provide the correct option letter, e.g., A, B, C, D, at the end.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The"
    " reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.",
    "Think first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think> "
    " <tool_call>...</tool_call> (if tools needed)  <answer>...</answer> ",
    "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags.",
    "Answer:",
    "Please provide your answer by stating the letter followed by the full option.",
    "Respond with the letter directly: A, B, or C.",
    "Your response should be just the letter.",
    "Please answer directly with only the letter of the correct option and nothing else.",
    "First perform reasoning, then finally select the question from the choices in the following format: Answer: xxx.",
    '### User Image Path: "/somewhere/x.png"',
]
UNTOUCHED_QUESTIONS = [
    "Which point is (A)?",
    "Is it (A) red or (B) blue?",
    "Which one is it? (A) red or (B) blue",
    "Which of these: (A) red, (B) blue?",
    "What is the sum of P(A) and P(B)?",
    "Is the angle between (A) and (B) right?",
    "There is a sign. Write the letter shown on the blue sign.",
    "The circle has radius 3. Find its area and put it in \\boxed{}.",
    "Tell me what the answer is",
    "There is a sign. Answer in one word what it says.",
    "Who is named on the cover, A. C. Monk or B. King?",
    "What comes first?\n(A) red\n(B) blue\n(D) green",
    "What comes first?\n(A) red\n(B) red",
    "Choose.\n(A) red\n(B) blue. Which one is it, seen from the left?",
    "(A) red\n(B) blue\nWhich of these does the sign show?",
    "How many of these hold?\n1. It is red\n2. It is blue\n3. It is wet",
    "Answer the question using a single word or phrase.",
]
WRAPPED = {
    "<answer>7</answer>": "7",
    "<think>Let me <answer>8</answer> count …</think>\n\n<answer> 7 </answer>": "7",
    "<think>Let me count …</think> 7": "7",
    r"\boxed{7}": "7",
    r"$\boxed{\frac{3}{4}}$": r"\frac{3}{4}",
    r"So x is \boxed{\{1, 2\}}.": r"\{1, 2\}",
    r"\boxed{7} is right: \boxed{7}": "7",
    r"\boxed{\text{a cat}}": "a cat",
    r"<answer>\boxed{7}</answer>": "7",
    r"\boxed{['3', 'three']}": ["3", "three"],
    r"""\boxed{["3", 'it\'s']}""": ["3", "it's"],
    "<|begin_of_box|>7<|end_of_box|>": "7",
    " 7 ": "7",
    "**Final Answer:** 7": "7",
    "**Final answer**: 7": "7",
    "Answer: 7": "7",
    "The correct answer is: **7**": "7",
    "Therefore, the answer is 7.": "7",
    "**7**": "7",
    "3 and 4 are 7.\n#### 7": "7",
    "<SUMMARY>I count.</SUMMARY>\n\n<CONCLUSION> 7 </CONCLUSION>": "7",
    r"\boxed{[2007, 2008]}": "[2007, 2008]",
}
NO_ANSWERS = [
    r"\boxed{7",
    r"\boxed{}",
    r"\boxed{7} or \boxed{8}",
    "<answer></answer>",
    "<answer>7",
    "7</answer>",
    "<think>hm",
    "<|begin_of_box|>7",
    "[{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': '7'}]",
    '[{"role": "user", "content": "What?"}]',
    [{"role": "user", "content": "What?"}],
]
PLACEHOLDERS = [
    "<image>", "<image 1>", "<image1>", "<image_0>", "<|image_1|>", "<|image|>", "<img>", "<ImageHere>", "[IMAGE]",
    "[IMG]", "<|image_pad|><|image_pad|>", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
    "<image_placeholder>", "<img>photos/1.jpg</img>", "<start_of_image>",
]  # fmt: skip


def make(question: object = "What?", answer: object = "x", images: object = "photo.jpg", **further) -> Fields:
    return Fields(question=question, images=images, answer=answer, **further)


def refusal(fields: Fields) -> str:
    with pytest.raises(RowRefused) as caught:
        tidy(fields)
    return caught.value.reason


@pytest.mark.parametrize("lead_in", LEAD_INS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 4, 10])
def test_options_are_read_from_the_question(layout, lead_in, count):
    texts = [f"{colour} {number}" for number in range(3) for colour in COLOURS][:count]
    written = "".join(
        LAYOUTS[layout](letter, text) for letter, text in zip(string.ascii_uppercase, texts, strict=False)
    )
    letter, right = string.ascii_uppercase[count - 1], texts[count - 1]
    for answer in (letter, f"({letter})", f"{letter}. {right}", f"（{letter}）{right}", right, right.upper()):
        tidied = tidy(make(f"What color is it?{lead_in}{written.rstrip(',')}", answer))
        assert tidied.question == "What color is it?"
        assert list(tidied.choices) == texts
        assert tidied.answer_type is AnswerType.CHOICE
        text = str(tidied.answer)
        assert read_choice(text, text, tidied.choices, "any", ambiguous=False) == right


@pytest.mark.parametrize("answer", ["x", "E", "A, B", "D. red", 1, None, ["A", "purple"]])
def test_options_stay_where_the_answer_names_none_of_them(answer):
    fields = make("What color?\n(A) red\n(B) blue", answer)
    assert tidy(fields) == fields


def test_a_line_with_several_options_is_cut_into_them():
    assert tidy(make("What color?\n(A) red (B) blue\n(C) green (D) yellow", "D")).choices == COLOURS
    assert tidy(make("What color? A. red\nB. blue\nC. green D. yellow", "D")).choices == COLOURS


def test_numbered_lines_are_options_only_for_an_answer_by_text():
    question = "What holds?\n1. It is red\n2. It is blue"
    assert tidy(make(question, "2")).question == question
    assert tidy(make(question, "It is blue")).choices == ["It is red", "It is blue"]


@pytest.mark.parametrize("question", UNTOUCHED_QUESTIONS)
@pytest.mark.parametrize("answer", ["A", "B", "2", "red"])
def test_a_question_that_is_only_like_one_with_options_or_instructions_stays(question, answer):
    fields = make(question, answer)
    assert tidy(fields) == fields


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instructions_on_the_form_of_the_answer_go(instruction):
    for question in ("What is it?", "Find x.", "What is it"):
        tidied = tidy(make(f"{question}\n{instruction}"))
        assert tidied.question == question
        assert tidied.changes
    tidied = tidy(make(f"What is it?\n(A) red\n(B) blue\n{instruction}", "B"))
    assert (tidied.question, tidied.choices) == ("What is it?", ["red", "blue"])


def test_instructions_before_the_question_go():
    assert tidy(make("Answer with one word: which color is it")).question == "which color is it"
    thinks = INSTRUCTIONS[6]
    assert tidy(make(f"<image>\n{thinks}\nQuestion:\nFind x.")).question == "Find x."
    hint = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    tidied = tidy(make(f"{hint}\nQuestion: How wide?\nChoices:\n(A) 135°\n(B) 140°", "B"))
    assert (tidied.question, tidied.choices) == ("How wide?", ["135°", "140°"])


def test_further_instructions_after_the_options_are_kept():
    tidied = tidy(make("What color?\nA) red\nB) blue\nUse the legend on the left.", "B"))
    assert (tidied.question, tidied.choices) == ("What color?\nUse the legend on the left.", ["red", "blue"])


@pytest.mark.parametrize("form", ["({}) {}", "{}. {}", "{}: {}", "{}) {}", "（{}）{}", "{}、{}"])
def test_choices_lose_their_letters_and_answers_still_name_them(form):
    lettered = [form.format(letter, colour) for letter, colour in zip("ABCD", COLOURS, strict=True)]
    for answer in ("B", "(B)", lettered[1], "blue", "B. blue"):
        tidied = tidy(make(answer=answer, choices=lettered))
        assert tidied.choices == COLOURS
        text = str(tidied.answer)
        assert read_choice(text, text, COLOURS, "any", ambiguous=False) == "blue"


@pytest.mark.parametrize(
    "choices", [["(A) red", "blue"], ["(A) red", "(C) blue"], ["A. x", "B. x"], ["(B) x", "(A) y"]]
)
def test_choices_whose_letters_do_not_count_from_a_keep_them(choices):
    assert tidy(make(choices=choices)).choices == choices


@pytest.mark.parametrize(
    "choices",
    ['["red", "it\'s"]', """['red', "it's"]""", {"A": "red", "B": "it's"}, "(A) red (B) it's", "A. red\nB. it's",
     {"label": ["A", "B"], "text": ["red", "it's"]}, '{"A": "red", "B": "it\'s"}', """{'a': 'red', 'b': "it's"}""",
     [{"label": "A", "text": "red"}, {"label": "B", "text": "it's"}], [{"v": "red", "k": "a"}, {"v": "it's", "k": "b"}],
     '[{"key": "A", "value": "red"}, {"key": "B", "value": "it\'s"}]', {"A": "red", "B": "it's", "C": None, "D": ""},
     '{"A": "red", "B": "it\'s", "C": null}', ["red", "it's", None, float("nan"), " "]],
)  # fmt: skip
def test_choices_that_are_written_out_or_mapped_become_a_list(choices):
    assert tidy(make(choices=choices)).choices == ["red", "it's"]


def test_numbers_in_objects_are_choices():
    assert tidy(make(choices=[{"k": "A", "v": 5}, {"k": "B", "v": 0.5}])).choices == [5, 0.5]


@pytest.mark.parametrize("text", ["nan", "NaN", "NAN", " nan", "None", "null", "inf", "0"])
def test_a_last_option_that_reads_like_nothing_is_an_option(text):
    options = ["1", "2", text]
    written = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
    for choices in (options, json.dumps(options), dict(zip("ABC", options, strict=True)), written):
        assert [option.strip() for option in tidy(make(choices=choices)).choices] == [*options[:2], text.strip()]


@pytest.mark.parametrize(
    "choices",
    ["1. red\n2. blue", '{"1": "red", "2": "blue"}', [{"a": "red", "b": "blue"}], [{"k": "A", "v": 1}, {"k": "B"}],
     [{"key": "B", "text": "red"}, {"key": "A", "text": "blue"}], "red, blue", "{1, 2}", "[1, 2", "(A, B)"],
)  # fmt: skip
@pytest.mark.parametrize("answer", ["1", 1])
def test_choices_whose_numbers_an_answer_may_mean_or_without_letters_stay_as_they_are(choices, answer):
    assert tidy(make(answer=answer, choices=choices)).choices == choices


def test_choices_of_letters_only_take_their_texts_from_the_question():
    tidied = tidy(make("What color?\nA. red\nB. blue", "B", choices=["A", "B"]))
    assert (tidied.question, tidied.choices, tidied.answer) == ("What color?", ["red", "blue"], "B")


def test_a_question_does_not_repeat_the_choices():
    question = "What color?\nA. Red\nB. blue"
    assert tidy(make(question, "B", choices=["red", "blue"])).question == "What color?"
    assert tidy(make(question, "blue", choices=["blue", "red"])).question == "What color?"
    assert tidy(make(question, "B", choices=["red", "green"])).question == question
    assert refusal(make(question, "B", choices=["blue", "red"])) == Reason.CHOICES


def test_a_letter_that_contradicts_its_text_is_left_to_be_refused():
    tidied = tidy(make(answer="A. blue", choices=["red", "blue"]))
    assert tidied.answer == "A. blue"
    with pytest.raises(ValueError, match="none of the choices"):
        read_choice("A. blue", "A. blue", ["red", "blue"], "any", ambiguous=False)


def test_choices_that_are_letters_stay_ambiguous():
    tidied = tidy(make(answer="A", choices=["B", "A"]))
    assert (tidied.answer, tidied.choices) == ("A", ["B", "A"])
    assert tidy(make(answer="A. B", choices=["B", "A"])).answer == "A. B"


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_answers_are_unwrapped(wrapped):
    assert tidy(make(answer=wrapped)).answer == WRAPPED[wrapped]
    assert tidy(make(answer=[wrapped])).answer == WRAPPED[wrapped]
    expected = WRAPPED[wrapped]
    further = expected if isinstance(expected, list) else [expected]
    assert tidy(make(answers=["y", wrapped])).answers == ["y", *further]


@pytest.mark.parametrize(("answer", "expected"), [(True, ["Yes", "True"]), ([False], ["No", "False"])])
def test_true_and_false_are_yes_and_no_unless_there_are_choices(answer, expected):
    assert tidy(make(answer=answer)).answer == expected
    assert tidy(make(answer=answer, choices=["True", "False"])).answer == (answer if answer is True else False)


def test_a_list_of_texts_in_a_text_is_several_answers_where_no_type_is_stated():
    assert tidy(make(answer="['a', \"it's\"]")).answer == ["a", "it's"]
    stated = make(answer="['a', 'b']", answer_type=AnswerType.EXACT)
    assert tidy(stated) == stated
    several = make(answer="['a', 'b']", choices=["a", "b", "c"])
    assert tidy(several).answer == "['a', 'b']"  # all of them, perhaps


@pytest.mark.parametrize("length", [4, 60_000])
def test_pictures_that_a_text_lists_are_several(length):
    names = ["/9j/" + "A" * length, "/9j/" + "B" * length]
    assert tidy(make("Compare <image> and <image>.", images=str(names))).images == names
    assert tidy(make(images="[draft] a.jpg")).images == "[draft] a.jpg"


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_wrapping_without_one_answer_is_refused(answer):
    assert refusal(make(answer=answer)) == Reason.ANSWER


def test_a_question_that_is_a_conversation_is_refused():
    assert refusal(make('[{"role": "user", "content": "What?"}]')) == Reason.TEXT


@pytest.mark.parametrize(
    "answer",
    ["red", "(red)", "A. C. Monk", "[2007, 2008]", "['a' 'b']", "x < 3", "Answers", "the answer", "**", "2 ** 3 ** 4",
     "Answer:", "{1, 2}", "f(x)", 3, 3.5, None, b"x",
     [1, 2, 3, 4], ["a", "b"], [], {"a": 1}],
)  # fmt: skip
def test_other_answers_stay(answer):
    assert tidy(make(answer=answer)) == make(answer=answer)


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_placeholders_go_or_become_words(placeholder):
    for text in (f"{placeholder}\nWhat is it?", f"{placeholder}What is it?", f"What is it?\n{placeholder}",
                 f"What is it? {placeholder}", f"{placeholder} What is it?"):  # fmt: skip
        tidied = tidy(make(text))
        assert (tidied.question, tidied.changes) == ("What is it?", ("placeholders of images removed",))
    tidied = tidy(make(f"What is in {placeholder}?"))
    assert (tidied.question, tidied.changes) == ("What is in the image?", ("placeholders of images put into words",))
    assert refusal(make(f"{placeholder}What is it?", images=["a", "b"])) == Reason.PLACEHOLDERS


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Look at the <image>. What is it?", "Look at the image. What is it?"),
        ("<image> shows a cat. Where?", "The image shows a cat. Where?"),
        ("Here is a chart. <image> What is the peak?", "Here is a chart. What is the peak?"),
        ("Find x.\n<image>\nGive y.", "Find x.\nGive y."),
        ("What is in <image>", "What is in the image"),
        ("<image>is the sky dark?", "is the sky dark?"),
        ("<image 1>\nWhat is in <image 1>?", "What is in the image?"),
        ("What is ![x](image)?", "What is ![x](image)?"),
        ("What is <image_title>?", "What is <image_title>?"),
    ],
)
def test_a_placeholder_inside_a_sentence_becomes_words(question, expected):
    assert tidy(make(question)).question == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image><image>\nWhich?", "Which?"),
        ("<image>\n<image>\nWhich?", "Which?"),
        ("Is <image> like <image>?", "Is image 0 like image 1?"),
        ("Is <image 2> like <image 1>?", "Is image 1 like image 0?"),
        ("Is <image_1> like <image_0>?", "Is image 1 like image 0?"),
        ("<image> is old and <image> is new. Why?", "Image 0 is old and image 1 is new. Why?"),
        ("Image-1: <image>\nImage-2: <image>\nWhich?", "Image-1: image 0\nImage-2: image 1\nWhich?"),
        ("<image 1>\nWhat is in <image 2>?", "What is in image 1?"),
    ],
)
def test_several_pictures_are_named_by_the_numbers_of_the_prompt(question, expected):
    assert tidy(make(question, images=["a", "b"])).question == expected


def test_choices_may_be_pictures():
    by_question = tidy(make("Which?\nA. <image 1>\nB. <image 2>", "B", images=["a", "b"]))
    assert (by_question.choices, by_question.answer) == (["Image 0", "Image 1"], "B")
    by_column = tidy(make("Which?", "<image 2>", images=["a", "b"], choices=["<image 1>", "<image 2>"]))
    assert (by_column.choices, by_column.answer) == (["Image 0", "Image 1"], "Image 1")


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("<image><image>Which?", "a"),
        ("<image>Which?", ["a", "b"]),
        ("<image 1>Which?", ["a", "b"]),
        ("<image 2>Which?", "a"),
        ("<image 1> or <image 3>?", ["a", "b"]),
        ("<image> or <image 1>?", ["a", "b"]),
        ("<video>Which?", "a"),
        ("Which?<audio>", "a"),
        ("<|video_pad|>Which?", "a"),
    ],
)
def test_placeholders_that_are_not_those_of_the_pictures_are_refused(question, images):
    assert refusal(make(question, images=images)) == Reason.PLACEHOLDERS


def test_a_placeholder_in_an_answer_is_refused():
    assert refusal(make("<image>Which?", "It is <image>")) == Reason.PLACEHOLDERS


PIECES = st.sampled_from(
    ["<image>", "<image 1>", "[IMG]", "<video>", "(A) ", "(B) ", "(C) ", "\nA. ", "\nB. ", "\nC) ", "B: ", "1. ", "red",
     "blue", "\n", " ", "?", ".", "Options:", "\nChoices:\n", "Answer:", *INSTRUCTIONS, "<answer>", "</answer>",
     "<think>", "\\boxed{", "}", "{", "['a', 'b']", "（A）", "（B）", "Question: ", "the ", "is ", "A", "B"]
)  # fmt: skip
TEXTS = st.text(max_size=60) | st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(TEXTS | JSON, TEXTS | JSON, JSON, st.none() | st.lists(TEXTS, max_size=4) | JSON, st.integers(0, 3))
@settings(max_examples=600, deadline=None)
def test_any_values_are_tidied_once_and_for_all_or_refused(question, answer, answers, choices, pictures):
    fields = make(question, answer, ["photo.jpg"] * pictures, answers=answers, choices=choices)
    try:
        tidied = tidy(fields)
    except RowRefused as refused:
        assert refused.reason in set(Reason)
        return
    assert repr(tidy(tidied)) == repr(tidied)  # equal, NaN as well
    if tidied == fields:
        assert tidied.changes == ()


LONG = [
    "<image>", "<", "[", "(A) ", "\nA. x", " A) (B) ", "\n", " ", "Answer:", "Answer with one word. ", "\\boxed{",
    "\\boxed{}", "<answer>", "<think>", "</answer>", "{", "'", "\\", "x", "<|vision_start|><|image_pad|>", "<img>",
    "['", "1.\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("piece", "length"), [*((piece, 300_000) for piece in LONG), ("x", 10_000_000), ("[", 10_000_000)]
)
def test_long_texts_take_time_in_proportion_to_their_length(piece, length):
    # A scan of the rest at each place would take many minutes.
    text = piece * (length // len(piece))
    for fields in (
        make(f"What? {text}", "A"),
        make("What?\n(A) x\n(B) y", text),
        make(f"{text}?", text, choices=["x", text]),
    ):
        try:
            tidy(fields)
        except RowRefused:
            continue
