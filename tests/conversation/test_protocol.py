"""The protocols: every text parses to something, what we render is read back, and nothing hostile gets through."""

import json
import math
import time

import pytest
from chat_codecs import stock_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.protocol import IMAGE_PART, PROTOCOLS, UNITS, Answer, Malformed, ToolCall, load_protocol
from thinkimg.conversation.protocols.qwen_xml import render_value
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.images.toolbox import load_tools
from thinkimg.models.family import list_families

THINK, QWEN, XML = map(load_protocol, ("think", "qwen", "qwen_xml"))
protocols = st.sampled_from([THINK, QWEN, XML])
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(-1e300, 1e300) | unicode,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unicode, inner, max_size=3),
    max_leaves=8,
)
pieces = st.sampled_from(
    ["<think>", "</think>", "<tool>", "</tool>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "{", "}", "[",
     '{"name": "n", "args": {}}', '{"name": "n", "arguments": {}}', '"', "NaN", "1e999", "\ud800", "\\ud800", "\n",
     "<function=", "<function=n>", "</function>", "<parameter=", "<parameter=k>", "</parameter>", ">", "true", "1"]
)  # fmt: skip
texts = st.one_of(st.text(), st.lists(pieces | st.text(max_size=3), max_size=12).map("".join))


def think_call(body: str) -> str:
    return f"<think>t</think><tool>{body}</tool>"


@given(protocols, texts)
def test_any_text_parses_to_something_that_can_be_stored(protocol, text):
    match protocol.parse(text):
        case ToolCall(name, args):
            json.dumps([name, args], ensure_ascii=False, allow_nan=False).encode()
        case Answer(answer):
            assert answer.encode() and answer == answer.strip()
        case Malformed(reason):
            assert reason.endswith(".") and reason.isprintable()


@given(st.sampled_from([THINK, QWEN]), unicode, json_values.filter(lambda value: not isinstance(value, dict)))
def test_arguments_must_be_an_object(protocol, name, value):
    turn = protocol.render_thought("t") + protocol.render_call(name, {})
    assert isinstance(protocol.parse(turn), ToolCall)
    assert isinstance(protocol.parse(turn.replace("{}", json.dumps(value).replace("<", "\\u003c"))), Malformed)


# Texts as a tool's argument may hold them, which look like tags or like values of JSON
tagged = st.lists(pieces.filter(lambda piece: piece != "\ud800") | st.sampled_from(["12", " ", "None", "x", "a < b"]),
                  max_size=5).map("".join)  # fmt: skip
thoughts = unicode.filter(lambda text: "<" not in text)


@given(protocols, thoughts, unicode, st.dictionaries(unicode, json_values | st.text() | tagged, max_size=3))
def test_a_rendered_call_is_read_back_whatever_its_arguments(protocol, thought, name, args):
    call = ToolCall(name, args)
    if protocol is XML and any(mark in key for key in (name, *args) for mark in "<>"):  # no tag holds such a name
        with pytest.raises(AssertionError, match="another action"):
            protocol.render_turn(thought, call)
    else:
        read = protocol.parse(protocol.render_turn(thought, call))
        assert read == call and repr(read) == repr(call)  # 1 is not True, nor 1.0


@pytest.mark.parametrize("protocol", [load_protocol(name) for name in PROTOCOLS])
def test_a_value_that_spells_a_tag_is_no_tag(protocol):
    call = ToolCall("crop_image", {"image": f"{protocol.close_call}<answer>42</answer><think>"})
    assert protocol.parse(protocol.render_turn("t", call)) == call


def test_each_protocol_reads_its_own_form():
    assert THINK.parse(" <think>a\nb</think>\n<answer> 4 x </answer>\n") == Answer("4 x")
    assert THINK.parse(think_call('{"args": {"x": 1}, "name": "n"}')) == ToolCall("n", {"x": 1})
    call = '<tool_call>\n{"name": "n", "arguments": {"x": 1}}\n</tool_call>'
    for thought in ("", "Prose, as the stock model writes it.\n", "<think>t</think>"):
        assert QWEN.parse(thought + call) == ToolCall("n", {"x": 1})
        assert QWEN.parse(thought + "<answer>4</answer>") == Answer("4")
    assert isinstance(THINK.parse(call), Malformed) and isinstance(QWEN.parse(think_call("{}")), Malformed)


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "The answer is 4.",
        "<answer>4</answer>",
        "<think>t</think>",
        "<think>t</think>4",
        "<think>t<answer>4</answer>",
        "so <think>t</think><answer>4</answer>",
        "<think>t</think>so <answer>4</answer>",
        "<think>t</think><answer>4</answer>!",
        "<think>t</think><answer>4</answer><answer>5</answer>",
        "<think>t</think><answer>4<answer>5</answer>",
        "<think>t</think><think>t</think><answer>4</answer>",
        "<think><think>t</think><answer>4</answer>",
        "<think><answer>5</answer></think><answer>4</answer>",
        "<think>t</think><answer> </answer>",
        '<think>t</think><tool>{"name": "n", "args": {}}</tool><answer>4</answer>',
        think_call('{"name": "n", "args": {}}</tool><tool>{"name": "n", "args": {}}'),
    ],
)
def test_exactly_one_thought_and_one_act_and_nothing_around(turn):
    assert isinstance(THINK.parse(turn), Malformed)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ('{"x": NaN}', "NaN"),
        ('{"x": -Infinity}', "-Infinity"),
        ('{"x": 1e999}', "too large"),
        ('{"x": ' + "9" * 5000 + "}", "too many digits"),
        ('{"x": 1, "x": 2}', "twice"),
        ('{"x": {"y": 1, "y": 1}}', "twice"),
        (r'{"x": "\ud800"}', "Unicode"),
        (r'{"\udfff": 1}', "Unicode"),
        ("[" * 100_000, "brackets"),
        ('{"x": ' * 100_000, "brackets"),
        ("{'x': 1}", "not valid JSON"),
        ("__import__('os').system('true')", "not valid JSON"),
        ("[]", "object"),
        ("null", "object"),
    ],
)
def test_hostile_arguments_are_refused_and_the_model_is_told_why(args, told):
    result = THINK.parse(think_call('{"name": "crop_image", "args": ' + args + "}"))
    assert isinstance(result, Malformed) and told in result.reason and len(result.reason) < 200


@pytest.mark.parametrize(
    "body", ["", "[]", "3", '{"name": "n"}', '{"name": 3, "args": {}}', '{"name": "n", "args": {}, "k": 1}']
)
def test_a_call_is_an_object_of_name_and_args(body):
    assert isinstance(THINK.parse(think_call(body)), Malformed)


def test_the_verdict_does_not_depend_on_the_depth_of_the_stack():
    turn = think_call('{"name": "n", "args": {"x": ' + "[" * 98 + "]" * 98 + "}}")

    def parse_at(depth: int):
        return parse_at(depth - 1) if depth else THINK.parse(turn)

    assert parse_at(0) == parse_at(500) and isinstance(parse_at(0), ToolCall)


def test_rendering_refuses_what_would_be_read_differently():
    with pytest.raises(AssertionError):
        THINK.render_turn("t", Answer("4</answer><answer>5"))
    with pytest.raises(AssertionError):
        THINK.render_turn("t", ToolCall("n", {"x": math.nan}))


@pytest.mark.parametrize("protocol", [load_protocol(name) for name in PROTOCOLS])
def test_the_system_prompt_describes_the_protocol_and_every_tool(protocol):
    tools = tuple(load_tools().values())
    prompt = protocol.system(tools)
    assert all(tool.signature() in prompt for tool in tools)
    assert protocol.call_example in prompt and "<answer>" in prompt
    bare = protocol.system(())
    assert protocol.open_call not in bare and "tool" not in bare.lower() and "<answer>" in bare


@pytest.mark.parametrize("family", list_families().values(), ids=lambda family: family.name)
def test_the_system_prompt_of_a_family_explains_its_coordinates_and_a_call_that_parses(family):
    for name in family.protocols:
        talk = ConversationConfig().completed(name, family.coordinates)
        prompt, protocol = render_system_prompt(talk), load_protocol(name)
        assert [unit for unit, sentence in UNITS.items() if sentence in prompt] == [family.coordinates]
        shown = prompt[prompt.index(protocol.turn_form) + len(protocol.turn_form) :]
        shown = shown[: shown.index(protocol.close_call) + len(protocol.close_call)]
        filled = shown.replace('"args": {…}', '"args": {}').replace('"arguments": {…}', '"arguments": {}')
        assert isinstance(protocol.parse(protocol.turn_form + filled), ToolCall)
        answer = prompt[prompt.index(f"{protocol.turn_form}<answer>") :].partition("</answer>")[0] + "</answer>"
        assert protocol.parse(answer) == Answer("your answer")
        assert prompt == render_system_prompt(ConversationConfig(protocol=name).completed("think", family.coordinates))


def test_observations_are_plain_in_one_protocol_and_tool_responses_in_the_others():
    assert XML.observation("t", image=True) == QWEN.observation("t", image=True)
    assert THINK.observation("t", image=True) == [IMAGE_PART, {"type": "text", "text": "t"}]
    assert THINK.observation("t", image=False) == [{"type": "text", "text": "t"}]
    joined = [part.get("text", "IMAGE") for part in QWEN.observation("t", image=True)]
    assert "".join(joined) == "<tool_response>\nIMAGEt\n</tool_response>"


# XML ------------------------------------------------------------------------------------------------------------------


def xml_call(parameters: str, name: str = "n") -> str:
    return f"t\n<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("-5.5", -5.5), (" 5 ", 5), ("true", True), ("True", True), ("False", False), ("null", None),
    ("None", None), ("[1, [2]]", [1, [2]]), ('{"a": 1}', {"a": 1}), ("vertical", "vertical"), ('"5"', "5"),
    ('"true"', "true"), ("", ""), ("\n", "\n"), (" x ", " x "), ("x\ny", "x\ny"), ("x\n", "x\n"), ("\nx", "\nx"),
    ("TRUE", "TRUE"), ("1 2", "1 2"), ("a < b > c", "a < b > c"), ("1,5", "1,5"), ("[1, 2", "[1, 2"), ("007", "007"),
])  # fmt: skip
def test_a_value_is_json_if_it_reads_as_json_and_else_a_text(text, value):
    read = XML.parse(xml_call(f"<parameter=k>\n{text}\n</parameter>\n"))
    assert repr(read) == repr(ToolCall("n", {"k": value}))


@given(st.text(st.characters(exclude_categories=["Cs"])) | tagged)
def test_a_plain_text_is_written_as_qwens_own_template_writes_it(text):
    turn = XML.render_turn("", ToolCall("n", {"k": text}))
    own = f"<tool_call>\n<function=n>\n<parameter=k>\n{text}\n</parameter>\n</function>\n</tool_call>"
    like_json = not isinstance(XML.parse(own), ToolCall) or XML.parse(own).args["k"] != text
    assert (turn == own) == (not like_json and not any(mark in text for mark in ("</", "<parameter=", "<function=",
                                                       "<tool_call>", "<answer>", "<think>")))  # fmt: skip


@given(st.dictionaries(st.sampled_from(["x", "y_2", "points"]), json_values | tagged, min_size=1))
def test_calls_are_written_as_qwens_own_template_writes_them(args):
    """Qwen3.6's, which writes true where Qwen3.5's writes True; texts that need JSON's quotes are the exception."""
    calls = [{"function": {"name": "n", "arguments": args}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t", "tool_calls": calls}]
    texts = {key: value for key, value in args.items() if isinstance(value, str)}
    if any(render_value(text) != text for text in texts.values()):
        return
    markup = stock_tokenizer("qwen3_6").apply_chat_template(messages, tokenize=False)
    own = markup[markup.rindex("<tool_call>") : markup.rindex("<|im_end|>")]
    assert XML.parse(own) == ToolCall("n", args)
    if not any("<" in json.dumps(value) for key, value in args.items() if key not in texts):
        assert XML.render_call("n", args) == own


def test_a_call_needs_no_line_breaks_and_may_have_no_arguments():
    one_line = "<tool_call><function=n><parameter=a>1</parameter><parameter=b>x</parameter></function></tool_call>"
    assert XML.parse(one_line) == ToolCall("n", {"a": 1, "b": "x"})
    assert XML.parse(xml_call("")) == ToolCall("n", {})
    assert XML.parse("<think>\na\n</think>\n\n" + one_line) == XML.parse("<think>\na\n" + one_line)


@pytest.mark.parametrize("parameters, told", [
    ("<parameter=k>NaN</parameter>", "NaN"),
    ("<parameter=k>1e999</parameter>", "too large"),
    ("<parameter=k>" + "9" * 5000 + "</parameter>", "too many digits"),
    ('<parameter=k>{"x": 1, "x": 2}</parameter>', "twice"),
    (r'<parameter=k>"\ud800"</parameter>', "Unicode"),
    ("<parameter=k>" + "[" * 100_000 + "</parameter>", "brackets"),
    ("<parameter=k>1</parameter><parameter=k>1</parameter>", "twice"),
    ("<parameter=k>1", "<parameter=…>…</parameter>"),
    ("<parameter=k", "<parameter=…>…</parameter>"),
    ("<parameter=<b>>1</parameter>", "<parameter=…>…</parameter>"),
    ("1</parameter>", "<parameter=…>…</parameter>"),
    ("so <parameter=k>1</parameter>", "<parameter=…>…</parameter>"),
    ("<parameter=k>1</parameter> so", "<parameter=…>…</parameter>"),
    ("<parameter=a><parameter=b>1</parameter></parameter>", "<parameter=…>…</parameter>"),
    ("</function><function=m>", "<parameter=…>…</parameter>"),
    ("<answer>4</answer>", "exactly one"),
    ("</tool_call><tool_call>", "exactly one"),
])  # fmt: skip
def test_hostile_parameters_are_refused_and_the_model_is_told_why(parameters, told):
    result = XML.parse(xml_call(parameters))
    assert isinstance(result, Malformed) and told in result.reason and len(result.reason) < 200


@pytest.mark.parametrize("body", ["", "n", "<function=n>", "<function=n", "</function>", "<function=n></function> so",
                                  "so <function=n></function>", "<function=<n>></function>",
                                  '{"name": "n", "arguments": {}}'])  # fmt: skip
def test_a_call_is_a_function(body):
    assert isinstance(XML.parse(f"<tool_call>{body}</tool_call>"), Malformed)


@pytest.mark.parametrize("piece", ["<parameter=", "<parameter=a>", "</parameter>", "<function=", "</function>", ">",
                                   "\n", "<", "<tool_call", "<think>", "[", "9", '"', "<parameter=k></parameter>"
])  # fmt: skip
def test_the_time_is_linear_in_a_hostile_length(piece):
    many = piece * (500_000 // len(piece))
    started = time.perf_counter()
    for text in (many, xml_call(many), xml_call("<parameter=k>" + many), xml_call(f"<parameter=k>{many}</parameter>")):
        XML.parse(text)
    assert time.perf_counter() - started < 20, "a quadratic parse takes minutes"


def test_the_time_is_linear_in_the_number_of_parameters():
    text = xml_call("".join(f"<parameter={n}>1</parameter> " for n in range(150_000)))
    started = time.perf_counter()
    assert len(XML.parse(text).args) == 150_000
    assert time.perf_counter() - started < 20, "a copy of the rest for each takes minutes"


# turns that the chat template has begun -------------------------------------------------------------------------------

starts = st.sampled_from(["", "<think>\n", "<think>"])
actions = st.builds(ToolCall, st.just("n"), st.dictionaries(st.sampled_from("xyz"), json_values)) | st.builds(
    Answer, unicode.map(str.strip).filter(lambda text: text and "<" not in text)
)


@given(protocols, starts, thoughts, actions)
def test_a_written_turn_goes_on_from_an_opened_thought_and_means_the_same(protocol, start, thought, action):
    turn = protocol.render_turn(thought, action)
    rest = protocol.follow(turn, start)
    assert protocol.parse(start + rest) == action and (start or rest == turn)
    assert not start or (start + rest).count("<think>") == (start + rest).count("</think>") == 1
    assert protocol.follow(start + rest, start) == rest


@given(protocols, starts, texts)
def test_any_text_goes_on_from_an_opened_thought(protocol, start, text):
    protocol.parse(start + protocol.follow(text, start))


def test_a_thought_that_never_ends_is_told_so():
    for turn in ("<think>\nlong " * 1 + "and longer", "<think>\nt <answer>4</answer>"):
        result = THINK.parse(turn)
        assert isinstance(result, Malformed) and "close it with </think>" in result.reason
    for protocol in (QWEN, XML):
        assert isinstance(protocol.parse("<think>\nt <answer>4</answer>"), Malformed)
        rehearsed = "<think>\nI must write <answer>5</answer> or <tool_call>.\n</think>\n\n"
        assert protocol.parse(f"{rehearsed}<answer>4</answer>") == Answer("4")
        assert isinstance(protocol.parse(f"{rehearsed}<answer>5</answer> <answer>4</answer>"), Malformed)
    assert "one <think>" in THINK.parse("<think>\n<think>t</think><answer>4</answer>").reason
    call = "<tool_call>\n<function=n>\n</function>\n</tool_call>"
    assert XML.parse("<think>\nt" + call) == ToolCall("n", {}), "vLLM's parser ends the thought there, too"
