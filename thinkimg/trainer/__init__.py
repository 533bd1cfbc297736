"""Training process: trains a policy on rollouts or demonstrations, and reads its attention.

    client.Trainer ─► spool of JSON jobs ─► worker.Worker, one on each of `ranks`; heartbeat watches them
                                               │ policy, checkpoint, checksums: loads and saves policies
                 ┌─────────────────────────────┼─────────────────────────────┐
                 ▼                             ▼                             ▼
           warmstart_job                    grpo_job                   attention_job
                 │ memory, before              │ memory, parity,             │
                 │ the first step              │ packing_check before        │
                 └───────► passes ◄────────────┘                             │
    rows ─────────────► micro_batches ◄──────────────────────────────────────┘
                           └─► forward.logprobs.Scorer ─► loss (grpo/) ─► stepper

`client` and `settings` import no torch, so that a loop need not wait for it.
"""
