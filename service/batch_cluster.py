"""Pictures by the million: the run of batch.py, with the reading, segmenting and writing done on a Ray cluster.

Ray Data hands shards of the pictures to workers, each a process with an engine of its own, as many as the cluster has
room for. This process alone keeps the record: it writes a picture's line when the worker's word arrives that the
picture's files are complete, so that however often a shard is done again because its worker died, each picture has one
line. The output folder, and folders of pictures, must be the same on every node.

A shard whose worker dies ATTEMPTS times is taken apart, and its pictures are tried one by one: one that takes its
worker down each time is reported like any other that cannot be segmented, and nothing stops for it.
"""

import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from service import batch
from service.cluster import ClusterError, Layout, for_worker
from service.engine import Engine, ModelError
from service.errors import InputError
from service.folders import printable
from service.options import Options
from service.record import Entry, Record
from service.settings import EMBEDDED_MODEL, Settings

SHARD = 16  # pictures that a worker is given at a time: what a killed run has to do again, for each worker
ATTEMPTS = 2
WAVE = 100_000  # pictures that Ray Data is told of at a time: what it holds of each is small, but not nothing


def segment_pictures(
    jobs: Sequence[batch.Job], run: batch.Run, record: Record, layout: Layout
) -> Iterator[tuple[batch.Job, Entry | InputError]]:
    """As batch.segment_pictures, on the cluster that this process is connected to, in any order.

    Raises OSError where a worker cannot write to the output folder, and ClusterError where the workers do not start.
    """
    batch.remove_parts(jobs, record.folder)
    for start in range(0, len(jobs), WAVE):
        yield from _segment_wave(jobs[start : start + WAVE], run, record, layout)


def _segment_wave(
    jobs: Sequence[batch.Job], run: batch.Run, record: Record, layout: Layout
) -> Iterator[tuple[batch.Job, Entry | InputError]]:
    free = yield from batch.refuse_to_replace(jobs, run, record)
    earlier = {job.source: record.take_back(job.source, job.name, run.outputs(job)) for job in free}
    left = dict(enumerate(free))
    for shard in (SHARD, 1):
        for index, outcome in _outcomes(left, shard, run, record.folder, layout):
            job = left.pop(index, None)
            if job is None:
                continue
            if "errno" in outcome:
                raise OSError(outcome["errno"], outcome["strerror"])
            if "code" in outcome:
                yield job, InputError(outcome["code"], outcome["message"])
            else:
                entry = {**outcome, "file": printable(str(job.file))}
                record.replace(earlier[job.source], entry)
                yield job, entry
    for job in left.values():
        yield job, InputError("worker_died", f"{ATTEMPTS} workers in a row ended while they had this picture")


def _outcomes(
    jobs: dict[int, batch.Job], shard: int, run: batch.Run, folder: Path, layout: Layout
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The index of a job and what became of it, once at most; none for the jobs of a shard that was given up."""
    if not jobs:
        return
    rows = [{"index": index, "job": pickle.dumps(_absolute(job))} for index, job in jobs.items()]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=max(1, layout.fits(ray.cluster_resources())),
        max_tasks_in_flight_per_actor=2 if shard > 1 else 1,  # what waits at a worker that dies counts as tried too
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no other way yet to say how often to try
        results = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // shard)).map_batches(
            Worker,
            batch_size=shard,
            compute=pool,
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_task_retries=ATTEMPTS - 1,
            fn_constructor_args=(
                for_worker(run.settings, layout),
                run.settings.model == EMBEDDED_MODEL,
                run.options,
                run.overlay,
                folder.resolve(),
                run.engine.sha256,
            ),
        )
    try:
        for part in results.iter_batches(batch_size=None, batch_format="numpy"):
            for index, outcome in zip(part["index"], part["outcome"], strict=True):
                yield int(index), json.loads(outcome)
    except RayError as error:
        raise ClusterError(f"the workers cannot go on: {str(error).strip().splitlines()[-1]}") from None


def _absolute(job: batch.Job) -> batch.Job:
    return replace(job, file=job.file.absolute())


class Worker:
    """A process that Ray gives shards of the pictures to."""

    def __init__(
        self, settings: Settings, embedded: bool, options: Options, overlay: bool, folder: Path, sha256: str
    ) -> None:
        if embedded:
            settings = settings.model_copy(update={"model": EMBEDDED_MODEL})
        engine = Engine(settings.model, settings.device, settings.threads, settings.gpu_memory_limit)
        if engine.sha256 != sha256:
            raise ModelError(f"the model file {settings.model} is another on this node than where the run was started")
        self._run = batch.Run(engine, settings, options, overlay)
        self._folder = folder

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, Any]:
        """What became of each of the shard's jobs, as JSON, up to the first whose failure is not the picture's own.

        That one, and those after it, are to be tried one by one.
        """
        jobs = [pickle.loads(job) for job in shard["job"]]
        outcomes: list[dict[str, Any]] = []
        try:
            for _, outcome in batch.write_pictures(jobs, self._run, self._folder):
                if isinstance(outcome, InputError):
                    if outcome.code == "model_failed" and len(jobs) > 1:
                        break
                    outcome = {"code": outcome.code, "message": outcome.message}
                outcomes.append(outcome)
        except OSError as error:
            outcomes.append({"errno": error.errno or 0, "strerror": error.strerror or str(error)})
        return {"index": shard["index"][: len(outcomes)], "outcome": [json.dumps(outcome) for outcome in outcomes]}
