"""Verb `view`: a log of Inspect, of all conversations of an artifact."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from thinkimg.cli.flags import PresetFlag, SetFlag, open_config, read_path, read_reference

REFERENCE_HELP = "Rollouts, scores, or an evaluation: the beginning of the fingerprint, or the path."


def view(
    reference: Annotated[str, Parameter(help=REFERENCE_HELP, converter=read_reference)],
    /,
    *,
    log_dir: Annotated[Path, Parameter(help="Folder of the logs; it is made.", converter=read_path)] = Path("logs"),
    preset: PresetFlag = "development",
    set: SetFlag = None,
) -> None:
    """Write all conversations of an artifact as a log of Inspect, with scores and advantages (extra `inspect`)."""
    from thinkimg.analysis.inspect_log import load_inspect, write_log
    from thinkimg.analysis.view import View
    from thinkimg.console import note

    config, store = open_config(preset, set)
    artifact = store.resolve(reference)
    load_inspect()
    print(write_log(View(store, artifact, config), log_dir))
    note(f"Look at it: inspect view --log-dir {shlex.quote(str(log_dir))}")
