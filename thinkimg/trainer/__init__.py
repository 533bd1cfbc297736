"""The training process: what it is handed, what it holds, and its jobs."""
