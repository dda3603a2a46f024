"""Jobs of the scheduler SLURM."""

import logging
import os
import signal
import subprocess

log = logging.getLogger(__name__)


def under_slurm() -> bool:
    """Whether SLURM runs this process as a task and not in an interactive shell."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not interactive


def requeue() -> None:
    """Ask SLURM to requeue this job, or this task of a job array.

    To be called by the main thread. SIGTERM is ignored meanwhile, in ``scontrol`` as well: SLURM
    may send it as soon as another process of the job has ended.
    """
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        subprocess.run(["scontrol", "requeue", name], check=True)
        log.warning(
            "job %(job)s is in the queue again", {"job": name}, extra={"code": "slurm.requeued"}
        )
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning(
            "job %(job)s is not in the queue again: %(why)s",
            {"job": name, "why": error},
            extra={"code": "slurm.not_requeued"},
        )
    finally:
        signal.signal(signal.SIGTERM, before)
