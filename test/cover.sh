#!/bin/sh
# cover.sh PROFILE GOAL WHAT: says how much of the code a run of tests has been through, in per cent of its statements, and which files least;
# fails below the goal.
go tool cover -func "$1" >/dev/null || exit 1
awk -v goal="$2" -v what="$3" '
	NR > 1 { split($1, at, ":"); if ($3 > 0 && !($1 in hit)) { hit[$1]; done[at[1]] += $2; sum += $2 }
		if (!($1 in seen)) { seen[$1]; all[at[1]] += $2; total += $2 } }
	END {
		for (f in all) if (all[f] >= 40) { p = 100 * done[f] / all[f]; low = low sprintf("%5.1f %s\n", p, f) }
		printf "» coverage of %s: %.1f %% of %d statements (goal %s %%); least:\n", what, 100 * sum / total, total, goal
		printf "%s", low | "sort -n | head -5"; close("sort -n | head -5")
		exit (100 * sum / total < goal)
	}' "$1"
