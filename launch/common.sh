# Sourced by the scripts beside it.
# shellcheck shell=bash

exec 3>&1 # where a dry run prints, even from within $(...)

# need NAME...: stop with status 2 and name the environment variables that are missing.
need() {
  local name missing=()
  for name in "$@"; do [[ -n ${!name:-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) && return
  echo "${0##*/}: missing: ${missing[*]}; set them in the environment, see the head of $0" >&2
  exit 2
}

# quoted WORD...: the words as one line that a shell reads back as these words.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# run COMMAND...: run it; with DRY_RUN=1 print it instead.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    quoted "$@" >&3
  else
    "$@" 3>&-
  fi
}
