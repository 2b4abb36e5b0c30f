#!/usr/bin/env bash
# What tests/container builds and runs an image with (Debian, as root): no daemon, and no registry of images.
set -euo pipefail
packages=(buildah mmdebstrap)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
