"""Prefect's side of the pipeline: one flow per stage, and the loop. Everything else of it is in thinkimg/.

loop.py ──► thinkimg.pipeline ──► PrefectRun (_run.py) ──► a sub-flow per stage, named as in `score 18`
score.py, train.py, … ──► stage_flow (_run.py) ──► one stage, after the stages that it needs
                                    │
      ┌─────────────┬───────────────┼────────────────┬──────────────────┐
  _server.py     _device.py     _runner.py         _ui.py        _deployments.py
  Prefect's API  one run at     threads or Dask    progress,     prefect.yaml
                 a time         for scoring        tables, links
"""
