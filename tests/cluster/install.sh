#!/bin/sh
# The system packages of `make cluster-test` (Debian, Ubuntu): installed only where one is missing, and
# no service is started by it.
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

# Debian starts a service that it installs; a policy that says no is its way not to.
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
