#!/usr/bin/env bash
# Install the Debian packages that tests/cluster needs, as root: SLURM, pdsh, ssh and iproute2.
set -euo pipefail
packages=(slurmd slurmctld slurm-client munge pdsh openssh-server iproute2)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
