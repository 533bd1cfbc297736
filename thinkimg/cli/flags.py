"""Flags that several verbs have."""

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from thinkimg.errors import UserError, shorten
from thinkimg.user_paths import expand_path

if TYPE_CHECKING:
    from thinkimg.config.tree import Config
    from thinkimg.store.artifacts import Store

ARTIFACT_HELP = "An artifact: the beginning of its fingerprint, or its path."


def read_path(kind: Any, tokens: Sequence[Token]) -> Path:
    """Return the path that a flag names."""
    return Path(expand_path(tokens[0].value))


def read_paths(kind: Any, tokens: Sequence[Token]) -> list[Path]:
    """Return the paths that a flag names, which is given several times."""
    return [read_path(kind, [token]) for token in tokens]


def read_reference(kind: Any, tokens: Sequence[Token]) -> str:
    """Return the reference of an artifact, or its path."""
    return expand_path(tokens[0].value)


ArtifactFlag = Annotated[str, Parameter(help=ARTIFACT_HELP, converter=read_reference)]
PresetFlag = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or path of a YAML file.")]
SetFlag = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
DryRunFlag = Annotated[
    bool, Parameter(help="Print the resolved settings and the state of each stage; run nothing.", negative=[])
]
ForceFlag = Annotated[bool, Parameter(help="Make a new attempt even if there is one.", negative=[])]
JsonFlag = Annotated[bool, Parameter(name="--json", help="Print everything as JSON.", negative=[])]
PortFlag = Annotated[int, Parameter(help="Port to listen on.", validator=Number(gte=1, lte=65535))]
StoreFlag = Annotated[
    Path, Parameter(name="--store", converter=read_path, help="Root of the artifact store (where.store).")
]


def check_port(host: str, port: int) -> None:
    """Raise UserError if no server can listen on a port, and name a free one."""
    from thinkimg.process import free_port

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"There is no address {shorten(host)}.", hint="Correct --host.") from None
    try:
        with socket.create_server(address, family=family):
            pass
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"{host} is no address of this machine.", hint="Correct --host.") from None
        message = f"Port {port} of {host} can't be used: {os.strerror(error.errno or 0)}."
        raise UserError(message, hint=f"Take another: --port {free_port()}.") from None


def open_config(preset: str, overrides: list[str] | None) -> "tuple[Config, Store]":
    """Return the resolved config and its store."""
    from thinkimg.config.load import load_config
    from thinkimg.store.artifacts import Store

    config = load_config(preset, overrides or ())
    return config, Store(config.where.store)
