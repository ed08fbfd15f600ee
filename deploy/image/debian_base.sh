#!/usr/bin/env bash
# debian_base.sh FOLDER: two Debian roots with Python as archives, to build the image from without a container registry:
# FOLDER/base.tar (python3) and FOLDER/build-base.tar (and venv). What is there already stays. Run as root.
set -euo pipefail

folder=$(mkdir -p "$1" && cd "$1" && pwd)
suite=bookworm
if [ -f "$folder/base.tar" ] && [ -f "$folder/build-base.tar" ]; then
    exit 0
fi

# The mirror that this machine's apt uses for the suite, if it uses one; debootstrap's own otherwise.
# shellcheck disable=SC2016
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
    awk -v suite="$suite" '$1 == suite { print $2; exit }') || mirror=

work=$(mktemp -d "$folder/.root.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root

archive() {
    rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
        "$root"/var/log/*.log "$root"/var/log/apt "${root:?}"/dev/*
    tar --create --file "$work/archive.tar" --sort=name --numeric-owner --xattrs --directory "$root" .
    mv "$work/archive.tar" "$1"
}

debootstrap --variant=minbase --include=python3,ca-certificates "$suite" "$root" ${mirror:+"$mirror"}
archive "$folder/base.tar"

# ensurepip is all that python3-venv adds; its packages are fetched here, outside the root, with this machine's apt.
(cd "$work" && apt-get download -q python3.11-venv python3-pip-whl python3-setuptools-whl python3-distutils python3-lib2to3)
for package in "$work"/*.deb; do
    dpkg-deb --extract "$package" "$root"
done
archive "$folder/build-base.tar"
