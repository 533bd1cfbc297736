"""What a run would do, without doing it: which boxes are Cached, which are missing, and which wait for those."""

from collections.abc import Iterator

from thinkimg.errors import UserError
from thinkimg.scheduler import Handle, Plan
from thinkimg.stages.stage import complete
from thinkimg.store.artifacts import Artifact, Store


def look(plan: Plan, store: Store) -> Iterator[str]:
    """Yield one line per box, in order; a fingerprint depends on the content of all inputs, so that it may not be known."""
    there: dict[Handle, Artifact] = {}
    for handle in plan.handles:
        label = f"{plan.label(handle):<14}"
        missing = [one for one in handle.given.values() if isinstance(one, Handle) and one not in there]
        if missing:
            yield f"{label} waits for {', '.join(dict.fromkeys(plan.label(one) for one in missing))}"
            continue
        given = {role: there[one] if isinstance(one, Handle) else one for role, one in handle.given.items()}
        try:
            recipe = handle.stage.recipe(handle.settings, complete(handle.stage, plan.config, given, store))
        except UserError as error:
            yield f"{label} can't run: {error}"
            continue
        found = store.find(handle.stage.makes.KIND, recipe.fingerprint)
        if found is not None:
            there[handle] = found
        yield f"{label} {'Cached ' if found else 'missing'} {handle.stage.makes.KIND}/{recipe.fingerprint[:12]}"
