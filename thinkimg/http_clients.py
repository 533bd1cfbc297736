"""Clients of servers elsewhere, by httpx: with the proxies and certificates that the environment names, or a sentence.

urls (images), endpoint (teacher), verifiers, flows/_server (Prefect's own clients) ──► make_client
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from thinkimg.environment import PROXIES, is_loopback
from thinkimg.errors import UserError

C = TypeVar("C")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")


def make_client(kind: Callable[..., C], host: str, **options: Any) -> C:
    """Return a client for a host of a URL; a server of this machine is asked without a proxy.

    kind: httpx.Client, httpx.AsyncClient, or one of openai's, which has an httpx of its own. options: its arguments.
    Raises UserError, which names the variable, for certificates or a proxy of the environment that can't be used. A
    proxy may hold a password, so that nothing of it is shown.
    """
    try:
        return kind(trust_env=not is_loopback(host), **options)
    except OSError as error:
        paths = {name: os.environ[name] for name in CERTIFICATES if os.environ.get(name)}
        paths = {name: path for name, path in paths.items() if not os.path.exists(path)} or paths
        listed = ", ".join(f"{name}={path}" for name, path in paths.items())
        raise UserError(
            f"The certificates that the environment names can't be used: {listed or os.strerror(error.errno or 0)}.",
            hint="Correct the variable, or unset it.",
        ) from error
    except Exception as error:
        if not isinstance(error, ValueError | ImportError) and type(error).__name__ != "InvalidURL":
            raise
        names = [name for proxy in PROXIES for name in (proxy, proxy.lower()) if os.environ.get(name)]
        names = [name for name in names if name.upper() != "NO_PROXY"] or names  # where we put in localhost
        way = "Run pip install 'httpx[socks]'" if isinstance(error, ImportError) else "Write it as http://host:8080"
        raise UserError(
            f"The environment names a proxy that can't be used: {', '.join(names)}.",
            hint=f"{way}, or unset the variable.",
        ) from error
