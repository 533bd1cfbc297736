"""Environment and defaults of Prefect's settings; imported before Prefect, which reads both once."""

import os
import warnings

import httpx

from thinkimg.environment import drop_empty, exempt_localhost
from thinkimg.http_clients import make_client
from thinkimg.redaction import redact_logs

drop_empty(os.environ)
redact_logs()
exempt_localhost(os.environ)
# Prefect's import makes a client, and its clients read certificates and proxies even for this machine.
make_client(httpx.Client, "example.org").close()
warnings.filterwarnings("ignore", message="Failed to create the Prefect home")  # a sentence follows
# No telemetry. People see progress bars, and Prefect's own log from warnings on. The command line turns that off too,
# as it prints errors itself.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
# On a busy machine Prefect's embedded server takes more than its default of 20 seconds to start.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
