#!/usr/bin/env bash
# Makes .venv-NAME from requirements/NAME.txt: an environment over the packages of .venv, which stays as it is. What both
# hold is taken from the new one.
# usage: extra.sh NAME
set -eu
cd "$(dirname "$0")/.."
home=.venv-$1
[ -e "requirements/$1.txt" ] || { echo "There is no requirements/$1.txt." >&2 && exit 2; }
rm -rf "$home"
.venv/bin/python -m venv --without-pip "$home"
"$home/bin/python" - <<'END'
import os
import sys
import sysconfig

own = sysconfig.get_path("purelib")
packages = os.path.relpath(own, sys.prefix)
with open(os.path.join(own, "zz_over_venv.pth"), "w") as file:
    file.write(f"import os, site, sys; site.addsitedir(os.path.join(sys.prefix, os.pardir, '.venv', {packages!r}))\n")
END
echo "Installing requirements/$1.txt into $home …"
.venv/bin/python -m pip --disable-pip-version-check --quiet --python "$home/bin/python" install --no-deps \
  -r "requirements/$1.txt"
touch "$home/ready"
