package server

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCrashIsKept starts this test's binary as a process that crashes, and as one that ends in order.
func TestCrashIsKept(t *testing.T) {
	if dir := os.Getenv("VARVE_TEST_CRASH"); dir != "" {
		done, err := KeepCrash(dir, "1.2.3", "gateway")
		if err != nil {
			t.Fatal(err)
		}
		if os.Getenv("VARVE_TEST_CRASH_HOW") == "panic" {
			dead := make(chan struct{})
			go func() { defer close(dead); panic("the map is upside down") }()
			<-dead
		}
		done()
		return
	}
	dir := t.TempDir()
	run := func(how string) {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestCrashIsKept$")
		cmd.Env = append(os.Environ(), "VARVE_TEST_CRASH="+dir, "VARVE_TEST_CRASH_HOW="+how)
		out, err := cmd.CombinedOutput()
		if (how == "panic") != (err != nil) {
			t.Fatalf("%s: %v\n%s", how, err, out)
		}
	}
	run("in order")
	if list, err := Crashes(dir); len(list) != 0 || err != nil {
		t.Fatal(list, err)
	}
	run("panic")
	done, err := KeepCrash(dir, "1.2.3", "gateway") // a process that runs has none yet
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	list, err := Crashes(dir)
	if err != nil || len(list) != 1 || list[0].Head != "varve 1.2.3 gateway: panic: the map is upside down" {
		t.Fatalf("%+v %v", list, err)
	}
	if text, err := os.ReadFile(list[0].File); err != nil || !strings.Contains(string(text), "TestCrashIsKept") {
		t.Fatal(string(text), err)
	}
	for i := range crashesMax + 5 {
		name := filepath.Join(dir, "2001010"+string(rune('a'+i))+"-1.txt")
		if err := os.WriteFile(name, []byte("varve 1 x\npanic: y\nz\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if list, err = Crashes(dir); len(list) != crashesMax || err != nil {
			t.Fatal(len(list), err)
		}
	}
}
