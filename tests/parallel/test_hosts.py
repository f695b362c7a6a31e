"""Joining processes and agreeing, as far as one process can show it; tests/test_two_processes.py uses two."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from anima_jax.errors import UserError
from anima_jax.parallel import hosts
from anima_jax.parallel.mesh import current_mesh
from tests.ports import free_port


def test_a_single_process_joins_no_others_and_decides_alone():
    hosts.join()
    hosts.join(num_processes=1)
    assert jax.process_count() == 1
    assert hosts.is_process_0()
    assert hosts.from_process_0(lambda: pathlib.Path("here")) == pathlib.Path("here")
    agreed = hosts.Consensus(current_mesh())
    assert [agreed(number) for number in (0, 2, 1)] == [0, 2, 1]


def test_only_some_of_the_flags_is_an_error():
    with pytest.raises(UserError, match=r"--num_processes, --process_id: missing, expected all of"):
        hosts.join("localhost:1234")


def test_a_coordinator_without_a_port_is_an_error():
    with pytest.raises(UserError, match=r"--coordinator_address localhost: expected HOST:PORT of process 0"):
        hosts.join("localhost", 2, 0)


@pytest.mark.parametrize(("process", "processes"), [(2, 2), (-1, 2), (0, 0)])
def test_a_process_id_out_of_range_is_an_error(process, processes):
    with pytest.raises(UserError, match=f"--process_id {process}, --num_processes {processes}: expected"):
        hosts.join("localhost:1234", processes, process)


def test_a_process_killed_while_it_waits_for_the_others_prints_what_to_check():
    address = f"localhost:{free_port()}"
    code = f"from anima_jax.parallel import hosts; hosts.join({address!r}, 2, 1)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"process 1 of 2: waiting for the others at {address}" in process.stderr.readline()
    process.kill()
    assert f"error: ended before all processes had joined at {address}" in process.stderr.read()
    process.wait()


JOIN = """
import jax
from anima_jax.parallel import hosts
hosts.join()
print("joined", jax.process_count(), jax.distributed.is_initialized())
"""


def test_slurm_is_detected():
    """With the environment that `srun` sets for a single task."""
    task = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "1",
    }
    environment = os.environ | task | {"JAX_COORDINATOR_PORT": str(free_port())}
    found = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, env=environment, check=False)
    assert "joined 1 True" in found.stdout, found.stderr
