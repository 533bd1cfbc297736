"""The kept training worker: `Trainer` starts it and hands it jobs; the process itself is `python -m thinkimg.grpo.worker`.

A job is a JSON object; directories are absolute. The worker writes `output` (a directory that is empty or not there yet;
its parent exists) and answers with a JSON object. Policy directories are described in checkpoint.py.

    {"kind": "train",
     "policy": {"directory": "…", "digest": "…"},   what is trained on; digest = the `weights` of every rollout
     "base": {"name": "Qwen/…" or "model/<fingerprint>", "revision": null, "directory": null},   LoRA only: see checkpoint.Base
     "model": {…}, "train": {…},                    ModelConfig and TrainConfig as JSON (model_dump(mode="json"))
     "rollouts": "…",                               directory with trajectories*.parquet
     "images": {"tables": ["…", …],                 directories with images*.parquet (data set and rollouts)
                "min_pixels": 3136, "max_pixels": 1003520},
     "advantages": "….parquet",                     trajectory_id, advantage: the included rows, no others
     "conversation": {"temperature": 1.0, "banned": [ids], "max_tokens": 8192},
     "reference": null,                             policy directory of the KL's reference: full fine-tuning with beta > 0
     "output": "…", "seed": 0}

    {"kind": "warmstart",
     "base": {…, "directory": "…"},                 where training starts
     "model": {…}, "warmstart": {…},                ModelConfig and WarmstartConfig as JSON
     "rollouts": "…" or null,                       directory with trajectories*.parquet of demonstrations; null: steps is 0
     "images": {…}, "conversation": {"temperature": 1.0, "banned": [ids], "max_tokens": 8192},
     "output": "…", "seed": 0}

Results: {"metrics": {name: float} (means over the steps, parity/*, memory, seconds), "steps": [{"step", …, per step}],
"updates": optimizer steps since the base, "reloaded": whether weights had to be read from disk}.
Progress lines have {"step", "steps", "loss", …} of one optimizer step each.
"""
