"""Export of a policy as a self-contained directory: weights, template, tools, config, manifests of its ancestors."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

from thinkimg import __version__
from thinkimg.analysis import card
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import load_protocol
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.template import write_template
from thinkimg.errors import UserError
from thinkimg.images.toolbox import TOOLS, load_tools
from thinkimg.models.base import Base, BaseSource
from thinkimg.models.family import find_family
from thinkimg.records import Coordinates
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Policy
from thinkimg.store.lineage import Graph, draw_tree
from thinkimg.store.manifest import MANIFEST, Artifact, git_revision
from thinkimg.tracking.records import find_loop, find_system_prompt

SUMS = "SHA256SUMS"
README = """# A policy that thinkimg {version} trained

    policy/                  the weights ({adaptation}), tokenizer and processor, as Hugging Face's libraries read them
    chat_template.jinja      the template that renders a conversation to the tokens of its training, see below
    system.txt               the system prompt that it was trained with
    example.py               asks it for its first turn about a picture, with Hugging Face's libraries alone
    tools.json               its tools: description, JSON Schema of the arguments, hash of the code
    config.json              the resolved config of its loop, and the part of it that each ancestor's stage used
    manifest.json            its own manifest: recipe, inputs, hash of every file, metrics, versions, host
    ancestors/               the manifests of all its ancestors, and of its evaluations
    lineage.txt              the same as a tree
    {sums}               the hash of every file here: `sha256sum --check {sums}`

A manifest ends with `seal`, the sha256 of the manifest without it (JSON, sorted keys, indent 1). Its `fingerprint` is
the sha256 of the canonical JSON of its recipe. `digest` covers names, sizes and hashes of the content files. The
recipe's `inputs` have the digests of the ancestors.

The tokenizer in policy/ has chat_template.jinja, too, in place of the base model's. That would trim texts or drop
thoughts that the policy was trained with. So {changed} differ from the manifest's.

{serving}
With this template a conversation is: the system message with the text of system.txt, the user's with the images and the
question, then in turn a reply and the result of its call. A reply is one text, with its thought and its call, as the
policy wrote it: switch a server's parsers of thoughts and tools off. A result is a message of the role `tool`, first
its image and then its text. Pass no `tools`. A reply begins with {opening}, which the template writes.
Texts of users that spell <|im_end|> or another token of the template are read as that token: remove them first.
"""
TOKENIZER_CONFIG, TEMPLATE_JSON = "tokenizer_config.json", "chat_template.json"
STATE = "state.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION = "generation_config.json"


def export_policy(store: Store, policy: Policy, target: Path, base: str | None = None) -> Path:
    """Write the export to the new directory `target`, in one step, and return its path.

    base: directory or Hub id of the model into which an adapter is merged; None leaves the weights as they are.
    Raises UserError if `target` exists, the policy's files are damaged or dropped, or it has no usable template. Also
    where there is no adapter to merge, or it was trained on another base.
    """
    if target.exists():
        raise UserError(f"{target} exists already.", hint="Name a directory that does not exist.")
    problems = store.verify(policy)
    if problems:
        raise UserError(f"{policy.reference} is damaged: {problems[0]}.", hint="Make it again with --force.")
    files.make_directory(target.absolute().parent)
    with files.replacing(target.absolute()) as pack:
        pack.mkdir()
        write_weights(policy, pack / "policy", base)
        write_pack(store, policy, pack)
        sums = [f"{files.sha256(pack / name)}  {name}\n" for name in files.files_under(pack)]
        (pack / SUMS).write_text("".join(sums))
    return target


def write_weights(policy: Policy, target: Path, base: str | None) -> None:
    """Write the weights with their vocabulary; with a `base` those of the adapter merged into it."""
    if base is None:
        shutil.copytree(policy.checked("policy"), target)
        return
    if policy.is_full:
        raise UserError(f"{policy.reference} is a complete model already.", hint="Leave --merge out.")
    from thinkimg.trainer.checkpoint import export_merged

    target.mkdir()
    source = BaseSource(path=base, revision=None, tiny=False)
    dtype = policy.manifest["recipe"]["config"]["model"]["dtype"]
    export_merged(policy.checked("policy"), target / "model", base=Base(**source.entry(policy)), dtype=dtype)
    shutil.copyfile(policy.directory / "policy" / STATE, target / STATE)


def write_pack(store: Store, policy: Policy, pack: Path) -> None:
    """Write all files of an export but the weights and the checksums."""
    graph, name = Graph.of(store), str(policy.reference)
    shutil.copyfile(policy.directory / MANIFEST, pack / MANIFEST)
    ancestors = [
        graph.artifacts[entry] for entry in sorted(graph.ancestors([name]) - {name}) if entry in graph.artifacts
    ]
    evaluations = [graph.artifacts[entry] for entry in graph.products.get(name, []) if entry.startswith("evaluation/")]
    (pack / "ancestors").mkdir()
    for artifact in (*ancestors, *evaluations):
        target = pack / "ancestors" / f"{artifact.kind}-{artifact.fingerprint}-{artifact.attempt}.json"
        shutil.copyfile(artifact.directory / MANIFEST, target)
    loop = find_loop(store, policy)
    slices = {str(artifact.reference): artifact.manifest["recipe"]["config"] for artifact in (*ancestors, policy)}
    save_json(pack / "config.json", {"loop": loop.config if loop else None, "stages": slices})
    conversations = [config.get("conversation", {}) for config in slices.values()]
    own = loop.config.get("conversation", {}) if loop else {}
    conversation = next((settings for settings in reversed(conversations) if "protocol" in settings), own)
    save_json(pack / "tools.json", describe_tools(conversation.get("tools")))
    chosen = {name: value for name, value in conversation.items() if value is not None}
    family = {"protocol": default_protocol(policy), "coordinates": default_coordinates(policy)}
    system = find_system_prompt(loop, family | chosen)
    (pack / "system.txt").write_text(system + "\n", encoding="utf-8")
    codec = Codec.load(vocabulary_of(pack / "policy"), thinking=conversation.get("thinking"))
    template = write_template(codec, load_protocol(conversation.get("protocol") or default_protocol(policy)))
    (pack / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    temperatures = [config["rollout"]["temperature"] for config in slices.values() if "rollout" in config]
    generation = write_generation(vocabulary_of(pack / "policy"), codec, (temperatures or [1.0])[-1])
    changed = [*replace_template(vocabulary_of(pack / "policy"), template), generation]
    (pack / "lineage.txt").write_text("\n".join(draw_tree(graph, name)) + "\n", encoding="utf-8")
    model = policy.manifest["recipe"]["config"]["model"]
    adaptation = "lora" if (pack / "policy" / "adapter").is_dir() else "full"
    if adaptation != model.get("adaptation", adaptation):
        adaptation = "an adapter merged into its base model"
    views = [config.get("images", {}) for config in (loop.config if loop else {}, *slices.values())]
    serving = ""
    if view := next((settings for settings in reversed(views) if "min_pixels" in settings), None):
        unit = Coordinates(conversation.get("coordinates") or default_coordinates(policy))
        example = card.write_example(vocabulary_of(pack / "policy").name, view, conversation, unit)
        (pack / "example.py").write_text(example, encoding="utf-8")
        serving = card.write_serving(pack / "policy", view, conversation, model)
    base = json.loads((pack / "policy" / STATE).read_bytes())["base"] if (pack / "policy" / STATE).is_file() else {}
    lines = [
        *card.held_out_lines(evaluations),
        "",
        *card.licence_lines(base.get("name", ""), base.get("revision"), loop.config["data"] if loop else None),
    ]
    text = README.format(
        version=__version__,
        adaptation=adaptation,
        sums=SUMS,
        serving=serving,
        changed=", ".join(f"{path.relative_to(pack)}" for path in changed),
        opening=json.dumps(codec.opening) if codec.opening else "nothing",
    )
    text = card.front_matter(base.get("name", ""), adaptation) + text + "\n" + "\n".join(lines) + "\n"
    (pack / "README.md").write_text(text, encoding="utf-8")


def default_protocol(policy: Artifact) -> str:
    """Return the protocol of a policy that learned from no conversations, where the settings name none."""
    return ConversationConfig().form if policy.family is None else find_family(policy.family).protocols[0]


def default_coordinates(policy: Artifact) -> Coordinates:
    """Return the unit of positions of a policy that learned from no conversations, where the settings name none."""
    return ConversationConfig().unit if policy.family is None else find_family(policy.family).coordinates


def vocabulary_of(policy: Path) -> Path:
    """Return the directory of the tokenizer, the model's or the adapter's. Raises UserError if there is none."""
    for path in sorted(policy.glob("*/tokenizer.json")):
        return path.parent
    raise UserError("The policy has no tokenizer.", hint="Put it beside the base model's weights and train again.")


def replace_template(directory: Path, template: str) -> list[Path]:
    """Write a tokenizer's chat template wherever transformers or vLLM may read one, and return the files changed."""
    changed = [directory / TEMPLATE_FILE]
    changed[0].write_text(template, encoding="utf-8")
    for name in (TEMPLATE_JSON, TOKENIZER_CONFIG):
        path = directory / name
        values = json.loads(path.read_bytes()) if path.is_file() else {}
        if "chat_template" in values:
            save_json(path, values | {"chat_template": template})
            changed.append(path)
    return changed


def write_generation(directory: Path, codec: Codec, temperature: float) -> Path:
    """Write beside a tokenizer how transformers and vLLM sample unless they are told: as in the rollouts.

    A base model's own file may have penalties, which the policy was not trained with. Returns the file.
    """
    path = directory / GENERATION
    settings = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": codec.end,
        "pad_token_id": codec.end,
        "suppress_tokens": list(codec.banned),
    }
    save_json(path, settings)
    return path


def describe_tools(names: list[str] | None) -> dict:
    """Return the definitions of tools in this version of the code. names: None for all."""
    offered = load_tools(None if names is None else tuple(names))
    tools = [
        {
            "name": tool.name,
            "description": " ".join(tool.description.split()),
            "signature": tool.signature(),
            "parameters": tool.Args.model_json_schema(),
            "source_sha256": hashlib.sha256(inspect.getsource(TOOLS[path]).encode()).hexdigest(),
        }
        for path, tool in zip(TOOLS.shipped if names is None else names, offered.values(), strict=True)
    ]
    return {"thinkimg": __version__, "git": git_revision(), "tools": tools}


def save_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
