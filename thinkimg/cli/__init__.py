"""Command line: the verbs of `thinkimg`, each with its heavy imports inside, so that `--help` answers at once.

main.py ─┬─► stages.py ─────► flows.<stage>     one stage: `thinkimg score`
         ├─► flows.loop                         the whole loop: `thinkimg run`
         ├─► dry_run.py ────► pipeline, store   `--dry-run` of both
         ├─► artifacts.py ──► store             `thinkimg artifacts …`
         ├─► data.py ───────► data.inspect      `thinkimg data …`
         ├─► chat.py ───────► serving           `thinkimg chat`
         └─► scores.py ─────► analysis          remix, explain, diff
flags.py: flags that several verbs have
"""
