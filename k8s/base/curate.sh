#!/bin/bash
# Makes the recipe's set; a second try goes on with what the first one has left.
set -euo pipefail
exec reknit curate "${RECIPE:-/etc/reknit/recipe.toml}"
