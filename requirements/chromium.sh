#!/usr/bin/env bash
# Installs Chromium with apt where there is none: the tests look at MLflow's pages with it.
set -eu
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
apt=(apt-get)
[ "$(id -u)" = 0 ] || apt=(sudo apt-get)
if ! command -v "${apt[0]}" >/dev/null || ! "${apt[@]}" update -q ||
  ! "${apt[@]}" install -q -y --no-install-recommends chromium fonts-dejavu-core; then
  echo "make test-all needs Chromium, and '${apt[*]} install chromium' does not work here: install a program called chromium, chromium-browser or google-chrome, and run this again." >&2
  exit 2
fi
