"""An exported policy: whoever loads its tokenizer renders conversations to the tokens of its training."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from chat_codecs import STOCK, qwen_directory, stock_codec, stock_template
from paths import REPOSITORY
from viewed_store import VIEW, sample_of, trajectory_of, trajectory_table

from thinkimg.analysis.card import describe_base, describe_data, front_matter, held_out_lines, write_serving
from thinkimg.analysis.export import export_policy
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.protocol import IMAGE_PART, Answer, ToolCall, load_protocol, text_part
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data.hub.public_sets import public_sets
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import view_size
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe, Reference

BASE = {"name": f"model/{'a' * 64}", "revision": None}
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
    played = store_rollouts(store, {"conversation": talk.model_dump(mode="json")})
    return store, build_policy(store, {"rollouts": played.reference}, part, template, form)


def store_rollouts(store, settings: dict, system: str | None = None, kind: str = "rollouts", **inputs):
    """Rollouts with these settings. system: prompt in the tokens of their one row; None for no rows."""

    def produce(work):
        if system is None:
            work.text("rows", json.dumps(settings))
            return
        tokens = tuple(stock_codec("qwen2_5_vl").prompt(system, [IMAGE_PART, text_part("What?")]))
        row = replace(trajectory_of(sample_of("red"), 0, "red"), tokens=tokens, roles=(0,) * len(tokens))
        work.table("trajectories.parquet", trajectory_table([row]))

    return store.build(kind, Recipe("rollout", 1, 1, settings, inputs), produce)[0]


def build_policy(store, inputs: dict, part: str = "model", template=None, form="chat_template.jinja", **settings):
    def produce(work):
        with work.part("policy") as path:
            path.mkdir()
            put_tokenizer(path / part, template or stock_template("qwen2_5_vl"), form)
            (path / part / "weights").write_text("w")
            (path / "state.json").write_text(json.dumps({"adaptation": "lora", "base": BASE}))
            if part == "adapter":
                settings = {"base_model_name_or_path": BASE["name"], "r": 8}
                (path / part / "adapter_config.json").write_text(json.dumps(settings))

    recipe = Recipe("train", 1, 1, {"model": {"adaptation": "full", "dtype": "float32"}} | settings, inputs)
    return store.build("policy", recipe, produce)[0]


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


# what a stranger reads and runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The export of the policy of a whole loop, as an earlier version's store has it."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(REPOSITORY / "tests" / "support" / "golden" / "store_v1", folder / "store")
    store = Store(folder / "store")
    return export_policy(store, store.resolve("569f33", "policy"), folder / "pack")


def test_the_card_has_the_held_out_figures_with_their_intervals_and_says_what_is_licensed_how(pack):
    card = (pack / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    (evaluation,) = (json.loads(path.read_bytes()) for path in (pack / "ancestors").glob("evaluation-17a8*"))
    figures = evaluation["metrics"]
    interval = [f"{100 * figures[name]:.4g}" for name in ("accuracy", "accuracy_low", "accuracy_high")]
    assert "| 2 | – | {} ({} to {}) |".format(*interval) in card
    assert f"| seen | {evaluation['recipe']['inputs']['dataset']['fingerprint'][:12]} | 17a8" in card
    assert "Base model: created by thinkimg" in card and "Data: a user's own." in card


def test_the_card_counts_the_samples_that_were_asked_and_not_those_of_the_settings():
    """A data set may have fewer."""
    evaluation = SimpleNamespace(
        manifest={"recipe": {"config": {"samples": 20_000, "k": 4}}},
        metrics={"trajectories": 12_345, "judged": 12_001, "accuracy": 0.5, "accuracy_low": 0.4912, "chance": 0.25},
        inputs={"dataset": Reference("dataset", "d" * 64, "f" * 64, "0001")},
        short="e" * 12,
    )
    *_, row, _, _ = held_out_lines([evaluation])
    assert row == f"| 12,345 | 12,001 | 50 (49.12 to –) | – (k = 4) | 25 | seen | {'f' * 12} | {'e' * 12} |"


def test_without_a_loop_the_system_prompt_is_that_of_the_settings(tmp_path):
    """Single stages record none; what the policy was trained with was made from its tools."""
    talk = ConversationConfig(protocol="qwen", tools=("crop_image",))
    store, policy = store_policy(tmp_path / "store", stock_template("qwen2_5_vl"), "chat_template.jinja", talk)
    pack = export_policy(store, policy, tmp_path / "pack")
    assert (pack / "system.txt").read_text() == render_system_prompt(talk) + "\n"
    assert "as this version of thinkimg writes it" in (pack / "README.md").read_text()


def test_it_samples_as_in_the_rollouts_and_is_served_within_their_limits(pack):
    codec = Codec.load(pack / "policy" / "model")
    generation = json.loads((pack / "policy" / "model" / "generation_config.json").read_bytes())
    assert generation == {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": codec.end,
        "pad_token_id": codec.end, "suppress_tokens": list(codec.banned),
    }  # fmt: skip
    readme = (pack / "README.md").read_text(encoding="utf-8")
    command = " ".join(readme.partition("    vllm serve ")[2].partition("\n\n")[0].replace("\\\n", " ").split())
    settings = json.loads((pack / "config.json").read_bytes())["loop"]
    talk, view = settings["conversation"], settings["images"]
    assert command.startswith("policy/model --served-model-name policy --dtype float32 ") and "lora" not in command
    assert f"--max-model-len {talk['max_tokens']} " in command
    assert f"""--limit-mm-per-prompt '{{"image": {talk["max_images"]}}}' """ in command
    edges = json.dumps({"size": {"shortest_edge": view["min_pixels"], "longest_edge": view["max_pixels"]}})
    assert command.endswith(f"--mm-processor-kwargs '{edges}'")
    assert "policy/model/generation_config.json differ" in readme


def test_a_whole_model_has_nothing_to_merge(pack, tmp_path):
    store = Store(pack.parent / "store")
    policy = store.resolve("569f33", "policy")
    with pytest.raises(UserError, match="complete model already.*--merge"):
        export_policy(store, policy, tmp_path / "pack", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("system", ["Use a tool or answer.", ""])
def test_the_example_shows_the_policy_the_prompt_that_it_was_trained_with(pack, system, tmp_path, monkeypatch, capsys):
    """Of a photograph that lies on its side, as phones store them."""
    import transformers
    from PIL import ExifTags, Image

    asked, own = [], shutil.copytree(pack, tmp_path / "pack")
    assert (own / "system.txt").read_text() == "Use a tool or answer.\n"
    (own / "system.txt").write_text(f"{system}\n")
    generate = transformers.GenerationMixin.generate

    def recorded(self, **inputs):
        asked.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", recorded)
    picture = tmp_path / "picture.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.linear_gradient("L").resize((200, 300)).save(picture, exif=exif)
    monkeypatch.setattr(sys, "argv", ["example.py", str(picture), "What is it?"])
    runpy.run_path(str(own / "example.py"))
    assert capsys.readouterr().out.strip(), "the policy says something"

    (inputs,) = asked
    limits = ViewLimits(min_pixels=3136, max_pixels=7056)
    wide, high = view_size(300, 200, limits)
    assert tuple(inputs["image_grid_thw"][0].tolist()) == limits.count_patches((wide, high))
    codec = Codec.load(pack / "policy" / "model")
    question = f"Image 0: {wide}x{high} pixels. What is it?\nAnswer with a word or a short phrase."
    compact = codec.prompt(system, [IMAGE_PART, text_part(question)])
    ids = inputs["input_ids"][0].tolist()
    shown = [token for place, token in enumerate(ids) if token != codec.image or ids[place - 1] != codec.image]
    assert shown == compact and ids.count(codec.image) == limits.count_tokens((wide, high))


@pytest.mark.parametrize(("base", "said"), [
    ("Qwen/Qwen2.5-VL-7B-Instruct", "The licence on its page, https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct"),
    ("model/" + "a" * 64, "a directory of the trainer's machine"), ("", "not known"), ("tiny", "random weights"),
])  # fmt: skip
def test_a_base_is_named_on_the_hub_only_where_it_is_there(base, said):
    assert said in describe_base(base, None)
    assert ("base_model" in front_matter(base, is_adapter=True)) == base.startswith("Qwen/")


@pytest.mark.parametrize("name", public_sets())
def test_the_licence_is_that_of_the_public_set_whose_tables_were_read(name):
    """Several sets lie in one repository."""
    entry = public_sets()[name]
    page = f"see https://huggingface.co/datasets/{entry.repository}"
    licence = page if entry.licence is None else entry.licence.value
    tables = [pattern.replace("*", "x") for pattern in (entry.files.value if entry.files else ["any.parquet"])]
    schemas = [[table, entry.schema, "1"] for table in tables]

    def describe(schemas):
        return describe_data({"source": "files", "name": f"{entry.repository}@{'c' * 40}", "schemas": schemas})

    assert describe(schemas) == f"Data: {name} ({entry.repository}), {licence}."
    unknown = [[], [[tables[0], "another", "1"]]]
    unknown += [[*schemas, ["none_of_its.csv", entry.schema, "1"]]] if entry.files else []
    assert {describe(listed) for listed in unknown} == {f"Data: {entry.repository}, {page}."}


@pytest.mark.parametrize(
    "source, name", [("files", "files"), ("hub", "hub"), ("jsonl", "jsonl"), ("my_source", "DreamMr/HR-Bench")]
)
def test_a_folder_of_the_trainer_has_no_licence_of_a_public_set(source, name):
    """Whatever its path is called: the recorded name of such data is that of the source."""
    data = {"source": source, "name": name, "schemas": [["hr_bench_4k.parquet", "letters", "1"]]}
    assert "a user's own" in describe_data(data)
    assert "puzzles" in describe_data({"source": "puzzles"}) and "not known" in describe_data({})


# the conversations of its training ------------------------------------------------------------------------------------


def test_the_settings_are_those_of_the_policys_own_rollouts(tmp_path):
    """Of single stages they may change from one iteration to the next, and a fingerprint says nothing of time."""
    store, inputs = Store(tmp_path / "store"), {}
    for number in range(1, 6):
        talk = ConversationConfig(max_tokens=1000 * number, max_images=number, max_turn_tokens=10 * number)
        view = {"min_pixels": 3136, "max_pixels": 3136 * number}
        settings = {"conversation": talk.model_dump(mode="json"), "images": view}
        played = store_rollouts(store, settings | {"rollout": {"temperature": number / 10}}, **inputs)
        policy = build_policy(store, inputs | {"rollouts": played.reference}, images=VIEW, seed=number)
        pack = export_policy(store, policy, tmp_path / f"pack{number}")
        generation = json.loads((pack / "policy" / "model" / "generation_config.json").read_bytes())
        readme, example = (pack / "README.md").read_text(), (pack / "example.py").read_text()
        assert generation["temperature"] == number / 10
        assert f"--max-model-len {1000 * number} " in readme and f'{{"image": {number}}}' in readme
        assert f'"longest_edge": {3136 * number}}}' in readme and f"max_pixels={3136 * number})" in example
        assert f"max_new_tokens={10 * number}," in example
        inputs = {"policy": policy.reference}


def test_a_warm_started_policy_has_the_settings_of_its_demonstrations_and_samples_at_one(tmp_path):
    store = Store(tmp_path / "store")
    settings = {"conversation": {"protocol": "qwen", "max_tokens": 777}, "images": VIEW}
    shown = store_rollouts(store, settings, kind="demonstrations")
    pack = export_policy(store, build_policy(store, {"demonstrations": shown.reference}), tmp_path / "pack")
    assert json.loads((pack / "policy" / "model" / "generation_config.json").read_bytes())["temperature"] == 1.0
    assert "--max-model-len 777 " in (pack / "README.md").read_text()


def test_the_system_prompt_is_the_one_in_the_tokens_whatever_the_code_now_renders(tmp_path):
    """A tool's docstring may have changed since, and a setting may be gone."""
    store, before = Store(tmp_path / "store"), " You see ünits.\nTools: <|im_end|>\n- crop_image, as it was then\n"
    talk = {"protocol": "think", "tools": ["crop_image"], "removed_setting": 1}
    played = store_rollouts(store, {"conversation": talk}, before)
    pack = export_policy(store, build_policy(store, {"rollouts": played.reference}), tmp_path / "pack")
    assert (pack / "system.txt").read_text() == before + "\n"
    assert "the system prompt that it was trained with" in (pack / "README.md").read_text()
    own = store_rollouts(store, {"conversation": talk | {"system": "Mine."}}, "Mine.")
    pack = export_policy(store, build_policy(store, {"rollouts": own.reference}), tmp_path / "own")
    assert (pack / "system.txt").read_text() == "Mine.\n"


@pytest.mark.parametrize(("changes", "said"), [
    ({"protocol": "my_project.absent"}, "There is no 'my_project.absent' among the protocols.* Hint: There are"),
    ({"tools": ["my_project.absent"]}, "There is no 'my_project.absent' among the tools.* Hint: There are"),
    ({"removed_setting": 1}, "There is no setting 'conversation.removed_setting'.* Hint: Another version"),
    ({"max_turns": "many"}, "'conversation.max_turns' does not fit.* Hint: Another version"),
])  # fmt: skip
def test_settings_that_this_machine_can_not_read_are_a_sentence(changes, said, tmp_path):
    store = Store(tmp_path / "store")
    played = store_rollouts(store, {"conversation": {"protocol": "think"} | changes})
    with pytest.raises(UserError, match=said):
        export_policy(store, build_policy(store, {"rollouts": played.reference}), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


# what the pack says of itself -----------------------------------------------------------------------------------------


def export_adapter(tmp_path, monkeypatch, *, merges: bool):
    """(policy, pack) of an adapter. Merging itself needs torch; a base model as it is stands for its result."""

    def merge(directory, out, **settings):
        shutil.copytree(directory / "adapter", out)
        (out / "adapter_config.json").unlink()
        (out / "config.json").write_text("{}")

    monkeypatch.setitem(sys.modules, "thinkimg.trainer.checkpoint", SimpleNamespace(export_merged=merge))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    store = Store(tmp_path / "store")
    policy = build_policy(store, {}, "adapter", images=VIEW)
    return policy, export_policy(store, policy, tmp_path / "pack", str(tmp_path / "base") if merges else None)


@pytest.mark.parametrize("merges", [False, True])
def test_the_readme_names_every_file_that_is_not_the_manifests(merges, tmp_path, monkeypatch):
    policy, pack = export_adapter(tmp_path, monkeypatch, merges=merges)
    manifest = {entry["name"]: entry["sha256"] for entry in json.loads((pack / "manifest.json").read_bytes())["files"]}
    assert manifest.keys() == policy.files.keys()
    names = [name for name in files.files_under(pack) if name.startswith("policy/")]
    others = {name for name in names if manifest.get(name) != files.sha256(pack / name)}
    readme = (pack / "README.md").read_text()
    assert "weights (an adapter merged into its base model)" in readme if merges else "weights (an adapter)" in readme
    if merges:
        assert others == set(names) and all(name.startswith("policy/model/") for name in names)
        assert "lists policy/adapter/*" in readme and "policy/model/*" in readme and "differ from" not in readme
    else:
        named = readme.partition("So ")[2].partition(" differ from the manifest's.")[0].split(", ")
        assert set(named) == others
    assert ("library_name: transformers" in readme) is merges
    assert ("BASE stands for a directory" in readme) is not merges and ("serve BASE " in readme) is not merges


@pytest.mark.parametrize("revision", [None, "c" * 40])
def test_an_adapter_is_served_beside_its_base_of_the_hub(revision, tmp_path):
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "r": 16, "revision": revision}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    text = write_serving(tmp_path, VIEW, {}, {"dtype": "bfloat16"})
    command = " ".join(text.partition("    vllm serve ")[2].partition("\n\n")[0].replace("\\\n", " ").split())
    assert command.startswith("Qwen/Qwen2.5-VL-7B-Instruct --served-model-name base --dtype bfloat16 ")
    assert command.endswith("--enable-lora --max-lora-rank 16 --lora-modules policy=policy/adapter")
    assert (f"--revision {revision}" in command) is (revision is not None) and "BASE" not in text
