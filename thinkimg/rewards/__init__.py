"""Rewards: raw components of each trajectory in [0, 1], and the mix that weighs them when advantages are computed.

    rollouts ──► judging ──► judges/: values of processed images ──► ledger ─┐
        │                                                                    ▼
        └──────► rules/: pure functions of the trajectory ────────► scores, one column per component ──► mix ──► totals

Every module of rules/ and judges/ is one component, named like its file, with its own `Settings`. A rule defines
`score(batch) -> list[Score]`: one for each trajectory, in order. A judge looks at processed images and defines
`judge(pairs, context)` (see judge.Judge). A user's own are named by import path or entry point (`thinkimg.rules`,
`thinkimg.judges`); functions with the signature of TRL's are named by import path.
"""
