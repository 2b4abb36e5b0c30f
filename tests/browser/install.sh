#!/usr/bin/env bash
# The browser that tests/e2e/test_*_browser.py open pages in (Debian, as root).
set -euo pipefail
packages=(chromium)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
