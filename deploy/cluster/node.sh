#!/usr/bin/env bash
# node.sh FOLDER INDEX CGROUP: the first process of a node: containerd, kubelet and a proxy for services.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
folder=$1 index=$2 cgroup=$3
node=${NODES[$index]}
keys=$folder/../keys
logs=$folder/../logs

hostname "$node"
mount --make-rshared /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib # of CNI's results, among others
mkdir -p "$folder/var-log" "$folder/tunables"
mount --bind "$folder/var-log" /var/log
sysctl --quiet --write net.ipv4.ip_forward=1
for other in "${!NODES[@]}"; do
  if ((other != index)); then ip route add "$(node_pods "$other")" via "$(node_address "$other")"; fi
done

# A kubelet wants these settings of the kernel: it reads what it wants, and the machine keeps what it has.
tunable() {
  echo "$2" >"$folder/tunables/${1//\//.}"
  if [[ -e /proc/sys/$1 ]]; then mount --bind "$folder/tunables/${1//\//.}" "/proc/sys/$1"; fi
}
tunable vm/overcommit_memory 1
tunable vm/panic_on_oom 0
tunable kernel/panic 10
tunable kernel/panic_on_oops 1
tunable kernel/keys/root_maxkeys 1000000
tunable kernel/keys/root_maxbytes 25000000

snapshotter=overlayfs
if [[ $(stat --file-system --format %T "$folder") == overlayfs ]]; then snapshotter=native; fi
mkdir -p "$folder/cni"
cat >"$folder/cni/10-pods.conflist" <<END
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "/run/addresses", "ranges": [[{"subnet": "$(node_pods "$index")"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
cat >"$folder/containerd.toml" <<END
version = 2
root = "$folder/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$PAUSE_IMAGE"
restrict_oom_score_adj = true # a machine may not let it be lowered
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "$DAEMONS/usr/lib/cni"
conf_dir = "$folder/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "$snapshotter"
END
cat >"$folder/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $(node_address "$index")
authentication: {anonymous: {enabled: false}, x509: {clientCAFile: $keys/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: $cgroup
clusterDNS: ["$BRIDGE_ADDRESS"]
clusterDomain: cluster.local
evictionHard: {memory.available: 64Mi, nodefs.available: 256Mi, imagefs.available: 256Mi}
failSwapOn: false
imageGCHighThresholdPercent: 100
protectKernelDefaults: true
resolvConf: $folder/resolv.conf
END
touch "$folder/resolv.conf"

containerd --config "$folder/containerd.toml" >"$logs/$node-containerd.log" 2>&1 &
wait_for 30 ctr version
for image in "$folder"/../images/*.tar; do
  ctr --namespace k8s.io images import --snapshotter "$snapshotter" "$image"
done
kubelet --config "$folder/kubelet.yaml" --kubeconfig "$keys/$node.kubeconfig" --root-dir "$folder/kubelet" \
  --hostname-override "$node" --node-ip "$(node_address "$index")" --cert-dir "$folder/certificates" \
  --volume-plugin-dir "$folder/no-plugins" --container-runtime remote \
  --container-runtime-endpoint unix:///run/containerd/containerd.sock >"$logs/$node-kubelet.log" 2>&1 &
kube-proxy --kubeconfig "$keys/proxy.kubeconfig" --hostname-override "$node" --proxy-mode iptables \
  --cluster-cidr "$POD_CIDR" --conntrack-max-per-core 0 --conntrack-min 0 >"$logs/$node-proxy.log" 2>&1 &
wait
