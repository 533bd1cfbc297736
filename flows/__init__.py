"""The pipeline in Prefect: one file per stage with one flow, and loop.py that chains them."""
