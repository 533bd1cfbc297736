"""Limits on the settings of a deployment's run, which may come from whoever reaches Prefect's API.

The preset file is trusted: it lies on the worker's machine. Preset name and overrides of a run are not. They are
checked as data, before anything is imported, for an import alone runs code. docs/security.md says what this is worth.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from thinkimg.config.load import find_kind, get_subtree, list_presets, nest, read_preset
from thinkimg.config.values import read_value, split_override
from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.data.settings import SCHEMAS, SOURCES
from thinkimg.errors import UserError
from thinkimg.grpo.settings import LOSSES
from thinkimg.images.toolbox import TOOLS
from thinkimg.models.settings import FAMILIES
from thinkimg.registry import Registry
from thinkimg.rewards.settings import JUDGES, RULES
from thinkimg.user_paths import expand_path

CODE: dict[str, Registry | None] = {
    "conversation.protocol": PROTOCOLS,
    "conversation.tools": TOOLS,
    "data.schema": SCHEMAS,
    "data.source": SOURCES,
    "image.types": JUDGES,
    "model.tiny.family": FAMILIES,
    "rewards.functions": None,
    "rewards.rules": RULES,
    "train.loss.loss_type": LOSSES,
}
"""Settings that name code -> the registry whose entries anybody may name."""
WORDS = {"data.schema": ("auto", "none")}
"""Values of these settings that name no code."""
FIXED = ("model.trust_remote_code", "where")
"""Settings that a run can't override. `where` names addresses, keys, folders and a Dask cluster, whose answers are
pickles."""
REMOTE_CODE = ("model", "warmstart.checkpoint")
"""Settings that say whose code runs where the preset has model.trust_remote_code."""


def check_run(preset: str, overrides: Iterable[str]) -> None:
    """Raise UserError, with one sentence, for what the run of a deployment may not set or name."""
    # In folders below others may write: MLflow's server stores uploads, a data set is downloaded.
    if preset not in list_presets() and Path(expand_path(preset)).resolve().parent != Path.cwd().resolve():
        raise UserError(
            f"The run of a deployment can't use the preset {preset}, which does not lie in its working directory.",
            hint=f"Put the file into {Path.cwd()} itself.",
        )
    tree = read_preset(preset)
    allowed = texts(value_at(tree, "where.functions_allow"))
    fixed = FIXED + (REMOTE_CODE if value_at(tree, "model.trust_remote_code") else ())
    for key, text in map(split_override, overrides):
        keys = key.split(".")
        override = nest(keys, read_value(key, text, find_kind(keys, tree)))
        for path in fixed:
            below = f"{key}.".startswith(f"{path}.")
            if below or value_at(override, path) is not None:
                name = key if below else path
                raise UserError(f"The run of a deployment can't set {name}.", hint="Set it in the preset file.")
        for path, registry in CODE.items():
            trusted = {*texts(value_at(tree, path)), *(registry or ()), *WORDS.get(path, ())}
            for name in texts(value_at(override, path)):
                if name not in trusted and not is_allowed(name, allowed):
                    raise UserError(
                        f"The run of a deployment can't name {name} in {path}.",
                        hint="Name it in the preset file, or its module there in where.functions_allow.",
                    )


def is_allowed(name: str, allowed: Iterable[str]) -> bool:
    """Tell whether a name such as my_project.rewards:score is in, or below, one of the allowed modules."""
    module = name.partition(":")[0]
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed)


def value_at(tree: Mapping[str, Any], path: str) -> Any:
    """Return what a tree says at a dotted path; None where it says nothing."""
    *above, last = path.split(".")
    return get_subtree(above, tree).get(last)


def texts(value: Any) -> list[str]:
    """Return the texts in a value of any form; what is no text, such as bytes, is written out, which names nothing."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set):
        return [text for item in value for text in texts(item)]
    return [value if isinstance(value, str) else repr(value)]
