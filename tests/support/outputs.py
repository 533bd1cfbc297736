"""Recorder of outputs: a small loop with four judges, and the fingerprint and content digest of all that it made.

    python tests/support/outputs.py > before.json       at one commit
    python tests/support/outputs.py > after.json        at another, on the same machine: the two are equal byte by byte

A refactoring changes neither. Digests are no part of the repository: their last bits are a processor's own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    "iterations=2", "data.train=24", "data.held_out=8", "warmstart.steps=20", "warmstart.pairs=24",
    "warmstart.batch=16",
    "rollout.samples=4", "rollout.group_size=4", "evaluate.samples=4", "evaluate.samples_ends=8", "evaluate.k=2",
    "image.types=[self, teacher, attention, embedding]", "mix={format: 0.2, tool: 0.3, answer: 0.3, image: 0.2}",
    "image.only_if_right=false", "train.parity.max_kl=1.0",
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "artifacts")
        words = [word for setting in [*SETTINGS, f"where.store={store}"] for word in ("--set", setting)]
        command = [str(Path(sys.executable).with_name("thinkimg")), "run", "--preset", "tiny", *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
        manifests = [json.loads(path.read_text()) for path in store.glob("*/*/*/manifest.json")]
    manifests.sort(key=lambda manifest: manifest["finished"])
    rows = [
        {
            "kind": manifest["kind"],
            "stage": manifest["recipe"]["stage"],
            "fingerprint": manifest["fingerprint"],
            "digest": manifest["digest"],
            "metrics": {
                k: v for k, v in sorted(manifest["metrics"].items()) if "seconds" not in k and "memory" not in k
            },
        }
        for manifest in manifests
    ]
    rows.sort(key=lambda row: (row["stage"], row["fingerprint"]))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
