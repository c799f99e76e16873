"""Several processes of one program on this machine, as on several hosts."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]


def address():
    """Where the processes meet: a port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def start(arguments, devices=1, env=None):
    """A Python process with that many devices, and these variables besides."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slurm(number, count, job):
    """What SLURM tells process `number` of a job on this machine."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def run(program, count, devices=1, timeout=300):
    """Runs `program` in `count` processes that know each other; their outputs.

    The program finds the number of its process in `number`.
    """
    head = f"""
        import sys, jax
        number = int(sys.argv[1])
        jax.distributed.initialize({address()!r}, {count}, number)
    """
    text = textwrap.dedent(head) + textwrap.dedent(program)
    started = [start(["-c", text, str(i)], devices) for i in range(count)]
    try:
        ended = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, ended):
        assert process.returncode == 0, error[-4000:]
    return [output for output, _ in ended]
