"""One file per member of the loss family: its name is a value of `loss_type` (one with an underscore is a helper)."""

import pkgutil

# Listed, not imported: the configuration needs the names, and must not wait for torch.
NAMES: tuple[str, ...] = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))
