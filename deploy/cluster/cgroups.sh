#!/usr/bin/env bash
# cgroups.sh make|remove NAME: the cgroup of a cluster, with one for each node in it, in every hierarchy (v2, or v1's many).
# Cgroups are the only thing of a cluster that lies outside its namespaces.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
action=$1 name=$2
SHARE=6 # of the processors, where others want them too: as that many processes

hierarchies() {
  if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    echo /sys/fs/cgroup
  else
    for folder in /sys/fs/cgroup/*/; do
      if [[ -e $folder/cgroup.procs ]]; then echo "${folder%/}"; fi
    done
  fi
}

make() {
  for hierarchy in $(hierarchies); do
    for cgroup in "$hierarchy/$name" "${NODES[@]/#/$hierarchy/$name/}"; do
      mkdir "$cgroup"
      # All of the cluster would have the share of one process of the machine.
      if [[ -e $cgroup/cpu.shares ]]; then echo "$((SHARE * 1024))" >"$cgroup/cpu.shares"; fi
      if [[ -e $cgroup/cpu.weight ]]; then echo "$((SHARE * 100))" >"$cgroup/cpu.weight"; fi
      if [[ $hierarchy == */cpuset ]]; then # without these it takes no process
        cat "$hierarchy/cpuset.cpus" >"$cgroup/cpuset.cpus"
        cat "$hierarchy/cpuset.mems" >"$cgroup/cpuset.mems"
      fi
    done
  done
}

remove() {
  local left=0
  for hierarchy in $(hierarchies); do
    if [[ -d $hierarchy/$name ]]; then find "$hierarchy/$name" -depth -type d -exec rmdir {} + || left=1; fi
  done
  return "$left"
}

case $action in
  make) make ;;
  remove) wait_for 20 remove ;; # processes that were killed take a moment to be gone
  *) echo "cgroups.sh make|remove NAME" >&2 && exit 2 ;;
esac
