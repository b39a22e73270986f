# A machine: what starts it, RAUC where it is the installer, and the daemon that is killed and started with it. With HALVES the
# daemon is the user nobody, and meshupd apply is root.
set -eu
cd "$(dirname "$0")"
export PATH="$PWD/bin:$PATH"
get() { grub-editenv grubenv list | sed -n "s/^$1=//p"; }
turn() {
	case "$(cat kind)" in
	command)
		read -r default trial left <boot || :
		pick=$default
		if [ "${left:-0}" -gt 0 ]; then
			pick=$trial
			echo "$default $trial $((left-1))" >boot
		fi
		pick=$(echo "$pick" | tr ab AB) ;;
	*) # what packaging/boot/grub.cfg does
		pick=
		for s in $(get ORDER); do
			if [ "$(get "${s}_OK")" = 1 ] && [ "$(get "${s}_TRY")" = 0 ] && [ -z "$pick" ]; then pick=$s; fi
		done
		pick=${pick:-A}
		grub-editenv grubenv set "${pick}_TRY=1" ;;
	esac
	echo "$pick" >booted
	echo "quiet meshupd.slot=$(echo "$pick" | tr AB ab)" >cmdline
	cat /proc/sys/kernel/random/uuid >boot_id
}
end() { for p in "$@"; do if [ -s "$p" ]; then kill -9 "$(cat "$p")" 2>/dev/null || :; rm -f "$p"; fi; done; }
# The kernel's word on which slot runs, and in which start of the machine.
kernel() {
	exec unshare -m --propagation private sh -c 'mount --bind cmdline /proc/cmdline && mount --bind boot_id /proc/sys/kernel/random/boot_id && exec "$@"' sh "$@"
}
on() {
	turn
	if [ "$(cat kind)" = rauc ]; then
		rauc --conf=system.conf --override-boot-slot="$(cat booted)" service >>rauc.log 2>&1 &
		echo $! >rauc.pid
		gdbus wait --system --timeout 60 de.pengutronix.rauc
	fi
	as=
	if [ -n "${HALVES:-}" ]; then
		kernel meshupd apply --config meshupd.toml --socket apply.sock >>daemon.log 2>&1 &
		echo $! >apply.pid
		as="setpriv --reuid nobody --regid nogroup --clear-groups --no-new-privs"
	fi
	kernel $as meshupd daemon --config meshupd.toml >>daemon.log 2>&1 &
	echo $! >daemon.pid
}
case "$1" in
setup)
	echo "$2" >kind
	chmod 755 .. . # for the user nobody
	mkdir -p bin state run
	cp "$(command -v meshupd)" bin/meshupd
	cp systemctl bin/
	chmod 755 bin/*
	[ -z "${HALVES:-}" ] || { cat apply.toml.in >>"$2.toml.in"; chown nobody state run; }
	mv "$2.toml.in" meshupd.toml.in
	for f in meshupd.toml system.conf bus.conf; do sed "s,DIR,$PWD,g" "$f.in" >"$f"; done
	truncate -s 1M a b
	echo a >boot
	touch alive
	grub-editenv grubenv create
	grub-editenv grubenv set ORDER="A B" A_OK=1 A_TRY=0 B_OK=0 B_TRY=0
	[ "$2" = rauc ] || exit 0
	for k in right wrong; do
		openssl req -x509 -newkey rsa:2048 -nodes -keyout $k.key -out $k.crt -subj "/CN=$k" -days 3650 2>/dev/null
	done
	dbus-daemon --config-file=bus.conf --nofork --nopidfile >bus.log 2>&1 &
	echo $! >bus.pid
	n=0
	until [ -S bus ]; do n=$((n+1)); [ $n -lt 600 ]; sleep 0.1; done ;;
bundle)
	mkdir -p "$3/in"
	head -c 300000 /dev/urandom >"$3/rootfs.img"
	cp "$3/rootfs.img" "$3/in/"
	printf '[update]\ncompatible=kiosk\nversion=%s\n[image.rootfs]\nfilename=rootfs.img\n' "$3" >"$3/in/manifest.raucm"
	rauc --cert="$2.crt" --key="$2.key" bundle "$3/in" "$3/bundle.raucb" ;;
sell) # VERSION [FIRST WORDS OF THE IMAGE]
	mkdir -p "$2"
	{ printf %s "${3:-}"; head -c 300000 /dev/urandom; } >"$2/rootfs.img"
	meshupd release create --version="$2" --trust=trust --image="$2/rootfs.img"
	meshupd release sign "dist/kiosk-a_$2" --key=acme.sec.asc ;;
on)
	on
	n=0
	until meshupd status >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 300 ] || { tail daemon.log >&2; exit 1; }; sleep 0.1; done ;;
reboot) # in a session of its own: it ends the daemon that runs it
	setsid sh lab.sh again </dev/null >>reboot.log 2>&1 & ;;
again) end daemon.pid apply.pid rauc.pid; on ;;
until)
	n=0
	until [ "$(cat run/state 2>/dev/null)" = "$2" ]; do
		n=$((n+1))
		if [ $n -gt 900 ]; then tail -n 20 daemon.log rauc.log reboot.log >&2; exit 1; fi
		sleep 0.1
	done ;;
rolledback) # VERSION: until it was, and the next state is not the one of the release before
	n=0
	until meshupd history --plain 2>/dev/null | grep -F "$2" | grep -q rolled-back && [ "$(cat run/state)" = rolled-back ]; do
		n=$((n+1))
		if [ $n -gt 900 ]; then tail -n 20 daemon.log reboot.log >&2; exit 1; fi
		sleep 0.1
	done ;;
booted) cat booted ;;
rights) # what the daemon's process has
	grep -E '^(Uid|CapEff)' "/proc/$(cat daemon.pid)/status" ;;
off) end daemon.pid apply.pid rauc.pid bus.pid ;;
esac
