"""Task runners of scoring (`where.runner`): threads of this process, or Dask on this machine or a cluster."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import flows._environment  # noqa: F401

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner

from thinkimg.config.tree import WhereConfig
from thinkimg.errors import UserError


# The store is the cache, and jobs name artifacts: Prefect writes neither inputs nor results of a task.
@task(name="part", cache_policy=NO_CACHE, persist_result=False, task_run_name="{job.part}")
def run_part(work: Callable, job):
    """Score all components of one part."""
    return work(job)


@contextmanager
def mapper(where: WhereConfig) -> Iterator[Callable]:
    """Yield a `stages.stage.Mapper`; its first call starts the runner, so that a cached stage starts none.

    With threads one part is in memory: parts are scored one after the other, the components of each side by side.
    """
    with ExitStack() as stack:
        runners: list[TaskRunner] = []

        def run(work: Callable, jobs: list) -> Iterator:
            if where.runner == "threads":
                return (run_part(work, job) for job in jobs)
            if not runners:
                runners.append(stack.enter_context(open_runner(where)))
            futures = [runners[0].submit(run_part, {"work": work, "job": job}) for job in jobs]
            return (future.result() for future in futures)

        yield run


def open_runner(where: WhereConfig) -> TaskRunner:
    """Return a Dask runner. Raises UserError without the package."""
    try:
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        raise UserError(
            f"where.runner={where.runner} needs {error.name}, which is not installed.",
            hint="Run pip install 'thinkimg[dask]'.",
        ) from error
    if where.runner != "dask":
        return DaskTaskRunner(address=where.runner)
    cluster = {"n_workers": where.workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=cluster)
