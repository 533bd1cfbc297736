"""Recorder of the flows' forms.

`python tests/support/forms.py` compares with tests/support/golden/forms.json, `--write` records.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "golden" / "forms.json"
FORMS = ("loop", "prepare", "warmstart", "rollout", "score", "train", "evaluate")


def form(name: str) -> dict[str, Any]:
    """The form of a flow, as its deployment has it: flow's name, description, and the JSON Schema of its parameters."""
    flow = getattr(import_module(f"flows.{name}"), name)
    schema = json.loads(flow.parameters.model_dump_json())
    fields = schema.pop("properties")
    return {"name": flow.name, "description": flow.description, "schema": schema, "fields": fields}


def recorded() -> dict[str, dict[str, Any]]:
    """Flow -> its form, as it was written down."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write(forms: dict[str, dict[str, Any]]) -> None:
    """Write forms down, a field per line."""
    entries = []
    for name, entry in forms.items():
        about = json.dumps({key: value for key, value in entry.items() if key != "fields"}, ensure_ascii=False)
        fields = (
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entry["fields"].items()
        )
        entries.append(f'{json.dumps(name)}: {about[:-1]}, "fields": {{\n' + ",\n".join(fields) + "\n}}")
    RECORD.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    forms = {name: form(name) for name in FORMS}
    if "--write" in sys.argv:
        write(forms)
    else:
        different = [name for name in FORMS if forms[name] != recorded()[name]]
        print("\n".join(different) or "every form is as recorded")
        sys.exit(bool(different))
