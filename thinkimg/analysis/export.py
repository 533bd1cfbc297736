"""Export of a policy as a self-contained directory: weights, template, tools, config, manifests of its ancestors."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from thinkimg import __version__
from thinkimg.analysis import card
from thinkimg.analysis.system_prompt import LEARNED, find_system_prompt
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
from thinkimg.store.kinds import Episodes, Policy
from thinkimg.store.lineage import Graph, draw_tree
from thinkimg.store.manifest import MANIFEST, Artifact, git_revision
from thinkimg.tracking.records import LoopRecord, find_loop

SUMS = "SHA256SUMS"
README = """# A policy that thinkimg {version} trained

    policy/                  the weights ({weights}), tokenizer and processor, as Hugging Face's libraries read them
    chat_template.jinja      the template that renders a conversation to the tokens of its training, see below
    system.txt               the system prompt {system}
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
thoughts that the policy was trained with. {difference}

{serving}
With this template a conversation is: the system message with the text of system.txt, the user's with the images and the
question, then in turn a reply and the result of its call. A reply is one text, with its thought and its call, as the
policy wrote it: switch a server's parsers of thoughts and tools off. A result is a message of the role `tool`, first
its image and then its text. Pass no `tools`. A reply begins with {opening}, which the template writes.
Texts of users that spell <|im_end|> or another token of the template are read as that token: remove them first.
"""
STORED_PROMPT = "that it was trained with"
RENDERED_PROMPT = "of its settings, as this version of thinkimg writes it: the one of its training is not stored"
MERGED = """The manifest is the adapter's, and lists policy/adapter/*. Here the adapter is
merged into its base model, so that no file of policy/model/* is in the manifest."""
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
        write_pack(Origin.of(store, policy), pack, is_merged=base is not None)
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


@dataclass(frozen=True)
class Origin:
    """A policy with the artifacts that it came from, and its evaluations."""

    policy: Policy
    graph: Graph
    loop: LoopRecord | None
    ancestors: Sequence[Artifact]
    """By reference."""
    evaluations: Sequence[Artifact]
    """Oldest first."""

    @classmethod
    def of(cls, store: Store, policy: Policy) -> Self:
        """Return the origin of a policy, as far as the store has it."""
        graph, name = Graph.of(store), str(policy.reference)
        above = sorted((graph.ancestors([name]) - {name}) & graph.artifacts.keys())
        evaluations = [entry for entry in graph.products.get(name, []) if entry.startswith("evaluation/")]
        listed = ([graph.artifacts[entry] for entry in entries] for entries in (above, evaluations))
        return cls(policy, graph, find_loop(store, policy), *listed)

    @property
    def episodes(self) -> Episodes | None:
        """Rollouts that the policy was trained on, or demonstrations; None where it or the store has none."""
        inputs = self.policy.inputs
        names = [str(inputs[role]) for role in LEARNED if role in inputs]
        artifacts = (self.graph.artifacts.get(name) for name in names)
        return next((artifact for artifact in artifacts if isinstance(artifact, Episodes)), None)


def find_play_settings(origin: Origin) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Return `conversation`, `images` and the temperature of the conversations that a policy was trained on.

    Without any they are those of its recipe or its loop: `images` may then be empty, and the temperature is 1. Of
    `conversation` null is left out, and the model's family says what it stands for.
    """
    policy, episodes, loop = origin.policy, origin.episodes, origin.loop
    own = policy.manifest["recipe"]["config"]
    played = episodes.manifest["recipe"]["config"] if episodes else {}
    configs = [played, own, loop.config if loop else {}]
    conversation, images = (
        next((config[name] for config in configs if name in config), {}) for name in ("conversation", "images")
    )
    family = {"protocol": default_protocol(policy), "coordinates": default_coordinates(policy)}
    chosen = {name: value for name, value in conversation.items() if value is not None}
    return family | chosen, images, played.get("rollout", own).get("temperature", 1.0)


def write_pack(origin: Origin, pack: Path, *, is_merged: bool) -> None:
    """Write all files of an export but the weights and the checksums."""
    conversation, images, temperature = find_play_settings(origin)
    vocabulary = vocabulary_of(pack / "policy")
    write_records(origin, pack)
    save_json(pack / "tools.json", describe_tools(conversation.get("tools")))
    # Before the template of the tokenizer is replaced: the stored tokens are of the base model's.
    system = find_system_prompt(origin.loop, conversation, origin.episodes, vocabulary)
    (pack / "system.txt").write_text(system.text + "\n", encoding="utf-8")
    codec = Codec.load(vocabulary, thinking=conversation.get("thinking"))
    template = write_template(codec, load_protocol(conversation["protocol"]))
    (pack / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    changed = [*replace_template(vocabulary, template), write_generation(vocabulary, codec, temperature)]
    listed = ", ".join(f"{path.relative_to(pack)}" for path in changed)
    serving = ""
    if images:
        example = card.write_example(vocabulary.name, images, conversation, Coordinates(conversation["coordinates"]))
        (pack / "example.py").write_text(example, encoding="utf-8")
        model = origin.policy.manifest["recipe"]["config"]["model"]
        serving = card.write_serving(pack / "policy", images, conversation, model)
    kind = "an adapter" if vocabulary.name == "adapter" else "a complete model"
    text = README.format(
        version=__version__,
        weights="an adapter merged into its base model" if is_merged else kind,
        system=STORED_PROMPT if system.is_stored else RENDERED_PROMPT,
        sums=SUMS,
        serving=serving,
        difference=MERGED if is_merged else f"So {listed} differ from the manifest's.",
        opening=json.dumps(codec.opening) if codec.opening else "nothing",
    )
    write_card(origin, text, pack / "README.md", is_adapter=vocabulary.name == "adapter")


def write_records(origin: Origin, pack: Path) -> None:
    """Write the manifests and settings of a policy and of its ancestors, and its lineage."""
    shutil.copyfile(origin.policy.directory / MANIFEST, pack / MANIFEST)
    (pack / "ancestors").mkdir()
    for artifact in (*origin.ancestors, *origin.evaluations):
        target = pack / "ancestors" / f"{artifact.kind}-{artifact.fingerprint}-{artifact.attempt}.json"
        shutil.copyfile(artifact.directory / MANIFEST, target)
    stages = (*origin.ancestors, origin.policy)
    slices = {str(artifact.reference): artifact.manifest["recipe"]["config"] for artifact in stages}
    save_json(pack / "config.json", {"loop": origin.loop.config if origin.loop else None, "stages": slices})
    tree = draw_tree(origin.graph, str(origin.policy.reference))
    (pack / "lineage.txt").write_text("\n".join(tree) + "\n", encoding="utf-8")


def write_card(origin: Origin, text: str, path: Path, *, is_adapter: bool) -> None:
    """Write a README as a model card: settings for the Hub before its text, held-out figures and licences after it."""
    policy = origin.policy
    base = policy.json(f"policy/{STATE}")["base"] if f"policy/{STATE}" in policy.files else {}
    datasets = [artifact for artifact in origin.ancestors if artifact.kind == "dataset"]
    name = base.get("name", "")
    lines = [
        *card.held_out_lines(origin.evaluations),
        "",
        *card.licence_lines(name, base.get("revision"), datasets),
    ]
    head = card.front_matter(name, is_adapter=is_adapter)
    path.write_text(head + text + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


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
