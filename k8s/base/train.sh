#!/bin/bash
# Trains the recipe; a second try of the same job goes on from the newest whole checkpoint.
set -euo pipefail
folder=$1
resume=()
if [ -e "$folder/run.json" ]; then
  resume=(--resume)
fi
exec reknit train "${RECIPE:-/etc/reknit/recipe.toml}" --run-folder "$folder" \
  --set metrics.host=0.0.0.0 --set metrics.port=9464 "${resume[@]}"
