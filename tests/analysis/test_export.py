"""An exported policy: whoever loads its tokenizer renders conversations to the tokens of its training."""

import json
import shutil

import pytest
from chat_codecs import STOCK, qwen_directory, stock_template

from thinkimg.analysis.export import export_policy
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol, text_part
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe

OPENED, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"


def put_tokenizer(path, template: str, form: str) -> None:
    """Write a tokenizer whose template stands in one of the files in which models have it."""
    shutil.copytree(qwen_directory(), path)
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    del settings["chat_template"]
    if form == "chat_template.jinja":
        (path / form).write_text(template)
    else:
        settings["chat_template"] = template
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def store_policy(root, template: str, form: str, talk: ConversationConfig, part: str = "model"):
    """(store, policy): an artifact of weights with that tokenizer, trained on rollouts with these settings."""
    store = Store(root)

    def rollouts(work):
        work.text("rows", "x")

    def policy(work):
        with work.part("policy") as path:
            path.mkdir()
            put_tokenizer(path / part, template, form)
            (path / part / "weights").write_text("w")

    settings = {"conversation": talk.model_dump(mode="json"), "model": {}}
    played = store.build("rollouts", Recipe("rollout", 1, 1, settings, {}), rollouts)[0]
    recipe = Recipe("train", 1, 1, {"model": {"adaptation": "full"}}, {"rollouts": played.reference})
    return store, store.build("policy", recipe, policy)[0]


@pytest.mark.parametrize("form, part", [("chat_template.jinja", "model"), ("tokenizer_config.json", "adapter")])
@pytest.mark.parametrize("template, thinking, protocol, opening", [
    ("qwen2_5_vl", None, "think", ""), ("qwen3_5_think", None, "qwen_xml", OPENED),
    ("qwen3_5_think", False, "qwen", EMPTY), ("qwen3_5_nothink", True, "think", OPENED),
])  # fmt: skip
def test_whoever_loads_an_export_gets_the_template_that_renders_what_was_trained(
    template, thinking, protocol, opening, form, part, tmp_path
):
    from transformers import AutoTokenizer

    talk = ConversationConfig(protocol=protocol, thinking=thinking)
    store, policy = store_policy(tmp_path / "store", stock_template(template), form, talk, part)
    pack = export_policy(store, policy, tmp_path / "pack")
    tokenizer, text = AutoTokenizer.from_pretrained(pack / "policy" / part), (pack / "chat_template.jinja").read_text()
    assert tokenizer.chat_template == text
    for path in (pack / "policy" / part).glob("*.json"):  # for a processor of transformers, and for vLLM
        values = json.loads(path.read_bytes())
        assert "chat_template" not in values or values["chat_template"] == text

    codec, form = Codec.load(policy.path(f"policy/{part}"), thinking=thinking), load_protocol(protocol)
    assert codec.opening == opening
    turns = [form.render_turn("t", ToolCall("crop_image", {"x": 1})), form.render_turn(" \nt\n", Answer("a"))]
    turns = [codec.turn_start + form.follow(turn, codec.turn_start) for turn in turns]
    result = form.observation("seen\n", image=True)
    ids = codec.prompt("s\n", [text_part(" q")])
    prompts = [ids, *[ids := ids + codec.encode(turn.removeprefix(codec.turn_start)) + [codec.end] + more
                      for turn, more in zip(turns, (codec.observation(result), []), strict=True)]]  # fmt: skip
    messages = [{"role": "system", "content": "s\n"}, {"role": "user", "content": " q"}]
    for prompt, turn in zip(prompts, turns, strict=False):
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": result}]
    assert tokenizer.apply_chat_template(messages[:-1], return_dict=False) == prompts[-1]
    messages[3] = {"role": "tool", "content": [{"type": "image"}, text_part("seen\n")]}
    assert tokenizer.apply_chat_template(messages[:-1], return_dict=False) == prompts[-1]

    readme = (pack / "README.md").read_text()
    assert "chat_template.jinja" in readme and f"policy/{part}/chat_template.jinja" in readme
    assert ("begins with nothing" if not opening else json.dumps(opening)) in readme
    assert store.verify(policy) == [], "the policy in the store stays as it was"


@pytest.mark.parametrize("family, wrapped", [("qwen3_vl", True), ("qwen2_5_vl", False), (None, False)])
def test_a_base_model_as_it_is_has_the_protocol_of_its_family(family, wrapped, tmp_path):
    """The first policy of a loop without demonstrations has no conversations among its ancestors."""

    def policy(work):
        work.family = family
        with work.part("policy") as path:
            path.mkdir()
            put_tokenizer(path / "adapter", stock_template("qwen3_vl"), "chat_template.jinja")

    store = Store(tmp_path / "store")
    recipe = Recipe("warmstart", 1, 1, {"model": {"adaptation": "lora"}}, {})
    pack = export_policy(store, store.build("policy", recipe, policy)[0], tmp_path / "pack")
    assert ("<tool_response>" in (pack / "chat_template.jinja").read_text()) is wrapped


@pytest.mark.parametrize("template", ["{{ messages }} with tools", "{{ raise_exception('no') }}"])
def test_a_template_in_another_form_is_refused_and_nothing_is_left(template, tmp_path):
    store, policy = store_policy(tmp_path / "store", template, "chat_template.jinja", ConversationConfig())
    with pytest.raises(UserError, match="chat template"):
        export_policy(store, policy, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_state_of_thinking_that_the_template_has_not_is_refused(tmp_path):
    talk = ConversationConfig(thinking=True)
    store, policy = store_policy(tmp_path / "store", stock_template(STOCK[0]), "chat_template.jinja", talk)
    with pytest.raises(UserError, match="no switch"):
        export_policy(store, policy, tmp_path / "pack")
