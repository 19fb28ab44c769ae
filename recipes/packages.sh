# shellcheck shell=bash disable=SC2034
# Sourced by quickstart.sh and tests/run.sh: installs what is missing with apt, and says what it does.
#   need PACKAGE...     returns 1, naming the command to type, when packages are missing and cannot be installed

build_packages="gcc g++ cmake ninja-build pkg-config luajit libluajit-5.1-dev libdnnl-dev libjansson-dev libpcre2-dev libutf8proc-dev libedit-dev libsqlite3-dev libopenmpi-dev"

need() {
  local missing="" p
  for p in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
  done
  [ -n "$missing" ] || return 0
  local as=""
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null; then as=sudo; else
      echo "missing packages; as root type: apt-get install -y --no-install-recommends$missing" >&2
      return 1
    fi
  fi
  echo "installing:$missing"
  local log; log=$(mktemp)
  if ! { $as apt-get update -q && DEBIAN_FRONTEND=noninteractive $as apt-get install -y -q --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2; rm -f "$log"
    echo "apt-get could not install:$missing" >&2
    return 1
  fi
  rm -f "$log"
}
