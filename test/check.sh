#!/bin/sh
# check.sh: what can be said of the source without running it. Prints each finding; fails if there is one.
cd "$(dirname "$0")/.." || exit 2
status=0
bad=$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l)
[ -z "$bad" ] || { echo "not formatted: $bad"; status=1; }
go vet ./... || status=1
go vet -tags 'e2e planted' ./test/... || status=1
CGO_ENABLED=0 go build ./... || status=1
left=$(git grep -nE 'TODO|FIXME|XXX' -- '*.go' '*.sh' Makefile ':!test/check.sh' ':!test/layout' | head -5)
[ -z "$left" ] || { echo "left undone: $left"; status=1; }
big=$(git ls-files -z | xargs -0 -r stat -c '%s %n' 2>/dev/null | awk '$1 > 1000000 {print $2}')
[ -z "$big" ] || { echo "large files in git: $big"; status=1; }
exit $status
