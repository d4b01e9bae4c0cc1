# Sourced by the launchers: messages, checks of the environment, commands that --dry-run only shows.
# shellcheck shell=bash

PROGRAM=$(basename "$0")
DRY_RUN=${DRY_RUN:-}

die() { # die CODE MESSAGE...
  local code=$1
  shift
  echo "$PROGRAM: error: $*" >&2
  exit "$code"
}

need() { # need NAME "what it is": the environment must set NAME
  [[ -n ${!1:-} ]] || die 2 "$1 is not set: $2"
}

have() { # have PROGRAM "where it comes from"
  command -v "$1" >/dev/null || die 2 "$1 is not installed: $2"
}

show() { # the words of a command, quoted so that a shell takes them
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

run() { # run a command, or show it under --dry-run
  if [[ -n $DRY_RUN ]]; then
    show "$@"
  else
    "$@"
  fi
}

help() { # the comment at the head of a script is its help
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

commit() { # the commit of the checkout, with -dirty where files differ from it
  git -C "$1" describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown
}
