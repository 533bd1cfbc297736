"""Check of a model's own files against its family, before anything of it is loaded."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from thinkimg.errors import UserError, shorten
from thinkimg.images.patches import TEMPORAL
from thinkimg.models.family import Family, find_family, read_model_type
from thinkimg.models.settings import ModelConfig

RESCALE = 1 / 255


def check_files(directory: Path, model: ModelConfig) -> Family:
    """Return the family of a model directory that can be trained as the settings say.

    Raises UserError for an unknown family, for a model that can't be trained so, and where the model's files state
    another grid or another normalisation of images than its family.
    """
    model_type = read_model_type(directory / "config.json")
    family = find_family(model_type)
    check_experts(family, model_type, model)
    check_values(directory / "config.json", "vision_config", grid_of(family, "spatial_merge_size"), family)
    processor = grid_of(family, "merge_size") | {
        "image_mean": family.processor.mean,
        "image_std": family.processor.std,
        "rescale_factor": RESCALE,
    }
    check_values(directory / "preprocessor_config.json", None, processor, family)
    check_values(directory / "processor_config.json", "image_processor", processor, family)
    return family


def check_experts(family: Family, model_type: str, model: ModelConfig) -> None:
    """Raise UserError for a model that can't be trained as the settings say. model_type: of its config.json."""
    if obstacle := family.experts_obstacle(model_type, model.adaptation):
        raise UserError(f"The model can't be trained: {obstacle}.", hint="Set model.path to a dense model.")


def grid_of(family: Family, merge: str) -> dict[str, object]:
    """Return the values of a family's grid by their names in a file. merge: name of the patches of a token's side."""
    return {"patch_size": family.processor.patch, merge: family.processor.merge, "temporal_patch_size": TEMPORAL}


def check_values(file: Path, section: str | None, expected: Mapping[str, object], family: Family) -> None:
    """Raise UserError if a JSON file states other values than these. A file or a key may be missing.

    section: key of the object that states them; None: the file's own.
    """
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_bytes())
        stated = content if section is None else content.get(section) or {}
        different = {name: stated[name] for name in expected if name in stated and stated[name] is not None}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} can't be read: {shorten(str(error))}") from error
    for name, value in different.items():
        if not is_equal(value, expected[name]):
            raise UserError(
                f"{file} states {name} = {shorten(json.dumps(value))}, and models of the family {family.name} have "
                f"{json.dumps(expected[name])}.",
                hint="Restore the model's own file; a model that is made so needs a family of its own, an entry point "
                "of the group thinkimg.families.",
            )


def is_equal(value: object, expected: object) -> bool:
    """Tell whether a value of a JSON file is the expected number, or the expected numbers in order."""
    if isinstance(expected, tuple):
        return isinstance(value, list) and len(value) == len(expected) and all(map(is_equal, value, expected))
    assert isinstance(expected, int | float)
    return isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-6)
