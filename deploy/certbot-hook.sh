#!/bin/sh
# For /etc/letsencrypt/renewal-hooks/deploy/ksync: gives the server a copy that it may read. It notices the
# new files itself and uses them for the next connection; nothing is restarted.
set -eu
into=${1:-/etc/ksync/tls}
owner=${2:-ksync}
install -d -o "$owner" -m 0700 "$into"
for file in fullchain.pem privkey.pem; do
    install -o "$owner" -m 0400 "$RENEWED_LINEAGE/$file" "$into/.$file.new"
    mv "$into/.$file.new" "$into/$file"
done
