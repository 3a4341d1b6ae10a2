#!/usr/bin/env bash
# Install Debian's Chromium for the tests in a browser, where apt and root are at hand; elsewhere they are skipped.
set -euo pipefail

if command -v chromium >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "No chromium on this machine: the tests in a browser will be skipped."
    exit 0
fi
echo "Installing chromium for the tests in a browser ..."
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends chromium; } >/tmp/sampimp-chromium.log 2>&1 ||
    echo "Chromium could not be installed (/tmp/sampimp-chromium.log): the tests in a browser will be skipped."
