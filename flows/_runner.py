"""Scoring on a Prefect task runner: threads of this process, or Dask on this machine or many (`where.runner`)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import flows._environment  # noqa: F401

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner

from thinkimg.config.tree import WhereConfig
from thinkimg.errors import UserError


# The store is the cache, and jobs name artifacts: nothing that a task takes or gives is written anywhere by Prefect.
@task(name="part", cache_policy=NO_CACHE, persist_result=False, task_run_name="{job.part}")
def part(work: Callable, job):
    """All components on one part."""
    return work(job)


@contextmanager
def mapper(where: WhereConfig) -> Iterator[Callable]:
    """Yield a `stages.stage.Mapper`; its runner is started by the first call, so that a cached stage starts none.

    On threads of this process one part is scored after the other, its components side by side: one part is in memory.
    """
    with ExitStack() as stack:
        runners: list[TaskRunner] = []

        def run(work: Callable, jobs: list) -> Iterator:
            if where.runner == "threads":
                return (part(work, job) for job in jobs)
            if not runners:
                runners.append(stack.enter_context(runner(where)))
            futures = [runners[0].submit(part, {"work": work, "job": job}) for job in jobs]
            return (future.result() for future in futures)

        yield run


def runner(where: WhereConfig) -> TaskRunner:
    try:
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        raise UserError(
            f"where.runner={where.runner} needs {error.name}, which is not installed",
            hint="pip install 'thinkimg[dask]'",
        ) from error
    if where.runner != "dask":
        return DaskTaskRunner(address=where.runner)
    cluster = {"n_workers": where.workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=cluster)
