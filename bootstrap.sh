#!/bin/sh
# Sets vmferry up in ./.venv and runs it: `sh bootstrap.sh demo [OPTIONS]`, `sh bootstrap.sh test`,
# or `sh bootstrap.sh install` for the command alone (.venv/bin/vmferry). Needs Python 3.11 or newer;
# installs Debian's python3-venv when it is missing and this user may.
set -eu
cd "$(dirname "$0")"
verb=${1:-install}
[ $# -gt 0 ] && shift

python=""
for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null 2>&1 &&
     "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "vmferry needs Python 3.11 or newer, and found none. Debian: apt-get install python3; Fedora: dnf install python3" >&2
  exit 2
fi

if [ ! -x .venv/bin/pip ]; then
  rm -rf .venv
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    # Debian keeps it in a package of its own.
    as_root=""
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    if command -v apt-get >/dev/null 2>&1 && $as_root true 2>/dev/null; then
      $as_root apt-get update -qq
      $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
      "$python" -m venv .venv
    else
      echo "This Python has no venv module. Debian: sudo apt-get install python3-venv; then run this again." >&2
      exit 2
    fi
  fi
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
case $verb in
  install) .venv/bin/pip install -q -e '.[uvloop]' && echo "installed: $(pwd)/.venv/bin/vmferry" ;;
  demo) .venv/bin/pip install -q -e '.[uvloop]' && exec .venv/bin/vmferry demo "$@" ;;
  test) .venv/bin/pip install -q 'tox>=4.18' && exec .venv/bin/tox run "$@" ;;
  *) echo "usage: sh bootstrap.sh [install | demo [OPTIONS] | test [TOX OPTIONS]]" >&2; exit 2 ;;
esac
