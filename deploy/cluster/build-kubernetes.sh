#!/usr/bin/env bash
# Builds Kubernetes from Debian's source package with Debian's Go into the cache: once, about 15 minutes of a processor.
set -euo pipefail
source "$(dirname "$0")/settings.sh"

COMMANDS=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl)

if [[ -e $KUBERNETES/complete ]]; then exit; fi
build=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" loraplex-kubernetes.XXXXXX)
trap 'chmod -R u+w "$build"; rm -rf "$build"' EXIT

# Source packages are not in the lists of most machines: this list is the build's own.
mkdir -p "$build/lists/partial"
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
# shellcheck disable=SC2016  # apt-get expands it
of_release=(--format '$(REPO_URI)' "Codename: $release" "Created-By: Packages" "Label: Debian")
mirror=$(apt-get indextargets "${of_release[@]}" | sed --quiet 1p)
: "${mirror:?apt knows no archive of $release: run apt-get update}"
signed_by=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$signed_by] $mirror $release main" >"$build/sources.list"
own_lists=(-o "Dir::Etc::SourceList=$build/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$build/lists" -o APT::Sandbox::User=root)
apt-get "${own_lists[@]}" -qq update
(cd "$build" && apt-get "${own_lists[@]}" -qq source kubernetes)

source=$(find "$build" -mindepth 1 -maxdepth 1 -type d -name 'kubernetes-*')
version=${source##*/kubernetes-}
version=${version##*really}  # 1.20.5+really1.20.2 is how Debian goes back to 1.20.2
if [[ $version != "$KUBERNETES_VERSION" ]]; then
  echo "Debian has $version, not $KUBERNETES_VERSION: KUBERNETES_VERSION in settings.sh must follow" >&2
  exit 1
fi
mkdir -p "$build/go/src/k8s.io" "$build/home"
ln -s "$source" "$build/go/src/k8s.io/kubernetes"
export GOROOT=$DAEMONS/usr/lib/go-1.19 GOPATH=$build/go GOCACHE=$build/cache HOME=$build/home
export GOMAXPROCS=${GOMAXPROCS:-$(nproc)} GOGC=400 CGO_ENABLED=0
export PATH=$GOROOT/bin:$PATH
# Without the drivers of clouds and of Docker it takes half the time.
make -C "$build/go/src/k8s.io/kubernetes" WHAT="${COMMANDS[*]/#/cmd/}" GOFLAGS="-p=$GOMAXPROCS -tags=providerless,dockerless"

rm -rf "$KUBERNETES"
mkdir -p "$KUBERNETES/bin"
for command in "${COMMANDS[@]}"; do cp "$source/_output/bin/$command" "$KUBERNETES/bin/"; done
gcc -Os -Wall -static -DVERSION=1 -o "$KUBERNETES/bin/pause" "$source/build/pause/linux/pause.c"
touch "$KUBERNETES/complete"
