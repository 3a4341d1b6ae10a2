#!/bin/bash
# make cluster-test: `ray up`, a host that loses its network, a host that dies, `ray down`, in namespaces
# that the kernel removes afterwards. run.sh PYTHON [PYTEST OPTIONS]
set -eu
# Resolve symbolic links: their targets may lie in folders that the hosts hide.
cd -P "$(dirname "$0")/../.."
python=$(command -v "$1")
python=$(cd -P "$(dirname "$python")" && pwd)/$(basename "$python")
shift

skip() {
    echo "SKIPPED make cluster-test, NOTHING WAS TESTED: $1"
    exit 0
}
[ "$(uname)" = Linux ] || skip "it needs Linux, and this is $(uname)"
[ "$(id -u)" = 0 ] || skip "it needs root, for network namespaces; this is $(id -un)"
new=(--net --mount --pid --uts --ipc --fork --kill-child)
unshare "${new[@]}" true || skip "unshare is missing or not permitted here"
case $PWD/ in /srv/* | /run/* | /dev/shm/*) skip "its hosts hide $PWD; move the checkout elsewhere" ;; esac
tests/cluster/install.sh || skip "its system packages are missing"
unshare "${new[@]}" ip link add lan type bridge || skip "this kernel has no network bridges"

prefixes=$("$python" -c 'import sys; print(sys.prefix, sys.base_prefix)')
export SAMPIMP_LAN=1
# Measured: 200 to 410 s on two cores, the latter at a load of 3 to 7 by other processes.
# shellcheck disable=SC2086  # two folders
exec timeout --foreground --kill-after=5 600 \
    unshare "${new[@]}" --mount-proc tests/cluster/lan.sh "$PWD" $prefixes -- \
    "$python" -m pytest -m cluster -p no:cacheprovider tests/cluster "$@"
