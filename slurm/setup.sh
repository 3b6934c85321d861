# Sourced by every job before it starts: `module load ...`, proxies, NCCL settings. Python is the one that submitted.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
