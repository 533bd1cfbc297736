"""Living processes, as tests look for them."""

from pathlib import Path


def title(pid: int) -> str:
    """A living process's command line, "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
