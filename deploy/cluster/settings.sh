# shellcheck shell=bash disable=SC2034  # sourced by the scripts beside it, which use what is set here
# Where the test cluster keeps its files, and its addresses. All addresses exist only inside the cluster's namespaces.

CACHE=${LORAPLEX_CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/loraplex}
DAEMONS=$CACHE/cluster-daemons            # unpacked Debian packages; nothing of them is installed
KUBERNETES_VERSION=1.20.2                 # of Debian's source package
KUBERNETES=$CACHE/kubernetes-$KUBERNETES_VERSION

NODES=(node-a node-b)
BRIDGE_ADDRESS=10.97.0.1                  # the control plane, and whoever drives the cluster
SERVICE_CIDR=10.96.0.0/16
POD_CIDR=10.98.0.0/16
API_SERVER=https://$BRIDGE_ADDRESS:6443
PAUSE_IMAGE=loraplex.test/pause:1
SERVER_IMAGE=loraplex.test/loraplex:1

export PATH=$KUBERNETES/bin:$DAEMONS/usr/bin:$DAEMONS/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# The address of the node at place $1 (0, 1, ...), and its part of the pods' network.
node_address() { echo "10.97.0.$((11 + $1))"; }
node_pods() { echo "10.98.$((1 + $1)).0/24"; }

# Succeeds once the command does; gives up after $1 seconds, with the last output of the command.
wait_for() {
  local seconds=$1 output
  shift
  local until=$((SECONDS + seconds))
  while ! output=$("$@" 2>&1); do
    if ((SECONDS >= until)); then
      echo "gave up after $seconds s: $*: $output" >&2
      return 1
    fi
    sleep 0.2
  done
}
