"""examples/own_data.md as it stands: its files written, its commands run in order, its output compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

from thinkimg.store.artifacts import Store

PAGE = (REPOSITORY / "examples" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
POLICY = "d6250838"
"""The fingerprint in the page; a processor's last bits decide what it is elsewhere."""


@pytest.mark.long
def test_the_page_runs_as_it_stands(tmp_path):
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "160",
    }
    environment.pop("PREFECT_API_URL", None)
    store, output = Store(tmp_path / "artifacts"), ""
    for language, text in BLOCKS:
        if language == "text":
            check(text, output)
        elif language == "sh":
            if POLICY in text:
                *_, last = sorted(store.list("policy"), key=lambda policy: policy.manifest["finished"])
                text = text.replace(POLICY, last.fingerprint[:12])
            done = subprocess.run(
                ["bash", "-ec", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, text + done.stderr[-3000:]
            output = done.stdout + done.stderr
        else:
            name, _, body = text.removeprefix("# ").partition("\n")
            assert language == {".py": "python", ".yaml": "yaml"}[Path(name).suffix]
            (tmp_path / name).write_text(body)
    accuracies = [evaluation.metrics["accuracy"] for evaluation in store.list("evaluation")]
    assert len(accuracies) == 4 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert (tmp_path / "pack").is_dir()


def check(shown: str, output: str) -> None:
    """Compare the words of what the page shows with what was printed; numbers and fingerprints are a machine's own."""
    printed = set(re.findall(r"[A-Za-z]{3,}", output))
    for line in shown.splitlines():
        words = [word for word in re.findall(r"(?<!\S)\(?([A-Za-z]{3,})(?=[\s:.,)%]|$)", line)]
        assert set(words) <= printed, (line, sorted(set(words) - printed))
