# shellcheck shell=bash
# Everything about one cluster, and the only file that knows it. `uvlm submit` runs it for the request (the SBATCH_*
# keys), copies it into the job's folder, and each attempt sources the copy on its first node (the rest). Keep your own
# copy outside of the clone if you like and name it in UVLM_ENV. A key that stays commented out keeps its default.

# -- The request: defaults of `uvlm submit`, whose options win.
# export SBATCH_PARTITION=gpu          # the queue; `sinfo` lists them
# export SBATCH_ACCOUNT=my_project     # who pays; needed only where the cluster says so
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00     # of one attempt: before it is over the ranks save, and the job comes back
# export SBATCH_CONSTRAINT=h100
# export SBATCH_RESERVATION=my_reservation
# export SBATCH_EXCLUSIVE=user         # whole nodes: all their cores for the data loader,
# export SBATCH_MEM_PER_NODE=0         # and all their memory, where jobs get little of it by default

# -- The software. Without a container the job runs the Python that ran `uvlm submit`, by its path: what it needs besides
# (a CUDA module, a library path) comes here.
# module load cuda/12.8

# -- The job.
# export UVLM_LOCAL_DISK=/local        # folder on each node's own disk for compiled kernels (default: TMPDIR or /tmp). A
#                                      # shared disk works but is slow, and a killed start can leave a lock behind there.
# export TORCH_EXTENSIONS_DIR=/shared/extensions  # to keep DeepSpeed's compiled operators between attempts, at that risk
# export UVLM_MOUNTS=/data,/datasets   # with --apptainer: further folders that the image sees (A or A:B, with commas);
#                                      # with --pyxis both sides are needed: /data:/data,/datasets:/datasets

# -- The network. Touch these only if a start hangs, or fails in gloo or NCCL; the preflight names slow and broken links.
# export GLOO_SOCKET_IFNAME=eno1       # interface by which the nodes reach each other; GPU jobs use gloo too, in each
#                                      # step, to agree whether to stop
# export NCCL_SOCKET_IFNAME=ib0        # the same for NCCL's own handshakes
# export NCCL_IB_HCA=mlx5              # which network cards carry NCCL's traffic
# export NCCL_DEBUG=WARN
