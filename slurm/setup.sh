# Every job sources this file before it starts: `module load ...`, proxies, NCCL settings. Jobs use the Python that submitted them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
