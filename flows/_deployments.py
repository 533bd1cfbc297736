"""Text of prefect.yaml, made from the stages; `thinkimg deployments` prints it."""

from thinkimg.config.load import load
from thinkimg.stages.names import stage_names
from thinkimg.stages.stage import open_stage

HEAD = """\
# Deployments of the pipeline: `make deploy` from the clone, with a server (`make server`) and a worker (`make worker`).
# Made by `thinkimg deployments > prefect.yaml`; what is written by hand stands in flows/_deployments.py.
name: thinkimg
prefect-version: {version}
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: "{{{{ $PWD }}}}"
definitions:
  pool: &pool {{name: thinkimg}}
  # Runs of one deployment queue; runs of several deployments share the device by a global concurrency limit.
  queue: &queue {{limit: 1, collision_strategy: ENQUEUE}}
  stage: &stage {{preset: tiny, overrides: []}}
deployments:
  - name: loop
    entrypoint: flows/loop.py:loop
    description: Train for `iterations`; a run goes on where the last one stopped, what is there already reads Cached.
    tags: [thinkimg, loop]
    parameters: {{preset: tiny, overrides: []}}
    schedules: [{{cron: "0 2 * * *", timezone: UTC, slug: nightly}}]
    concurrency_limit: *queue
    work_pool: *pool
"""
STAGE = """\
  - name: {name}
    entrypoint: flows/{name}.py:{name}
    description: "{help}"
    tags: [{tags}]
    parameters: *stage
    work_pool: *pool
"""
VERSION = "3.7.7"  # of Prefect, which refuses a file of another one


def deployments() -> str:
    """The text of prefect.yaml."""
    config = load("tiny")  # with judges of all kinds
    entries = []
    for name, text in stage_names().items():
        tags = ["thinkimg", "stage", *(["device"] if open_stage(name).uses(config) else [])]
        entries.append(STAGE.format(name=name, help=text, tags=", ".join(tags)))
    return HEAD.format(version=VERSION) + "".join(entries)
