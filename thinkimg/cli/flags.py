"""Flags that several verbs have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from thinkimg.config.tree import Config
    from thinkimg.store.artifacts import Store

ARTIFACT_HELP = "An artifact: the beginning of its fingerprint, or its path."

ArtifactFlag = Annotated[str, Parameter(help=ARTIFACT_HELP)]
PresetFlag = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or path of a YAML file.")]
SetFlag = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
DryRunFlag = Annotated[
    bool, Parameter(help="Print the resolved settings and the state of each stage; run nothing.", negative=[])
]
ForceFlag = Annotated[bool, Parameter(help="Make a new attempt even if there is one.", negative=[])]
JsonFlag = Annotated[bool, Parameter(name="--json", help="Print everything as JSON.", negative=[])]
StoreFlag = Annotated[Path, Parameter(name="--store", help="Root of the artifact store (where.store).")]


def open_config(preset: str, overrides: list[str] | None) -> "tuple[Config, Store]":
    """Return the resolved config and its store."""
    from thinkimg.config.load import load_config
    from thinkimg.store.artifacts import Store

    config = load_config(preset, overrides or ())
    return config, Store(config.where.store)
