#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for tests: slurmctld, two slurmd and munge, as root, from Debian's packages.
#     slurm_cluster.sh start FOLDER CONTROLLER_PORT NODE_PORT NODE_PORT   # returns when both nodes are idle
#     slurm_cluster.sh wait FOLDER JOB     # until the job has ended; prints its exit status
#     slurm_cluster.sh stop FOLDER
# Clients need SLURM_CONF=FOLDER/slurm.conf. Node names do not resolve, as on clusters without DNS for nodes: whatever
# wants to connect has to ask Slurm for the address.
set -euo pipefail
action=$1
folder=$2
export SLURM_CONF=$folder/slurm.conf

start() {
  local controller_port=$1 first_port=$2 second_port=$3 host cores
  host=$(hostname -s)
  cores=$(getconf _NPROCESSORS_ONLN) # nproc heeds OMP_NUM_THREADS
  mkdir -p "$folder"/{state,log,spool-n1,spool-n2}
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller_port
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/node-%n.pid
SlurmctldLogFile=$folder/log/controller.log
SlurmdLogFile=$folder/log/node-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
ReturnToService=2
MpiDefault=none
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first_port CPUs=$cores Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second_port CPUs=$cores Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=2
CONF
  # Two pretended GPUs a node: they can be asked for and counted, never computed on.
  printf 'NodeName=n[1-2] Name=gpu File=/dev/%s\n' null zero >"$folder/gres.conf"
  if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge: /run/munge
    su -s /bin/sh munge -c /usr/sbin/munged
  fi
  slurmctld -c
  slurmd -N n1
  slurmd -N n2
  for _ in {1..150}; do
    if [[ $(sinfo --noheader --format=%D --states=idle 2>/dev/null) == 2 ]]; then return; fi
    sleep 0.2
  done
  echo "the two nodes did not come up within 30 s; see $folder/log" >&2
  tail -n 20 "$folder"/log/*.log >&2
  exit 1
}

# sbatch --wait looks every ten seconds, which would make a test of three seconds one of ten.
wait_for() {
  local seen
  until seen=$(scontrol show job -o "$1") && [[ $seen =~ \ EndTime=[0-9T:-]+\  && $seen != *JobState=RUNNING* &&
    $seen != *JobState=PENDING* && $seen != *JobState=COMPLETING* ]]; do
    sleep 0.2
  done
  [[ $seen =~ \ ExitCode=([0-9]+):([0-9]+) ]]
  echo $((BASH_REMATCH[1] + (BASH_REMATCH[2] ? 128 + BASH_REMATCH[2] : 0)))
}

stop() {
  local pid
  scancel --user="$(id -un)" || true
  for _ in {1..100}; do # a job that a failed test left behind goes first, or its processes would outlive the nodes
    if [[ -z $(squeue --noheader 2>/dev/null) ]]; then break; fi
    sleep 0.2
  done
  for pid in "$folder"/node-n1.pid "$folder"/node-n2.pid "$folder"/controller.pid; do
    if [[ -f $pid ]]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
  done
}

case $action in
start) start "${@:3}" ;;
wait) wait_for "${@:3}" ;;
stop) stop ;;
*) echo "slurm_cluster.sh knows start, wait and stop, not $action" >&2; exit 2 ;;
esac
