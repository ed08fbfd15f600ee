#!/usr/bin/env bash
# Installs the tools that the cluster needs from Debian, and unpacks its daemons into the cache: these are not installed,
# so that no service is started on the machine.
set -euo pipefail
source "$(dirname "$0")/settings.sh"

TOOLS=(buildah conntrack debootstrap dpkg-dev gcc iproute2 iptables jq libc6-dev libnftables1 libseccomp2 make openssl rsync util-linux)
UNPACKED=(dnsmasq-base etcd-server containerd runc containernetworking-plugins golang-1.19-go golang-1.19-src)

missing=()
for tool in "${TOOLS[@]}"; do
  dpkg-query --show --showformat='${Status}' "$tool" 2>/dev/null | grep -q 'ok installed' || missing+=("$tool")
done
if ((${#missing[@]})); then
  echo "installing ${missing[*]}"
  apt-get -o DPkg::Lock::Timeout=300 -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq install --yes --no-install-recommends \
    "${missing[@]}" >/dev/null
fi

if [[ ! -e $DAEMONS/complete ]]; then
  echo "fetching ${UNPACKED[*]}"
  rm -rf "$DAEMONS"
  mkdir -p "$DAEMONS/archives"
  (cd "$DAEMONS/archives" && apt-get -o APT::Sandbox::User=root -qq download "${UNPACKED[@]}")
  for archive in "$DAEMONS"/archives/*.deb; do dpkg-deb --extract "$archive" "$DAEMONS"; done
  rm -r "$DAEMONS/archives"
  touch "$DAEMONS/complete"
fi
