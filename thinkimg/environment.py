"""Environments of our own processes, made by rule; and HTTP to servers on localhost, which never uses a proxy.

A child gets what its kind needs, not what the caller's shell happens to hold. A shell may hold keys of other services,
a launcher's rank variables, proxies, settings of another vLLM. Whoever misses one names it in THINKIMG_ENVIRONMENT.

    spawn, Popen, exec ◄── child_environment(kind, os.environ) ◄── RULES[kind]
"""

import ipaddress
import os
import urllib.request
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Kind = Literal["tool", "maths", "engine", "prefect", "mlflow", "trainer"]

PACKAGE_ROOT = Path(__file__).parents[1]
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# A name that ends in "_" stands for all that begin with it.
MACHINE = (
    "PATH", "HOME", "PWD", "USER", "LOGNAME", "SHELL", "TERM", "COLUMNS", "LANG", "LANGUAGE", "LC_", "TZ", "TMPDIR",
    "TEMP", "TMP", "XDG_", "LD_", "NIX_", "CONDA_PREFIX", "VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
PYTHON = (
    "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONNOUSERSITE", "PYTHONUSERBASE",
    "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER",
)  # fmt: skip
COMPUTE = (
    "CUDA_", "NVIDIA_", "NCCL_", "NVSHMEM_", "NVCC_", "CUDNN_", "CUBLAS_", "CUTLASS_", "CUTE_", "CUPY_", "HIP_",
    "ROCM_", "ROCR_", "HSA_", "GLOO_", "TP_", "UCX_", "FI_", "IBV_", "RDMAV_", "OMP_", "KMP_", "GOMP_", "MKL_",
    "OPENBLAS_", "BLIS_", "NVPL_", "DNNL_", "ONEDNN_", "ATEN_", "NUMBA_", "MALLOC_", "TCMALLOC_", "TORCH_",
    "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "FLASHINFER_", "DG_", "TVM_", "CC", "CXX", "CPATH",
    "LIBRARY_PATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "MAX_JOBS", "MPLCONFIGDIR", "CUDAHOSTCXX", "CUDACXX",
    "CFLAGS", "CXXFLAGS", "LDFLAGS", "CONDA_BUILD_SYSROOT", "COMPILER_PATH", "MLX5_", "PSM2_", "PSM3_", "SHARP_",
    "OFI_NCCL_",
)  # fmt: skip
# Kernels, caches and time-outs. Others say who is let in, where vLLM listens, and what else it does.
VLLM = (
    "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_ASSETS_CACHE", "VLLM_LOGGING_LEVEL", "VLLM_CPU_",
    "VLLM_CUDART_SO_PATH", "VLLM_CUDA_", "VLLM_ENABLE_CUDA_COMPATIBILITY", "VLLM_ENABLE_CUDAGRAPH_GC", "VLLM_NCCL_",
    "VLLM_ROCM_", "VLLM_ALLREDUCE_", "VLLM_FLASHINFER_", "VLLM_USE_FLASHINFER_", "VLLM_USE_DEEP_GEMM",
    "VLLM_USE_DEEP_GEMM_", "VLLM_DEEP_GEMM_", "VLLM_MARLIN_", "VLLM_MOE_", "VLLM_DISABLED_KERNELS",
    "VLLM_DISABLE_PYNCCL", "VLLM_DISABLE_COMPILE_CACHE", "VLLM_SKIP_P2P_CHECK", "VLLM_TRITON_",
    "VLLM_TUNED_CONFIG_FOLDER", "VLLM_USE_AOT_COMPILE", "VLLM_USE_STANDALONE_COMPILE", "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_WEIGHT_OFFLOADING_", "VLLM_FLOAT32_MATMUL_PRECISION", "VLLM_BATCH_INVARIANT",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_ENGINE_READY_TIMEOUT_S",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS",
)  # fmt: skip
MODEL_CACHES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HUGGINGFACE_ASSETS_CACHE", "TORCH_HOME",
)  # fmt: skip
DATABASE = (
    "PGPASSWORD", "PGPASSFILE", "PGUSER", "PGHOST", "PGPORT", "PGDATABASE", "PGSERVICE", "PGSERVICEFILE", "PGSSLMODE",
    "PGSSLCERT", "PGSSLKEY", "PGSSLROOTCERT", "MYSQL_PWD",
)  # fmt: skip
BROWSER = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY")
HUB = ("HF_", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
NOTHING_IF_EMPTY = (
    "PREFECT_", "MLFLOW_", "OPENAI_", "XDG_", *MODEL_CACHES, *HUB, "HOME", "TMPDIR", "TEMP", "TMP", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "SSLKEYLOGFILE",
)  # fmt: skip

CONNECTION_ERRORS = (OSError, HTTPException)
"""Errors of `open_local`, and of reading its answer: URLError, HTTPError and time-outs are OSErrors."""
NAMED_BY_USER = "THINKIMG_ENVIRONMENT"
"""Variable with names of further variables, separated by commas, that engine and trainer get."""


@dataclass(frozen=True)
class Rule:
    """Variables of the caller that a kind of child gets, and those that are set for it."""

    keeps: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    open_to_user: bool = False
    """True where the names in THINKIMG_ENVIRONMENT are kept, too."""


RULES: Mapping[Kind, Rule] = MappingProxyType(
    {
        # git, nvidia-smi
        "tool": Rule((*MACHINE, *COMPUTE)),
        # sympy's order of terms follows from hashes
        "maths": Rule((*MACHINE, *PYTHON), {"PYTHONHASHSEED": "0"}),
        # It talks to nobody outside: weights and images are files of this machine.
        "engine": Rule(
            (*MACHINE, *PYTHON, *COMPUTE, *VLLM, *MODEL_CACHES),
            {
                "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /pause, /update_weight_version
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_HOST_IP": "127.0.0.1",  # else it asks for its address by a socket to 8.8.8.8
                "DO_NOT_TRACK": "true",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
            open_to_user=True,
        ),
        "prefect": Rule((*MACHINE, *PYTHON, *DATABASE), {"DO_NOT_TRACK": "true"}),
        "mlflow": Rule(
            (*MACHINE, *PYTHON, *DATABASE, *BROWSER, "MLFLOW_SERVER_", "MLFLOW_SQLALCHEMYSTORE_"),
            {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
        ),
        # It downloads a base model of the Hub, and runs a user's losses.
        "trainer": Rule(
            (*MACHINE, *PYTHON, *COMPUTE, *MODEL_CACHES, *HUB, *PROXIES, *map(str.lower, PROXIES)),
            {"TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1"},
            open_to_user=True,
        ),
    }
)


def child_environment(
    kind: Kind, base: Mapping[str, str], settings: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Return the environment of a child: of the caller's variables those of its rule, and what is set for it.

    base: the caller's. settings: of this one child. The working directory does not come ahead of the installed
    packages, neither in the child nor in its own children.
    """
    rule = RULES[kind]
    keeps = rule.keeps
    if rule.open_to_user:
        keeps += tuple(name.strip() for name in base.get(NAMED_BY_USER, "").split(","))
    environment = {name: value for name, value in base.items() if is_among(name, keeps)} | dict(rule.settings)
    if not set(PROXIES).isdisjoint(keeps):
        exempt_localhost(environment)
    if path := python_path(base.get("PYTHONPATH", "")):
        environment["PYTHONPATH"] = path
    environment["PYTHONSAFEPATH"] = "1"  # as -P, for the child's own children as well
    return environment | dict(settings)


def is_among(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a variable is one of these, or begins with one that ends in "_"."""
    return any(name.startswith(pattern) if pattern.endswith("_") else name == pattern for pattern in patterns)


def python_path(value: str) -> str:
    """Return PYTHONPATH with absolute entries, without those that are the working directory.

    This package's own directory is added where it is not installed.
    """
    here = os.path.realpath(os.curdir)
    entries = [os.path.abspath(entry) for entry in value.split(os.pathsep) if entry and os.path.realpath(entry) != here]
    if not is_installed() and str(PACKAGE_ROOT) not in entries:
        entries.append(str(PACKAGE_ROOT))
    return os.pathsep.join(entries)


def is_installed() -> bool:
    """Tell whether this very package is an installed one, also from a clone (pip install -e)."""
    try:
        installed = distribution("thinkimg")
    except PackageNotFoundError:
        return False
    origin = installed.read_text("direct_url.json") or ""
    return Path(str(installed.locate_file(""))) == PACKAGE_ROOT or f'"{PACKAGE_ROOT.as_uri()}"' in origin


def exempt_localhost(environment: MutableMapping[str, str]) -> None:
    """Add localhost to NO_PROXY, in both spellings; the user's own exceptions stay, those of both spellings.

    For the clients of Prefect, MLflow and openai, which heed proxies, and talk to servers of this machine as well.
    """
    hosts = [
        host.strip()
        for name in ("no_proxy", "NO_PROXY")
        for host in environment.get(name, "").split(",")
        if host.strip()
    ]
    exceptions = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))
    environment["no_proxy"] = environment["NO_PROXY"] = "*" if "*" in hosts else exceptions


def drop_empty(environment: MutableMapping[str, str]) -> None:
    """Remove variables that hold nothing, as Compose and CI pass those that nobody has set.

    Their readers take "" for a value: an API without an address, a folder that is the working directory. The others
    stay: an empty CUDA_VISIBLE_DEVICES hides all GPUs, an empty http_proxy stands for none in place of HTTP_PROXY.
    """
    for name in [name for name, value in environment.items() if not value.strip() and is_among(name, NOTHING_IF_EMPTY)]:
        del environment[name]


def is_loopback(host: str) -> bool:
    """Tell whether a host of a URL is this machine: localhost and its subdomains, 127.0.0.0/8, ::1."""
    host = host.lower().rstrip(".").strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_local(url: str, timeout: float, body: bytes | None = None) -> HTTPResponse:
    """Open a URL of a server on this machine, without proxies. Raises CONNECTION_ERRORS.

    body: JSON to POST; None for a GET.
    """
    headers = {} if body is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)


def is_healthy(url: str) -> bool:
    """Tell whether a server on this machine answers a GET request with status 200."""
    try:
        with open_local(url, timeout=5) as response:
            return response.status == 200
    except CONNECTION_ERRORS:  # not listening yet, or not ready
        return False
