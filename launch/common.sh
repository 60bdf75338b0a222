# Sourced by the scripts beside it.
# shellcheck shell=bash

exec 3>&1 # where a dry run prints, even from within $(...)

# What COMMAND needs to be told (`needed`), what another script must pass on of it (`passed`), its
# words for sotalign (`words`), the file that is there once all is done (`result`), and extras of
# the package that it needs on a TPU.
# shellcheck disable=SC2034
case ${COMMAND:=train} in
  train)
    needed=(CONFIG WORKDIR) passed=(CONFIG="${CONFIG:-}" WORKDIR="${WORKDIR:-}")
    words=(train --config="${CONFIG:-}" --workdir="${WORKDIR:-}") result=${WORKDIR:-}/results.json
    extras=
    ;;
  encode)
    needed=(OUT) passed=(COMMAND=encode OUT="${OUT:-}")
    words=(encode --out="${OUT:-}") result=${OUT:-}/manifest.json
    extras='[timm,torchax]'
    ;;
  *)
    echo "${0##*/}: COMMAND: must be train or encode, got '$COMMAND'" >&2
    exit 2
    ;;
esac

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
