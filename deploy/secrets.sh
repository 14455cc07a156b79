#!/bin/sh
# Makes the secrets that compose.yaml hands out, in secrets/. What is there stays as it is.
set -eu
cd "$(dirname "$0")/.."
mkdir -p -m 700 secrets
cd secrets
umask 022  # each container's own user reads them; on this machine the folder is closed

new() {
    [ -s "$1" ] || cat > "$1"
}
random() {
    od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n'
}

random | new owner_password
random | new api_password
random | new jwt_secret_key
random | new metrics_token
printf %s "postgresql://shop:$(cat owner_password)@postgres/shop" | new owner_url
printf %s "postgresql://shop_api:$(cat api_password)@postgres/shop" | new api_url
