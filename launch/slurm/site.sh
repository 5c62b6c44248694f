# The one place to change for your site; every job script reads it, at each start of the job, on its first node.
# As shipped it takes .venv of the repository, if there is one, and nothing else.

# Modules.
# module purge
# module load cuda/12.4

# Environment: a virtual environment here, or conda's.
if [ -d "$SPT_ROOT/.venv" ]; then
    PATH="$SPT_ROOT/.venv/bin:$PATH"
fi

# What comes before `python` and `torchrun`, such as a container:
# CONTAINER=(apptainer exec --nv --bind /data "$SPT_ROOT/spt_dist.sif")

# The network interface of the nodes, where the one to be taken is not found (`ip -brief address` shows them):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Threads of a rank.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
