# shellcheck shell=bash
# Everything about one cluster, and the only file that knows it. Sourced twice: by you before sbatch (the SBATCH_*
# keys), and by train.sbatch inside the job (the rest). Keep your own copy outside the repository if you like and
# name it in UVLM_ENV. Each key: what it is, and when to touch it. A key that stays commented out keeps its default.

# -- The request. sbatch reads these; the same options on its command line win over them.
# export SBATCH_PARTITION=gpu          # the queue; `sinfo` lists them
# export SBATCH_ACCOUNT=my_project     # who pays; needed only where the cluster says so
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00     # at the limit the job ends; see README.md, "Not built yet"
# export SBATCH_GPUS_PER_NODE=8        # one training process per GPU follows from it
# export SBATCH_EXCLUSIVE=user         # whole nodes: all their cores and memory for the data loader

# -- The software. After these lines `uvlm`, `python` and `ninja` must be the ones of your environment, on every node.
# module load cuda/12.8
# source /path/on/the/shared/disk/uvlm/.venv/bin/activate

# -- The job.
# export UVLM_PROCESSES_PER_NODE=1     # default: the GPUs of the node, or 1 where the job asked for none
# export UVLM_LOCAL_DISK=/local        # node-local folder for compiled kernels (default: TMPDIR or /tmp). A shared
#                                      # disk works but is slow, and a killed start can leave a lock behind there.

# -- The network. Touch these only if a start hangs, or fails in gloo or NCCL.
# export GLOO_SOCKET_IFNAME=eno1       # interface by which the nodes reach each other; GPU jobs use gloo too, in each
#                                      # step, to agree whether to stop
# export NCCL_SOCKET_IFNAME=ib0        # the same for NCCL's own handshakes
# export NCCL_DEBUG=WARN
