# What is special about a site, or a user: job.sh sources this file on the first node of a job,
# before anything is started. What sbatch hands down from the submitting shell goes first.
# shellcheck shell=bash

# Modules with Python, an MPI and CUDA, where the site has them:
# module load python openmpi cuda

# The virtual environment; what `launch/quickstart` or the installation on a login node has made.
TESTBED_VENV=${TESTBED_VENV:-$TESTBED_ROOT/.venv}

# How ranks are started: srun, through Slurm's PMIx plugin, or mpirun. Empty: srun where it has PMIx.
TESTBED_LAUNCHER=${TESTBED_LAUNCHER:-}

# More arguments for srun and for mpirun, as in --distribution=block:block, or --mca pml ucx.
TESTBED_SRUN_ARGUMENTS=${TESTBED_SRUN_ARGUMENTS:-}
TESTBED_MPIRUN_ARGUMENTS=${TESTBED_MPIRUN_ARGUMENTS:-}

# How often a job that ran into its time limit, or was preempted, puts itself into the queue again.
TESTBED_MAX_REQUEUES=${TESTBED_MAX_REQUEUES:-20}

# Where results files go when sbatch is called without -o.
TESTBED_RESULTS=${TESTBED_RESULTS:-$SLURM_SUBMIT_DIR}
