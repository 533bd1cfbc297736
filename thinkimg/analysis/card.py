"""Model card of an exported policy: its settings for the Hub, held-out figures with intervals, licences, an example."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data.hub.public_sets import PublicSet, is_id, public_sets
from thinkimg.data.tables.find import fits
from thinkimg.records import PUZZLES, Coordinates
from thinkimg.store.manifest import Artifact

HUB_ID = re.compile(r"(?!model/)[\w.-]+/[\w.-]+")
"""Id of a model on the Hub; the name `model/<digest>` is that of a directory."""
FROM_THE_HUB = ("files", "hub")
"""Sources whose recorded name is an id of the Hub, unless they read files of the trainer's machine."""

EXAMPLE = '''"""Ask the policy about a picture, for its first turn: python example.py picture.png "What is it?"."""

import sys
from pathlib import Path

from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

pack = Path(__file__).parent
weights = pack / "policy" / "{part}"
processor = AutoProcessor.from_pretrained(weights, min_pixels={min_pixels}, max_pixels={max_pixels})
model = AutoModelForImageTextToText.from_pretrained(weights, dtype="auto")
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
_, rows, columns = processor.image_processor(image, return_tensors="pt")["image_grid_thw"][0].tolist()
patch = processor.image_processor.patch_size
question = f"Image 0: {size}. {{sys.argv[2]}}\\nAnswer with a word or a short phrase."
system = (pack / "system.txt").read_text(encoding="utf-8")[:-1]
content = [{{"type": "image"}}, {{"type": "text", "text": question}}]
messages = [{{"role": "system", "content": system}}] if system else []
messages += [{{"role": "user", "content": content}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(tokens, skip_special_tokens=False))
'''
SIZES = {
    Coordinates.PIXELS: "{columns * patch}x{rows * patch} pixels",
    Coordinates.THOUSANDTHS: "1000x1000 thousandths",
}
"""Unit of coordinates -> size of a picture as the example states it, in the braces of an f-string."""


def write_example(part: str, images: Mapping[str, Any], conversation: Mapping[str, Any], unit: Coordinates) -> str:
    """Return a script that asks an exported policy for its first turn, with Hugging Face's libraries alone.

    part: "model" or "adapter". images, conversation: settings of the policy's rollouts.
    """
    return EXAMPLE.format(
        part=part,
        min_pixels=images["min_pixels"],
        max_pixels=images["max_pixels"],
        size=SIZES[unit],
        tokens=conversation.get("max_turn_tokens", ConversationConfig().max_turn_tokens),
    )


SERVING = """With vLLM it is served by

    vllm serve {model} --served-model-name {served} --dtype {dtype} \\
        --chat-template chat_template.jinja --generation-config {generation} \\
        --max-model-len {tokens} --limit-mm-per-prompt '{{"image": {images}}}' \\
        --mm-processor-kwargs '{{"size": {{"shortest_edge": {min_pixels}, "longest_edge": {max_pixels}}}}}'{flags}

{base}It samples as in the rollouts, and greedily with `"temperature": 0`. It does not read `suppress_tokens` of
{generation}/generation_config.json, the tokens that the policy never writes: give each a `logit_bias` of -100.
"""
ADAPTER = """ \\
        {revision}--enable-lora --max-lora-rank {rank} --lora-modules policy={directory}"""
BASE = "BASE"
"""Placeholder of a base model that has no address: a directory of the trainer's machine."""
BASE_NOTE = """BASE stands for a directory: that of the base model that the adapter was trained on. No other fits.

"""


def write_serving(
    weights: Path, images: Mapping[str, Any], conversation: Mapping[str, Any], model: Mapping[str, Any]
) -> str:
    """Return how vLLM serves an exported policy, in Markdown.

    weights: folder with `model/` or `adapter/`. images, conversation: settings of the policy's rollouts. model: those
    of its training.
    """
    name, flags = name_model(weights)
    return SERVING.format(
        model=name,
        served="base" if flags else "policy",
        dtype=model.get("dtype", "auto"),
        generation=f"policy/{'adapter' if flags else 'model'}",
        tokens=conversation.get("max_tokens", ConversationConfig().max_tokens),
        images=conversation.get("max_images", ConversationConfig().max_images),
        min_pixels=images["min_pixels"],
        max_pixels=images["max_pixels"],
        flags=flags,
        base=BASE_NOTE if name == BASE else "",
    )


def name_model(weights: Path) -> tuple[str, str]:
    """Return the model that vLLM loads, and the flags that add the policy's adapter: "" where it has none.

    weights: folder with `model/` or `adapter/`. The model of an adapter is its base: an id of the Hub, or BASE.
    """
    directory = weights / "adapter"
    if not directory.is_dir():
        return "policy/model", ""
    settings = json.loads((directory / "adapter_config.json").read_bytes())
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    flags = ADAPTER.format(
        revision=f"--revision {revision} " if revision else "", rank=settings["r"], directory="policy/adapter"
    )
    return name if HUB_ID.fullmatch(name) else BASE, flags


def front_matter(base: str, *, is_adapter: bool) -> str:
    """Return the settings of a card at its beginning, as the Hub reads them. base: name of the base model."""
    settings: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["thinkimg", "grpo"],
    }
    if HUB_ID.fullmatch(base):
        settings["base_model"] = base
    return f"---\n{yaml.safe_dump(settings, sort_keys=True)}---\n"


def held_out_lines(evaluations: Sequence[Artifact]) -> Iterator[str]:
    """Yield a table of held-out figures with their 95 % intervals; a sentence where the policy was not evaluated."""
    yield "## Held-out figures"
    yield ""
    if not evaluations:
        yield "The policy was not evaluated."
        return
    headings = "samples | judged | accuracy, greedy | of k sampled answers | chance | images of tools | data set"
    yield f"| {headings} | evaluation |"
    yield "|---|---|---|---|---|---|---|---|"
    for evaluation in evaluations:
        config, metrics = evaluation.manifest["recipe"]["config"], evaluation.metrics
        k = f" (k = {config['k']})" if config.get("k") else ""
        dataset = evaluation.inputs["dataset"]
        cells = [show_count(metrics, "trajectories"), show_count(metrics, "judged"), show_interval(metrics, "accuracy")]
        cells += [show_interval(metrics, "avg_at_k") + k, show_percentage(metrics, "chance")]
        cells += ["grey" if config.get("blind") else "seen", (dataset.fingerprint or dataset.digest)[:12]]
        cells += [evaluation.short]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Percentages, with 95 % intervals: Wilson's for greedy answers, a bootstrap over questions for sampled ones."


def show_count(metrics: Mapping[str, Any], name: str) -> str:
    """Return a number of samples as text; a dash for none."""
    value = metrics.get(name)
    return "–" if value is None else f"{value:,.0f}"


def show_percentage(metrics: Mapping[str, Any], name: str) -> str:
    """Return a share in percent as text; a dash for none."""
    value = metrics.get(name)
    return "–" if value is None else f"{100 * value:.4g}"


def show_interval(metrics: Mapping[str, Any], name: str) -> str:
    """Return a share with its interval, in percent."""
    if metrics.get(name) is None:
        return "–"
    value, low, high = (show_percentage(metrics, key) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} to {high})"


def licence_lines(base: str, revision: str | None, datasets: Sequence[Artifact]) -> Iterator[str]:
    """Yield where the licences of base model and data are stated. datasets: all that the policy was trained on."""
    yield "## Licences"
    yield ""
    yield f"- {describe_base(base, revision)}"
    recorded = [dataset.manifest["recipe"]["config"].get("data", {}) for dataset in datasets]
    yield from dict.fromkeys(f"- {describe_data(data)}" for data in recorded or [{}])


def describe_base(base: str, revision: str | None) -> str:
    """Return a sentence on the licence of the base model, as its own card states it; "" is not known."""
    if not base:
        return "Base model: not known."
    if base == "tiny":
        return "Base model: created by thinkimg, with random weights; no licence of others holds."
    if HUB_ID.fullmatch(base):
        at = f" at {revision}" if revision else ""
        return (
            f"Base model: {base}{at}. The licence on its page, https://huggingface.co/{base}, holds for these weights."
        )
    return "Base model: a directory of the trainer's machine. Ask whoever trained the policy for its licence."


def describe_data(data: Mapping[str, Any]) -> str:
    """Return a sentence on the licence of the data. data: as the recipe of a data set records them."""
    if not data:
        return "Data: not known."
    if data.get("source") == PUZZLES:
        return "Data: the puzzles that thinkimg draws, on photographs of scikit-image (docs/licences.md of thinkimg)."
    repository = str(data.get("name")).partition("@")[0]
    if data.get("source") not in FROM_THE_HUB or not is_id(repository):
        return "Data: a user's own. Ask whoever trained the policy for its licence."
    page = f"see https://huggingface.co/datasets/{repository}"
    public_set = find_public_set(repository, data.get("schemas", []))
    if public_set is None:
        return f"Data: {repository}, {page}."
    licence = page if public_set.licence is None else public_set.licence.value
    return f"Data: {public_set.name} ({repository}), {licence}."


def find_public_set(repository: str, schemas: Sequence[Sequence[str]]) -> PublicSet | None:
    """Return the one public data set that has all these tables; None where none has, or several.

    schemas: (table, schema, version) of each table that was read.
    """
    sets = [
        public_set
        for public_set in public_sets().values()
        if public_set.repository == repository
        and all(
            schema == public_set.schema and (public_set.files is None or fits(table, "|".join(public_set.files.value)))
            for table, schema, _ in schemas
        )
    ]
    return sets[0] if schemas and len(sets) == 1 else None
