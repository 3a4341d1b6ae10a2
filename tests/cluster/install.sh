#!/bin/sh
# Install the system packages of `make cluster-test` (Debian, Ubuntu) that are missing, and start no
# service.
set -eu

missing=
command -v ip > /dev/null || missing="$missing iproute2"
command -v nsenter > /dev/null || missing="$missing util-linux"
command -v ssh-keygen > /dev/null || missing="$missing openssh-client"
[ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
command -v rsync > /dev/null || missing="$missing rsync"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "Expected$missing"
    echo "     Got none, and no root with apt-get to install them"
    echo "   Where this machine"
    echo "   To do install them with your system's package manager"
    exit 1
fi >&2

# Debian starts the services that it installs, unless policy-rc.d exits with 101.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
fi
echo "Installing$missing ..."
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086  # one word a package
apt-get -qq install -y --no-install-recommends $missing > /dev/null
