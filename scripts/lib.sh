# Shared by the scripts here; sourced, never run. POSIX sh.

say() { printf '%s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# need_debian PACKAGE...: make sure that Debian packages are installed. As root they are installed; otherwise
# the one command that would do it is printed, and the script ends.
need_debian() {
    missing=
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    if [ "$(id -u)" != 0 ]; then
        die "Debian packages are missing. Install them, then run this again:
  sudo apt-get update && sudo apt-get install --no-install-recommends -y$missing"
    fi
    say "installing Debian packages:$missing"
    tries=0
    until install_debian "$missing"; do # another process may be installing something
        tries=$((tries + 1))
        [ "$tries" -lt 5 ] || die "Debian packages could not be installed:$missing"
        sleep 5
    done
}

install_debian() {
    # shellcheck disable=SC2086
    apt-get update -qq >/dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get install -o DPkg::Lock::Timeout=300 \
            -qq -y --no-install-recommends $1 >/dev/null
}

# find_python: print a Python of at least 3.11 that can make virtual environments and compile extensions.
find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" - <<'EOF' >/dev/null 2>&1 || continue
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
EOF
        command -v "$candidate"
        return 0
    done
    return 1
}
