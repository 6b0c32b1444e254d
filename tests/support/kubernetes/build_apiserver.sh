#!/usr/bin/env bash
# Builds kube-apiserver of Debian's sources, and unpacks Debian's etcd, into the folder given (Debian 12, amd64 or
# arm64). Nothing is installed, no right beyond the folder is needed, and the network only for Debian's packages.
# Takes some ten minutes on two cores, and no time when it has been done before.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)
[ -x "$target/bin/kube-apiserver" ] && [ -x "$target/bin/etcd" ] && exit 0

work=$target/work
mkdir -p "$work"/{lists/partial,archives/partial,debs,source,root} "$target/bin"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for kind in deb deb-src; do
  echo "$kind [signed-by=$keyring] http://deb.debian.org/debian bookworm main"
done >"$work/sources.list"
apt=(apt-get -qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work" -o APT::Sandbox::User=)
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download golang-1.19-go golang-1.19-src rsync etcd-server \
  golang-github-modern-go-reflect2-dev)
for package in "$work"/debs/*.deb; do dpkg -x "$package" "$work/root"; done
(cd "$work/source" && "${apt[@]}" source --download-only kubernetes && tar xzf ./*.orig.tar.gz)

cd "$work"/source/kubernetes-*/
# the copy that it brings crashes when it was compiled by Go 1.18 or newer
rm vendor/github.com/modern-go/reflect2/*.{go,s}
cp "$work"/root/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} vendor/github.com/modern-go/reflect2/
mkdir -p .go/src/k8s.io
ln -sfn ../../.. .go/src/k8s.io/kubernetes
export GOROOT=$work/root/usr/lib/go-1.19 GOPATH=$PWD/.go GOCACHE=$work/gocache GOPROXY=off CGO_ENABLED=0
export PATH=$GOROOT/bin:$work/root/usr/bin:$PATH
make WHAT=cmd/kube-apiserver
cp _output/bin/kube-apiserver "$work/root/usr/bin/etcd" "$target/bin"
rm -rf "$work"
