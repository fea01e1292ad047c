package main

import "testing"

func TestEndedLate(t *testing.T) {
	for _, c := range []struct {
		text string
		want bool
	}{
		{"fuzz: elapsed: 6s, execs: 4606 (0/sec), new interesting: 26 (total: 32)\n--- FAIL: FuzzX (6.02s)\n    context deadline exceeded\nFAIL\n", true},
		{"--- FAIL: FuzzX (6.02s)\n    --- FAIL: FuzzX (0.00s)\n        x_test.go:3: context deadline exceeded\n    \n    Failing input written to testdata/fuzz/FuzzX/1\nFAIL\n", false},
		{"--- FAIL: FuzzX (6.02s)\n    fuzzing process hung or terminated unexpectedly: exit status 2\nFAIL\n", false},
		{"panic: test timed out\n", false},
	} {
		if got := endedLate(c.text); got != c.want {
			t.Errorf("%q: %v", c.text, got)
		}
	}
}
