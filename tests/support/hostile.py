"""Variables of a shell in which nothing of ours is to go wrong: other launchers', other servers', keys, proxies."""

import os
import subprocess
from pathlib import Path

CANARY = "canary-4711"

KEYS = dict.fromkeys(
    [
        "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "ANTHROPIC_API_KEY", "GEMINI_API_KEY",
        "AZURE_OPENAI_API_KEY",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY",
        "COMET_API_KEY", "KAGGLE_KEY", "DATABRICKS_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_KEY", "S3_SECRET_ACCESS_KEY", "MY_TEACHER", "SSH_AUTH_SOCK",
        "PIP_INDEX_URL", "DOCKER_AUTH_CONFIG", "VLLM_API_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY",
    ],
    CANARY,
)  # fmt: skip
KEYS |= {
    "DATABASE_URL": f"postgres://me:{CANARY}@db.example.org/x", "OPENAI_CUSTOM_HEADERS": f"X-Secret: {CANARY}",
    "PREFECT_API_AUTH_STRING": f"me:{CANARY}", "PREFECT_SERVER_API_AUTH_STRING": f"you:{CANARY}",
    "PREFECT_CLIENT_CUSTOM_HEADERS": f'{{"X-Secret": "{CANARY}"}}',
}  # fmt: skip
HUB_KEYS = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY}
LAUNCHERS = dict.fromkeys(
    [
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "MASTER_PORT",
        "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "PET_NNODES", "PET_NPROC_PER_NODE", "PMI_RANK",
        "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "FLUX_TASK_RANK",
        "PALS_RANKID", "JSM_NAMESPACE_RANK", "MPI_LOCALRANKID", "HOROVOD_RANK", "VLLM_DP_RANK", "VLLM_DP_SIZE",
        "CROSS_RANK", "FSDP_VERSION", "DEEPSPEED_ZERO_STAGE",
    ],
    "7",
)  # fmt: skip
LAUNCHERS |= {
    "MASTER_ADDR": "192.0.2.1", "SLURM_NODELIST": "node[1-9]", "TF_CONFIG": "{}", "RAY_ADDRESS": "192.0.2.1:6379",
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp8",
}  # fmt: skip
DEAD = "http://127.0.0.1:9"
PROXIES = {
    name: DEAD for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())
} | {"NO_PROXY": "intranet.example.org"}  # fmt: skip
SERVERS = {
    "VLLM_HOST_IP": "192.0.2.1", "VLLM_PORT": "9", "VLLM_RPC_BASE_PATH": "/nowhere", "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_USE_MODELSCOPE": "True", "VLLM_PLUGINS": "none", "VLLM_SERVER_DEV_MODE": "0", "VLLM_TARGET_DEVICE": "tpu",
    "VLLM_LOGGING_CONFIG_PATH": "/nowhere", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "nonsense",
    "VLLM_LOOPBACK_IP": "192.0.2.1",
    "VLLM_USE_RUST_FRONTEND": "1", "VLLM_TEST_FORCE_LOAD_FORMAT": "dummy", "VLLM_MODEL_REDIRECT_PATH": "/nowhere",
    "UVICORN_PORT": "9", "UVICORN_HOST": "0.0.0.0", "UVICORN_WORKERS": "3", "UVICORN_ROOT_PATH": "/x",
    "PREFECT_SERVER_API_HOST": "0.0.0.0", "PREFECT_SERVER_API_BASE_PATH": "/x", "MLFLOW_HOST": "0.0.0.0",
    "MLFLOW_PORT": "9", "MLFLOW_TRACKING_URI": "http://192.0.2.1", "GIT_DIR": "/nowhere", "GIT_WORK_TREE": "/nowhere",
}  # fmt: skip
PYTHON = {
    "PYTHONPATH": os.pathsep.join(["", ".", "relative", "/nowhere"]), "PYTHONINSPECT": "1", "PYTHONWARNINGS": "error",
    "PYTHONHASHSEED": "42", "PYTHONOPTIMIZE": "2", "PYTHONSTARTUP": "/nowhere", "PYTHONBREAKPOINT": "nowhere.stop",
}  # fmt: skip
SHELL = KEYS | HUB_KEYS | LAUNCHERS | PROXIES | SERVERS
"""Those that a command itself is started with; Python heeds its own at its start, whatever the command does."""
HOSTILE = SHELL | PYTHON
GOOD = {"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": "/opt/lib", "NCCL_DEBUG": "WARN", "LC_CTYPE": "C.UTF-8"}
"""Variables that an engine and a trainer need."""

SHADOWS = (
    "random", "json", "typing", "flows", "thinkimg", "torch", "vllm", "uvicorn", "prefect", "accelerate", "sympy",
    "dataclasses", "logging", "sitecustomize",
)  # fmt: skip


def shadow(folder: Path) -> Path:
    """Write files into a folder that end a process that imports them in place of what is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")
    return folder


def deep_folder(root: Path, length: int = 140) -> Path:
    """Make a folder whose path is too long for a socket, as clusters have them for jobs."""
    folder = root / ("d" * (length - len(str(root))))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def record_addresses(log: Path) -> dict[str, str]:
    """Return the variables with which a process and its children note in `log` what they connect or bind to."""
    library = log.with_suffix(".so")
    source = Path(__file__).with_name("connects.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "LD_CONNECTS": str(log)}


def read_addresses(log: Path) -> set[tuple[str, str]]:
    """Return (connect, bind or sendto; address) of all that was noted."""
    return {tuple(line.split()[:2]) for line in log.read_text().splitlines()} if log.exists() else set()
