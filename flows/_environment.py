"""Defaults of Prefect's settings; imported before Prefect, which reads the environment once."""

import os
import warnings

from thinkimg.environment import exempt_localhost

exempt_localhost(os.environ)
warnings.filterwarnings("ignore", message="Failed to create the Prefect home")  # a sentence follows
# No telemetry. People see progress bars, and Prefect's own log from warnings on. The command line turns that off too,
# as it prints errors itself.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
# On a busy machine Prefect's embedded server takes more than its default of 20 seconds to start.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
