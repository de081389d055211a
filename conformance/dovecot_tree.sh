#!/bin/sh
# Unpack the Dovecot 2.4 of Debian 13 into FOLDER (.dovecot-2.4 without it), for the parts dovecot24 and import24:
# 30 MB of packages and 10 MB of lists, signed with Debian's keys. No package of this system changes; no root is needed.
set -eu
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$repository/.dovecot-2.4}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || { echo "no $keyring: apt install debian-archive-keyring" >&2 && exit 1; }

# mirror SUFFIX PUBLIC: where this system has its own release from, if it is a Debian that says so.
mirror() {
    own=$(. /etc/os-release && echo "${VERSION_CODENAME:-}$1")
    found=$(apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)' |
        sed -n "s/^Debian main $own //p" | head -n 1)
    echo "${found:-$2}"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt fetches as a user of its own
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/tree"
: >"$work/status" # as if nothing were installed: every library comes along
cat >"$work/trixie.sources" <<END
Types: deb
URIs: $(mirror "" http://deb.debian.org/debian)
Suites: trixie trixie-updates
Components: main
Signed-By: $keyring

Types: deb
URIs: $(mirror -security http://deb.debian.org/debian-security)
Suites: trixie-security
Components: main
Signed-By: $keyring
END
apt() {
    apt-get -q -y -o Dir::Etc::sourcelist="$work/trixie.sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$work" -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" \
        -o Dir::Cache="$work/cache" -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}
apt update --error-on=any
apt install --download-only --no-install-recommends dovecot-imapd dovecot-auth-lua lua-socket

for package in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$work/tree"
done
for name in bin sbin lib lib64; do # what another package would link
    if [ -d "$work/tree/usr/$name" ] && [ ! -e "$work/tree/$name" ]; then
        ln -s "usr/$name" "$work/tree/$name"
    fi
done
mkdir -p "$work/tree/dev" "$work/tree/proc" "$work/tree/tmp"
chmod 1777 "$work/tree/tmp"
touch "$work/tree/etc/passwd" "$work/tree/etc/group" # this system's are mounted over them
[ -x "$work/tree/usr/sbin/dovecot" ] || { echo "Debian 13 gave no Dovecot" >&2 && exit 1; }
rm -rf "$folder"
mv "$work/tree" "$folder"
echo "Dovecot 2.4 is in $folder"
