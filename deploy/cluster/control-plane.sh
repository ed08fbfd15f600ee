#!/usr/bin/env bash
# control-plane.sh FOLDER: starts etcd, the API server, the controllers, the scheduler and a proxy for services in the
# present namespaces, and returns when the API server is ready. FOLDER holds keys/, and gets etcd/, logs/ and names/.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
folder=$1
keys=$folder/keys
mkdir -p "$folder/logs" "$folder/names"

ip link set lo up
ip link add nodes0 type bridge
ip address add "$BRIDGE_ADDRESS/24" dev nodes0
ip link set nodes0 up
ip route add "$SERVICE_CIDR" dev nodes0 # packets need a route before the proxy gives them an address
sysctl --quiet --write net.ipv4.ip_forward=1

start() {  # NAME COMMAND...
  local name=$1
  shift
  "$@" >"$folder/logs/$name.log" 2>&1 &
}

start etcd etcd --data-dir "$folder/etcd" --unsafe-no-fsync --log-level warn
start apiserver kube-apiserver \
  --advertise-address "$BRIDGE_ADDRESS" --secure-port 6443 --etcd-servers http://127.0.0.1:2379 \
  --service-cluster-ip-range "$SERVICE_CIDR" --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
  --allow-privileged --kubelet-preferred-address-types InternalIP --cert-dir "$folder/apiserver" --profiling=false \
  --tls-cert-file "$keys/apiserver.crt" --tls-private-key-file "$keys/apiserver.key" --client-ca-file "$keys/ca.crt" \
  --kubelet-client-certificate "$keys/kubelet-client.crt" --kubelet-client-key "$keys/kubelet-client.key" \
  --service-account-key-file "$keys/service-accounts.pub" \
  --service-account-signing-key-file "$keys/service-accounts.key" \
  --service-account-issuer https://kubernetes.default.svc
wait_for 60 kubectl get --raw /readyz

start controller-manager kube-controller-manager \
  --kubeconfig "$keys/controller-manager.kubeconfig" --use-service-account-credentials --leader-elect=false \
  --service-account-private-key-file "$keys/service-accounts.key" --root-ca-file "$keys/ca.crt" \
  --cluster-signing-cert-file "$keys/ca.crt" --cluster-signing-key-file "$keys/ca.key" \
  --flex-volume-plugin-dir "$folder/no-plugins" --cert-dir "$folder/controller-manager"
start scheduler kube-scheduler --kubeconfig "$keys/scheduler.kubeconfig" --leader-elect=false \
  --cert-dir "$folder/scheduler"
# Names of services: hosts files in names/, which whoever drives the cluster writes.
start names dnsmasq --keep-in-foreground --user=root --pid-file= --conf-file=/dev/null --no-resolv --no-hosts \
  --hostsdir="$folder/names" --bind-interfaces --listen-address="$BRIDGE_ADDRESS"
# Whoever drives the cluster runs here, and reaches services as a node does.
start proxy kube-proxy --kubeconfig "$keys/proxy.kubeconfig" --hostname-override control-plane --proxy-mode iptables \
  --bind-address "$BRIDGE_ADDRESS" \
  --cluster-cidr "$POD_CIDR" --conntrack-max-per-core 0 --conntrack-min 0
