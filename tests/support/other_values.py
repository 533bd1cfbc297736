"""Other values of settings for tests that change one at a time, where more than a text of its type is needed."""

from pathlib import Path


def values(base: str, folder: Path) -> dict[str, list[list[str]]]:
    """Setting -> overrides that give it another value, where that is more than a text of its type."""
    script = folder / "demonstrations.jsonl"
    script.write_text("")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    found = {
        "data.source": [["data.source=parquet", "data.path=x"]],
        "image.types": [["image.types=[self]"], ["image.types=[]", "mix={tool: 0.3, answer: 0.3}"]],
        "image.weights": [["image.weights={self: 1, teacher: 2, attention: 3, embedding: 4}"]],
        "rewards.rules": [["rewards.rules=[own_code.rule]"]],
        "rewards.functions": [["rewards.functions=[own_code.rule:brevity]"]],
        "warmstart.demonstrations": [[f"warmstart.demonstrations={script}"]],
        "where.runner": [["where.runner=dask"]],
        "where.engine.keep": [["where.engine.keep=false", "where.trainer.keep=false"]],
        "where.engine.urls": [["where.engine.urls=[http://host:8000]"]],
        "where.engine.devices": [["where.engine.devices=[1]"]],
        "where.teacher.devices": [["where.teacher.devices=[1]"]],
        "where.trainer.devices": [["where.trainer.devices=[1]"]],
        "where.trainer.cpu_threads_bind": [["where.trainer.cpu_threads_bind=1"]],
        "where.teacher.url": [["where.teacher.url=http://host:1/v1", "image.teacher.model=m"]],
        "where.trainer.address": [["where.trainer.address=host:1"]],
        "where.trainer.accelerate_config": [["where.trainer.accelerate_config=ddp"]],
        "where.trainer.nodes": [["where.trainer.nodes=2", "where.trainer.processes=2", "where.trainer.address=host:1"]],
    }
    if base == "whole":
        found["model.adaptation"] = [["model.tiny=null", "model.adaptation=lora"]]
        found["warmstart.checkpoint"] = [[f"warmstart.checkpoint={checkpoint}"]]
    return found
