"""Analyses of stored artifacts; none needs a GPU, and only `calibrate` starts an engine or a trainer.

flows/loop.py ─► alarms ──► figures             an iteration's figures, and the alarms on them
              └► console_report                 lines and tables of a loop
cli ─┬─► explain, remix, diff ──► joined        a reward's origin, other mixes, two scores compared
     ├─► inspect_log, pages ──► view ──► explain, pictures   all conversations of an artifact, in Inspect and as pages
     │                                └► system_prompt       as their tokens have it
     ├─► compare_policies ──► view, diff        two policies on the same samples
     ├─► verify_calls                           tool calls replayed
     ├─► export ──► card, system_prompt         a policy packed
     ├─► forecast                               memory of a training step, before it runs
     └─► calibrate                              settings of the attention judge
"""
