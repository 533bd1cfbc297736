"""Prefect's settings where the environment has none; imported before Prefect, which reads them once."""

import os

# Nothing is reported to anybody; people see progress bars, and Prefect's own log only from warnings on (the command line
# turns that off as well: it prints errors itself).
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
# A machine whose cores are all busy starts Prefect's embedded server in more than its 20 seconds.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
