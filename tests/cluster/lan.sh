#!/bin/bash
# The network of the cluster test, as process 1 of private namespaces: a bridge without an uplink, a
# shared disk in memory at /srv, a private /tmp, and then COMMAND. When it ends, the kernel kills every
# process left in the namespaces, and nothing remains outside.
#
# lan.sh KEEP... -- COMMAND...   KEEP: folders that stay visible even if they lie in /tmp
set -eu
mount -t tmpfs tmpfs /srv
mkdir -p /srv/laptop/tmp
tmp=$(readlink -f /tmp) # it may be a symbolic link
while [ "$1" != -- ]; do
    case $1 in "$tmp"/*)
        mkdir -p "/srv/laptop/tmp/${1#"$tmp"/}"
        mount --rbind "$1" "/srv/laptop/tmp/${1#"$tmp"/}" ;;
    esac
    shift
done
shift
here=$PWD
mount --rbind /srv/laptop/tmp /tmp
cd "$here" # enter the mounted folder, not the hidden one
chmod 1777 /tmp
mount -t tmpfs tmpfs /dev/shm

ip link set lo up
ip link add lan type bridge
ip address add 10.83.0.1/24 dev lan
ip link set lan up
"$@"
