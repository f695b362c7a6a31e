#!/bin/bash
# Train under SLURM: `sbatch scripts/slurm.sh configs/pod.toml [FLAGS]`, from the folder of the checkout.
# Two minutes before the time limit the run saves a checkpoint and stops (exit code 75); then this script requeues its job,
# which goes on in the same run folder. SLURM itself requeues a job that it preempts or whose node fails. A finished run
# (0), a mistake (2), any other fault, `scancel` and `touch RUN/save_quit` end the job. docs/multihost.md explains the codes.
#
# One task per GPU. For CPUs or one GPU: --nodes=1 --ntasks-per-node=1.
#SBATCH --job-name=anima
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

config=${1:?usage: sbatch scripts/slurm.sh CONFIG.toml [FLAGS]}
shift
python=${ANIMA_PYTHON:-.venv/bin/python}

# SLURM sends USR1 only to this shell (--signal=B:…); srun forwards it to every task. TERM, of `scancel` and preemption,
# reaches the tasks without help, and must not end this shell before them.
requeue=
trap 'requeue=yes; kill -s USR1 "$srun" 2>/dev/null' USR1
trap '' TERM

# JAX finds the coordinator and the other processes from SLURM's variables.
(trap - TERM && exec srun "$python" -m anima_jax.train --config "$config" --resume auto "$@") &
srun=$!
# Not `wait` alone: a signal interrupts it, and bash may then lose the exit code. The trap runs after a `sleep`.
while kill -0 "$srun" 2>/dev/null; do sleep 0.5; done
wait "$srun"
code=$?

# A task that was still starting dies of the signal instead of ending with 75.
if [[ $requeue && $code -ne 0 && $code -ne 2 ]]; then
  echo "job $SLURM_JOB_ID: stopped with exit code $code, is requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
