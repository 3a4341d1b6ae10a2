#!/bin/bash
# One host of the cluster test, as process 1 of private pid, mount, network and UTS namespaces: name,
# address, home, private /tmp, /run and /dev/shm, and an ssh server. Killing it has the effect of a
# power failure: the kernel kills every process of the host and removes its network.
#
# host.sh NAME ADDRESS GATEWAY FOLDER KEEP...   KEEP: folders that stay visible even if they lie in /tmp
set -eu
name=$1 address=$2 gateway=$3 folder=$4
shift 4

hostname "$name"
mount -t proc proc /proc

tmp=$folder/tmp
mkdir -p "$tmp" "$folder/home/.ssh" "$folder/run" "$folder/shm"
hidden=$(readlink -f /tmp) # it may be a symbolic link
for keep in "$@"; do
    case $keep in "$hidden"/*)
        mkdir -p "$tmp/${keep#"$hidden"/}"
        mount --rbind "$keep" "$tmp/${keep#"$hidden"/}" ;;
    esac
done
mount --rbind "$tmp" /tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
chmod 1777 /tmp /dev/shm

# Logins get this home directory, and the host name resolves to the address.
printf 'root:x:0:0:root:%s:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n' "$folder/home" > "$folder/passwd"
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > "$folder/hosts"
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/hosts" /etc/hosts

ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$address/24" dev eth0
ip link set eth0 up
# Ray asks the kernel for the address of the default route; the gateway leads nowhere.
ip route add default via "$gateway"

ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
cat > "$folder/sshd_config" << CONFIG
ListenAddress $address:22
HostKey $folder/host_key
AuthorizedKeysFile $folder/home/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
MaxSessions 100
CONFIG
# Bash as process 1 reaps orphaned processes.
/usr/sbin/sshd -D -f "$folder/sshd_config" -E "$folder/sshd.log" &
wait
