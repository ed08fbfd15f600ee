#!/usr/bin/env bash
# certificates.sh FOLDER: an authority of the cluster's own, and a kubeconfig for each component and for the administrator.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
folder=$1
mkdir -p "$folder"
cd "$folder"
new_key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)

certificate() { # NAME SUBJECT EXTENSIONS
  openssl req "${new_key[@]}" -keyout "$1.key" -subj "$2" 2>/dev/null |
    openssl x509 -req -days 2 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile <(echo "$3") -out "$1.crt" 2>/dev/null
}

kubeconfig() { # NAME SUBJECT
  certificate "$1" "$2" extendedKeyUsage=clientAuth
  cat >"$1.kubeconfig" <<END
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "$API_SERVER", certificate-authority: "$folder/ca.crt"}}]
users: [{name: $1, user: {client-certificate: "$folder/$1.crt", client-key: "$folder/$1.key"}}]
contexts: [{name: test, context: {cluster: test, user: $1}}]
current-context: test
END
}

openssl req -x509 "${new_key[@]}" -days 2 -subj /CN=loraplex-test-cluster -keyout ca.key -out ca.crt 2>/dev/null
openssl ecparam -name prime256v1 -genkey -noout -out service-accounts.key
openssl ec -in service-accounts.key -pubout -out service-accounts.pub 2>/dev/null
names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$BRIDGE_ADDRESS,IP:${SERVICE_CIDR%.*}.1
certificate apiserver /CN=kube-apiserver "$(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth' "$names")"
certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client extendedKeyUsage=clientAuth
kubeconfig admin /O=system:masters/CN=admin
kubeconfig controller-manager /CN=system:kube-controller-manager
kubeconfig scheduler /CN=system:kube-scheduler
kubeconfig proxy /CN=system:kube-proxy
for node in "${NODES[@]}"; do kubeconfig "$node" "/O=system:nodes/CN=system:node:$node"; done
