"""Packing a policy for somebody who has nothing else: weights, template, tools, config, and what all of it came from."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

from thinkimg import __version__
from thinkimg.errors import UserError
from thinkimg.images.toolbox import TOOLS, load_tools
from thinkimg.store import files
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.lineage import Graph, draw
from thinkimg.store.manifest import MANIFEST, git_revision
from thinkimg.tracking.records import records

SUMS = "SHA256SUMS"
README = """# A policy that thinkimg {version} trained

    policy/                  the weights ({adaptation}), tokenizer and processor, as Hugging Face's libraries read them
    chat_template.jinja      the template that it was trained with; the base model's own knows no tools
    system.txt               the system prompt that it was trained with
    tools.json               the tools on offer: description, JSON Schema of the arguments, hash of the code
    config.json              the resolved config of its loop, and the slice of it that each ancestor's stage has read
    manifest.json            its own manifest: recipe, inputs, hash of every file, metrics, versions, host
    ancestors/               the manifests of all that it was made from, and of its evaluations
    lineage.txt              the same as a tree
    {sums}               the hash of every file here: `sha256sum --check {sums}`

A manifest ends with `seal`, the sha256 of the manifest without it (JSON, sorted keys, indent 1), and its `fingerprint` is the
sha256 of the canonical JSON of its recipe. `digest` is taken over names, sizes and hashes of the content files; `inputs`
in the recipe name the digests of the ancestors.
"""


def export(store: Store, policy: Artifact, target: Path) -> Path:
    """Write the pack into the directory `target`, which must not exist; it is there whole or not at all.

    Raises UserError if there is something at `target`, the policy's files are damaged or dropped, or it has no template.
    """
    if target.exists():
        raise UserError(f"there is something at {target} already", hint="name a directory that does not exist")
    problems = store.verify(policy)
    if problems:
        raise UserError(f"{policy.reference} is damaged: {problems[0]}", hint="make it again with --force")
    files.make_directory(target.absolute().parent)
    with files.replacing(target.absolute()) as pack:
        pack.mkdir()
        fill(store, policy, pack)
        sums = [f"{files.sha256(pack / name)}  {name}\n" for name in files.files_under(pack)]
        (pack / SUMS).write_text("".join(sums))
    return target


def fill(store: Store, policy: Artifact, pack: Path) -> None:
    graph, name = Graph.of(store), str(policy.reference)
    shutil.copytree(policy.checked("policy"), pack / "policy")
    shutil.copyfile(policy.directory / MANIFEST, pack / MANIFEST)
    ancestors = [
        graph.artifacts[entry] for entry in sorted(graph.ancestors([name]) - {name}) if entry in graph.artifacts
    ]
    evaluations = [graph.artifacts[entry] for entry in graph.made.get(name, []) if entry.startswith("evaluation/")]
    (pack / "ancestors").mkdir()
    for artifact in (*ancestors, *evaluations):
        shutil.copyfile(
            artifact.directory / MANIFEST,
            pack / "ancestors" / f"{artifact.kind}-{artifact.fingerprint}-{artifact.attempt}.json",
        )
    loop = loop_of(store, policy)
    slices = {str(artifact.reference): artifact.manifest["recipe"]["config"] for artifact in (*ancestors, policy)}
    write_json(pack / "config.json", {"loop": loop.config if loop else None, "stages": slices})
    conversation = next(
        (
            config["conversation"]
            for config in reversed(slices.values())
            if "protocol" in config.get("conversation", {})
        ),
        {},
    )
    write_json(pack / "tools.json", definitions(conversation.get("tools")))
    system = loop.system if loop else conversation.get("system")
    (pack / "system.txt").write_text((system or "") + "\n", encoding="utf-8")
    (pack / "chat_template.jinja").write_text(template(pack / "policy"), encoding="utf-8")
    (pack / "lineage.txt").write_text("\n".join(draw(graph, name)) + "\n", encoding="utf-8")
    adaptation = policy.manifest["recipe"]["config"]["model"].get("adaptation", "full")
    text = README.format(version=__version__, adaptation=adaptation, sums=SUMS)
    (pack / "README.md").write_text(text, encoding="utf-8")


def loop_of(store: Store, policy: Artifact):
    """The record of the loop that made or used the policy; None if a single stage made it."""
    for record in records(store):
        if any(reference.digest == policy.digest for _, reference in record.references("policy")):
            return record
    return None


def template(policy: Path) -> str:
    """The chat template beside the weights or the adapter, as Jinja."""
    for path in sorted(policy.glob("*/chat_template.jinja")):
        return path.read_text(encoding="utf-8")
    for path in sorted(policy.glob("*/chat_template.json")):
        return json.loads(path.read_bytes())["chat_template"]
    for path in sorted(policy.glob("*/tokenizer_config.json")):
        if "chat_template" in (config := json.loads(path.read_bytes())):
            return config["chat_template"]
    raise UserError("the policy has no chat template", hint="put the base model's beside its tokenizer and train again")


def definitions(names: list[str] | None) -> dict:
    """The offered tools as this version of the code has them; None: all of them."""
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


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
