#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one machine, for the tests. Needs root and the packages in .ci/packages.txt.
#
#   slurm_cluster.sh start N            bring up N nodes
#   slurm_cluster.sh stop               kill what start started (by recorded pid), undo /etc/hosts
#   slurm_cluster.sh env                print `export ...` lines for the caller's shell
#   slurm_cluster.sh kill-node NAME     power off one node: its slurmd, steps, tasks and sshd at once
#   slurm_cluster.sh start-node NAME    power it on again
#
# Everything lives under $SLURM_CLUSTER_DIR (a short path: unix sockets). No systemd, no cgroups, nothing in /etc but a
# marked block in /etc/hosts. Each node is a small container: pid, mount, uts and, where the kernel allows it, network
# namespaces of its own. A second cluster at the same time needs its own DIR, PORT (100 or more apart) and PREFIX.
set -euo pipefail

DIR=${SLURM_CLUSTER_DIR:-/tmp/slurm-cluster}
PORT=${SLURM_CLUSTER_PORT:-16800}
PREFIX=${SLURM_CLUSTER_PREFIX:-node}
NET=netns; ip netns add "ldt-probe-$$" 2>/dev/null || NET=loopback
[ "$NET" = loopback ] || ip netns del "ldt-probe-$$"
CPUS=16
GPUS=4
MEM=64000
MARK="slurm_cluster $DIR"
PATH=$PATH:/usr/sbin:/sbin

# What the running cluster was started with wins over the caller's environment, so that
# stop/status/kill-node need only SLURM_CLUSTER_DIR.
# shellcheck disable=SC1091
if [ -f "$DIR/settings" ]; then . "$DIR/settings"; fi

# netns mode: names and a subnet of the cluster's own, on a bridge and veth pairs made below
NETID=$((PORT / 100 % 256)); SUBNET=10.177.$NETID; BRIDGE=scbr$NETID

die() { echo "slurm_cluster: $*" >&2; exit 1; }

# ---------------------------------------------------------------- processes, by recorded pid
# A pid file holds "PID STARTTIME": the start time (field 22 of /proc/PID/stat) makes sure that
# stop never kills a stranger that was given a recycled pid.
# A zombie counts as gone: not every pid 1 that tests run under reaps promptly.
starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }
alive() {
  local pid st; [ -f "$DIR/pids/$1" ] || return 1
  read -r pid st <"$DIR/pids/$1"; [ -n "$st" ] && [ "$(starttime "$pid")" = "$st" ]
}
spawn() {  # spawn NAME CMD...: detached; logs to log/NAME.out; $! is CMD's own pid
  local name=$1; shift
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 8>&- 9>&- &
  local pid=$!
  echo "$pid $(starttime $pid)" >"$DIR/pids/$name"
}
slay() {   # slay NAME [SIGNAL]
  if alive "$1"; then
    local pid _; read -r pid _ <"$DIR/pids/$1"
    kill -"${2:-KILL}" "$pid" 2>/dev/null || true
    for _ in $(seq 100); do alive "$1" || break; sleep 0.05; done
  fi
  rm -f "$DIR/pids/$1"
}
wait_for() {  # wait_for SECONDS WHAT CMD...
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>"$DIR/log/wait.err"; do
    [ $SECONDS -lt $end ] || die "timed out waiting for $what: $(tail -n 3 "$DIR/log/wait.err") (logs: $DIR/log)"
    sleep 0.1
  done
}

# ---------------------------------------------------------------- configuration
node_ip() { if [ "$NET" = netns ]; then echo "$SUBNET.$1"; else echo "127.0.77.$1"; fi; }
ctl_ip()  { if [ "$NET" = netns ]; then echo "$SUBNET.254"; else echo 127.0.0.1; fi; }

write_config() {
  local n=$1 i
  cat >"$DIR/settings" <<S
NODES=$n PORT=$PORT NET=$NET  PREFIX=$PREFIX CPUS=$CPUS GPUS=$GPUS MEM=$MEM
S
  {
    cat <<S
ClusterName=testcluster
SlurmctldHost=$(hostname -s)($(ctl_ip))
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
# cred_expire also sets how long a requeued job must wait before it may start again: 120 s by
# default, which would make every requeue test two minutes long.
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
MailProg=/bin/true
# no cgroups, no cpu binding: this machine has fewer cpus than the nodes claim
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# act quickly
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmctldTimeout=30
SlurmdTimeout=6
TCPTimeout=2
MessageTimeout=5
KillWait=5
CompleteWait=0
InactiveLimit=0
WaitTime=10
MinJobAge=3600
ReturnToService=2
JobRequeue=1
# preemption: a job in "high" evicts one in "low", which first gets its --signal (preempt_send_user_signal)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
S
    # Ports: all nodes' slurmds share one address space in loopback mode, so each has its own.
    for i in $(seq "$n"); do
      echo "NodeName=$PREFIX$i NodeHostname=$(hostname -s) NodeAddr=$(node_ip "$i") Port=$((PORT + 10 + i))" \
           "CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
    done
    cat <<S
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low  Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
S
  } >"$DIR/slurm.conf"
  # Copies of /dev/null stand for the GPUs' device nodes (SLURM insists on character devices): it
  # counts them and hands them out (CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE), nobody opens them.
  for i in $(seq 0 $((GPUS - 1))); do mknod "$DIR/dev/gpu$i" c 1 3; done
  if [ "$GPUS" -gt 0 ]; then echo "Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]"; fi >"$DIR/gres.conf"
  # Never used, but stops the plugin's autodetection on machines with cgroup v2 and no systemd.
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$DIR/cgroup.conf"
}

hosts_block() {  # hosts_block add|remove : written in place (in a container /etc/hosts may be a mount)
  local tmp i; tmp=$(mktemp)
  exec 8>/tmp/slurm_cluster.hosts.lock; flock -w 60 8 || die "another cluster holds /etc/hosts"
  awk -v b="# >>> $MARK" -v e="# <<< $MARK" '$0==b{s=1} !s{print} $0==e{s=0}' /etc/hosts >"$tmp"
  if [ "$1" = add ]; then
    { echo "# >>> $MARK"; for i in $(seq "$NODES"); do echo "$(node_ip "$i") $PREFIX$i"; done
      echo "# <<< $MARK"; } >>"$tmp"
  fi
  cmp -s "$tmp" /etc/hosts || cat "$tmp" >/etc/hosts
  exec 8>&-
  rm -f "$tmp"
}

# ---------------------------------------------------------------- network namespaces (optional)
netns() { echo "sc$NETID-$1"; }
veth()  { echo "sc${NETID}v${1#"$PREFIX"}"; }
net_up() {
  [ "$NET" = netns ] || return 0
  local i ns
  ip link show $BRIDGE >/dev/null 2>&1 || ip link add $BRIDGE type bridge
  ip addr replace "$(ctl_ip)/24" dev $BRIDGE; ip link set $BRIDGE up
  for i in $(seq "$NODES"); do
    ns=$(netns "$PREFIX$i")
    [ -e "/run/netns/$ns" ] && continue
    ip netns add "$ns"
    ip link add "$(veth "$PREFIX$i")" type veth peer name eth0 netns "$ns"
    ip link set "$(veth "$PREFIX$i")" master $BRIDGE up
    ip -n "$ns" addr add "$(node_ip "$i")/24" dev eth0
    ip -n "$ns" link set lo up; ip -n "$ns" link set eth0 up
  done
}
net_down() {
  [ "$NET" = netns ] || return 0
  local i
  for i in $(seq "$NODES"); do
    ip link del "$(veth "$PREFIX$i")" 2>/dev/null || true
    ip netns del "$(netns "$PREFIX$i")" 2>/dev/null || true
  done
  ip link del $BRIDGE 2>/dev/null || true
}

# ---------------------------------------------------------------- nodes
# pid 1 of a node's pid namespace is this little init (bash reaps orphans); killing it, or the
# `unshare` above it, makes the kernel kill everything in the node: a power failure.
# /dev/shm is private, since equal pids in two nodes could otherwise clash over shm names.
# shellcheck disable=SC2016
NODE_INIT='
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
/usr/sbin/sshd -f "$2/ssh/sshd_config.$1" -E "$2/log/sshd.$1.log"
slurmd -D -N "$1" -f "$2/slurm.conf" &
trap "kill -TERM $!" TERM
wait $!; exit $?'
start_node() {
  local name=$1 pre=(); alive "$name" && return 0
  mkdir -p "$DIR/spool/$name"
  if [ "$NET" = netns ]; then
    ip link set "$(veth "$name")" up
    pre=(nsenter "--net=/run/netns/$(netns "$name")")
  fi
  # env -i: a batch script inherits nothing from the daemons anyway, and tests stay hermetic
  spawn "$name" "${pre[@]}" env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 \
    unshare --pid --fork --kill-child=KILL --mount --mount-proc --uts --propagation private \
    bash -c "$NODE_INIT" "slurm-node-$name" "$name" "$DIR"
}
# The cable is pulled first: a node that loses power sends no FIN, no RST. Its peers must find out.
kill_node() {
  [ "$NET" = netns ] && ip link set "$(veth "$1")" down
  slay "$1"
}

ssh_setup() {
  mkdir -p "$DIR/ssh" /run/sshd; chmod 700 "$DIR/ssh"
  [ -f "$DIR/ssh/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/host_key"
  [ -f "$DIR/ssh/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/id"
  cp "$DIR/ssh/id.pub" "$DIR/ssh/authorized_keys"
  local i; : >"$DIR/ssh/known_hosts"
  for i in $(seq "$NODES"); do
    cat >"$DIR/ssh/sshd_config.$PREFIX$i" <<S
ListenAddress $(node_ip "$i"):22
HostKey $DIR/ssh/host_key
AuthorizedKeysFile $DIR/ssh/authorized_keys
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
AcceptEnv *
S
    echo "$PREFIX$i,$(node_ip "$i") $(cut -d' ' -f1,2 "$DIR/ssh/host_key.pub")" >>"$DIR/ssh/known_hosts"
  done
  # A wrapper first on PATH (see `env`) makes ssh, pdsh and the deepspeed launcher, which all call
  # plain `ssh`, use this config, and leaves ~/.ssh alone.
  mkdir -p "$DIR/bin"
  printf '#!/bin/sh\nexec /usr/bin/ssh -F %s "$@"\n' "$DIR/ssh/config" >"$DIR/bin/ssh"; chmod 755 "$DIR/bin/ssh"
  cat >"$DIR/ssh/config" <<S
Host $PREFIX*
  User root
  IdentityFile $DIR/ssh/id
  IdentitiesOnly yes
  UserKnownHostsFile $DIR/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
S
}

# ---------------------------------------------------------------- start / stop / status
nodes_up() {
  local n; n=$(SLURM_CONF=$DIR/slurm.conf timeout 5 sinfo -h -N -p main -o '%N %t' 2>/dev/null |
               awk '$2 ~ /^(idle|mix|alloc|comp)$/' | sort -u | wc -l)
  [ "$n" -eq "$NODES" ]
}
running() { [ -f "$DIR/settings" ] && alive slurmctld; }

cmd_start() {
  local n=${1:-2} i
  [ "$(id -u)" = 0 ] || die "must be root"
  [[ $n =~ ^([1-9]|1[0-9]|2[0-8])$ ]] || die "bad node count '$n' (1 to 28)"
  mkdir -p "$DIR"; exec 9>"$DIR/lock"; flock -w 60 9 || die "another start/stop holds $DIR/lock"
  if running && [ "$NODES" = "$n" ] && nodes_up; then return 0; fi
  [ -f "$DIR/settings" ] && do_stop
  command -v slurmctld slurmd munged >/dev/null || die "packages missing: install those in .ci/packages.txt"
  # leftovers of an earlier run would be recovered as old jobs
  rm -rf "${DIR:?}"/{state,spool,run,log,pids,dev,munge,ssh,bin,slurm.conf,gres.conf,cgroup.conf}
  mkdir -p "$DIR"/{state,spool,run,log,pids,dev,munge}
  chmod 755 "$DIR" "$DIR/munge" # munged insists on a 755 socket directory
  NODES=$n; write_config "$n"; hosts_block add; net_up; ssh_setup

  mkdir -m 700 "$DIR/munge/private"
  (umask 077; head -c 128 /dev/urandom >"$DIR/munge/private/munge.key")
  spawn munged munged --foreground --force --key-file="$DIR/munge/private/munge.key" \
    --socket="$DIR/munge/munge.socket" --pid-file="$DIR/munge/private/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/private/munged.seed"

  wait_for 10 "munged" munge -S "$DIR/munge/munge.socket" -n
  spawn slurmctld env SLURM_CONF="$DIR/slurm.conf" slurmctld -D -f "$DIR/slurm.conf"
  for i in $(seq "$n"); do start_node "$PREFIX$i"; done
  wait_for 60 "all nodes to register" nodes_up
}

do_stop() {
  local f i
  [ -f "$DIR/settings" ] || return 0
  for f in "$DIR/pids/$PREFIX"*; do [ -e "$f" ] && slay "$(basename "$f")"; done
  for f in slurmctld munged; do slay $f; done
  net_down; hosts_block remove
  rm -f "$DIR/settings"
}
cmd_stop() {
  [ -d "$DIR" ] || return 0
  exec 9>"$DIR/lock"; flock -w 60 9 || die "another start/stop holds $DIR/lock"
  do_stop
}

cmd_env() {
  echo "export SLURM_CONF=$DIR/slurm.conf"
  # Fewer knobs to forget in scripts that talk to nodes:
  if [ "$NET" = loopback ]; then echo "export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo"
  else echo "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"; fi
  echo "export PATH=$DIR/bin:\$PATH PDSH_RCMD_TYPE=ssh"
}

case ${1:-} in
  start)      cmd_start "${2:-2}" ;;
  stop)       cmd_stop ;;
  env)        cmd_env ;;
  kill-node)  running || die "not running"; kill_node "${2:?node name}" ;;
  start-node) running || die "not running"; start_node "${2:?node name}" ;;
  *) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
