"""Where checkpoints are scored: this process, several, or a cluster, always through joblib."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mtl_nnunet.errors import UserError

BACKENDS = ("loky", "dask", "ray")
# seconds
WORKERS_WITHIN = 300
# what the backends raise when a worker is gone; none of them need be installed
LOST_WORKER = {
    "concurrent.futures._base.BrokenExecutor",
    "distributed.scheduler.KilledWorker",
    "ray.exceptions.WorkerCrashedError",
    "ray.exceptions.RayActorError",
    "ray.exceptions.OutOfMemoryError",
}


@contextmanager
def workers(num_processes: int = 1, backend: str = "loky", address: str | None = None) -> Iterator[None]:
    """Let ``joblib.Parallel`` inside the block run on these workers.

    Args:
        num_processes: How many checkpoints at a time; 1 is this process. Dask and Ray use all that their cluster has.
        backend: ``loky`` for processes on this machine, ``dask`` or ``ray`` for a cluster; those two must be installed.
        address: Of the cluster's scheduler; None starts one on this machine with ``num_processes`` workers.

    Raises:
        UserError: The backend is not installed, or no cluster answers at the address.
    """
    from joblib import parallel_config

    if backend == "dask":
        with _dask_client(num_processes, address), parallel_config(backend="dask", n_jobs=-1):
            yield
    elif backend == "ray":
        _join_ray(num_processes, address)
        with parallel_config(backend="ray", n_jobs=num_processes if address is None else -1):
            yield
    elif num_processes > 1:
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        with parallel_config(backend="loky", n_jobs=num_processes, inner_max_num_threads=threads):
            yield
    else:
        yield


def in_parallel(jobs: Iterable[Any], ordered: bool = True, num_workers: int | None = None) -> Iterator[Any]:
    """Results of ``joblib.delayed`` jobs as they come, on the workers that are set.

    Args:
        jobs: What to run.
        ordered: In the order of the jobs, or as they are done.
        num_workers: None for as many as are set.

    Raises:
        UserError: A worker died.
    """
    from joblib import Parallel
    from joblib.parallel import get_active_backend

    kind = "generator" if ordered else "generator_unordered"
    # Ray's backend gives all results at the end
    return_as = kind if get_active_backend()[0].supports_return_generator else "list"
    try:
        yield from Parallel(n_jobs=num_workers, return_as=return_as)(jobs)
    except Exception as error:
        if not LOST_WORKER & {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}:
            raise
        raise UserError(
            f"a worker died while it computed ({type(error).__name__}), most often for want of memory. Pass a smaller -np or fewer -num_slices, or "
            "use a machine with more memory; with the cache on, what was finished is not computed again."
        ) from error


@contextmanager
def _dask_client(num_processes: int, address: str | None) -> Iterator[None]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError("-backend dask needs Dask. Install it: pip install 'mtl-nnunet[dask]'.") from error
    try:
        client = (
            Client(address, timeout=30)
            if address
            else Client(n_workers=num_processes, threads_per_worker=1, dashboard_address=None)
        )
    except (OSError, ValueError, TimeoutError, RuntimeError) as error:
        if address is None:
            raise UserError(
                f"Dask could not start workers on this machine ({error}). Use -np without -backend, or pass a scheduler's -address."
            ) from error
        raise UserError(
            f"no Dask scheduler answers at {address} ({error}). Start one, or leave -address out."
        ) from error
    with client:
        _wait_for_a_worker(client, address)
        yield
    if address is None and client.cluster is not None:
        client.cluster.close()


def _wait_for_a_worker(client: Any, address: str | None) -> None:
    """Jobs of a cluster start one after the other, and clusters that adapt start workers only for work that waits."""
    from distributed import TimeoutError as NoAnswerError

    if client.ncores():
        return
    try:
        client.submit(os.getpid).result(timeout=WORKERS_WITHIN)
    except NoAnswerError as error:
        raise UserError(
            f"the Dask scheduler at {address} had no worker for {WORKERS_WITHIN} s. Start some: dask worker {address}."
        ) from error


def _join_ray(num_processes: int, address: str | None) -> None:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise UserError("-backend ray needs Ray. Install it: pip install 'mtl-nnunet[ray]'.") from error
    try:
        ray.init(address=address, num_cpus=None if address else num_processes, ignore_reinit_error=True)
    except Exception as error:  # a start that times out is a bare Exception
        what = "Ray could not be started here" if address is None else f"no Ray cluster answers at {address}"
        raise UserError(
            f"{what} ({error}). Start one (ray start --head), or leave -backend and -address out."
        ) from error
    register_ray()
