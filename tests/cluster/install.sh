#!/usr/bin/env bash
# The packages that tests/cluster needs (Debian, as root): a SLURM, pdsh, ssh, and network namespaces.
set -euo pipefail
packages=(slurmd slurmctld slurm-client munge pdsh openssh-server iproute2)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
