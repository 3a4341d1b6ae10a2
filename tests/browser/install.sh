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
log=$(mktemp)
if { apt-get update && apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1; then
    rm "$log"
else
    echo "Chromium could not be installed ($log): the tests in a browser will be skipped."
fi
