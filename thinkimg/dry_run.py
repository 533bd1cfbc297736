"""Dry run: the stages of a plan, with what the store has of them, what is missing, and what must wait."""

from collections.abc import Iterator

from thinkimg.errors import UserError
from thinkimg.scheduler import Handle, Plan
from thinkimg.stages.build import complete_inputs
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact


def preview(plan: Plan, store: Store) -> Iterator[str]:
    """Yield one line per stage, in order. The fingerprint of a stage is unknown until all its inputs are complete."""
    artifacts: dict[Handle, Artifact] = {}
    for handle in plan.handles:
        label, kind = f"{plan.label(handle):<14}", handle.stage.makes.KIND
        missing = [item for item in handle.given.values() if isinstance(item, Handle) and item not in artifacts]
        if missing:
            yield f"{label} waits for {', '.join(dict.fromkeys(map(plan.label, missing)))}"
            continue
        given = {role: artifacts[item] if isinstance(item, Handle) else item for role, item in handle.given.items()}
        try:
            inputs = complete_inputs(handle.stage, plan.config, given, store)
            fingerprint = handle.stage.recipe(handle.settings, inputs).fingerprint
            warning = handle.stage.warn(handle.settings, inputs, store)
        except UserError as error:
            yield f"{label} can't run: {error}"
            continue
        if artifact := store.find(kind, fingerprint):
            artifacts[handle] = artifact
        yield f"{label} {'Cached ' if artifact else 'missing'} {kind}/{fingerprint[:12]}"
        if warning:
            yield f"{'':<14} {warning}"
