#!/usr/bin/env bash
# The step `secrets` of compose.yaml: makes of each database's password a file for the database and one with the url for its roles.
#
# Compose mounts a secret's file as it lies on the machine. A clone made under a strict umask, or a careful operator, leaves it readable
# for its owner alone, and neither the roles (65532) nor the servers (999) are that. Compose can copy a secret in with another owner, but
# not into a container whose root is read-only. So this copies it, as root without a network, into a volume that only these mount.
set -euo pipefail
umask 077

roles=65532  # the image's user
postgres=999 # the databases' image's

hand() { # FILE USER TEXT: at once, for somebody may be reading it
  printf '%s\n' "$3" >"$1.new"
  chmod 400 "$1.new"
  chown "$2:$2" "$1.new"
  mv -f "$1.new" "$1"
}

encoded() { # TEXT: so that it may stand in a url, whatever it is made of
  local LC_ALL=C text=$1 i c
  for ((i = 0; i < ${#text}; i++)); do
    c=${text:i:1}
    case $c in
      [A-Za-z0-9._~-]) printf '%s' "$c" ;;
      *) printf '%%%02X' "$(($(printf '%d' "'$c") & 255))" ;;
    esac
  done
}

for name in orders payments; do
  password=$(<"/run/secrets/${name}_db_password")
  [ -n "$password" ] || { echo "secrets: ${name}_db_password is empty" >&2; exit 1; }
  hand "/out/$name/password" "$postgres" "$password"
  hand "/out/$name/url" "$roles" "postgres://$name:$(encoded "$password")@$name-db:5432/$name"
done
