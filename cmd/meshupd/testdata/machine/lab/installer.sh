# An integrator's own installer: two files, and a boot state "DEFAULT" or "DEFAULT TRIAL LEFT".
set -eu
cd "$(dirname "$0")"
put() { echo "$*" >boot.new; sync boot.new; mv boot.new boot; sync .; }
read -r default trial left <boot || :
case "$1" in
get-state)
	with=
	if [ -n "${trial:-}" ]; then with=",\"trial\":\"$trial\",\"left\":$left"; fi
	echo "{\"default\":\"$default\",\"booted\":\"$(tr AB ab <booted)\"$with}" ;;
try) if [ "$2" = "$default" ]; then put "$default"; else put "$default" "$2" "$3"; fi ;;
confirm | fallback) put "$2" ;;
write)
	head -c 9 "$MESHUPD_IMAGE" | grep -q refuse-me && { echo "the image is for another board" >&2; exit 1; }
	echo "50%"
	sha256sum <"$MESHUPD_IMAGE" >>told
	cat >"$2"
	sync "$2" ;;
check) [ "$(head -c "$MESHUPD_SIZE" "$2" | sha256sum | cut -d" " -f1)" = "$MESHUPD_SHA256" ] ;;
esac
