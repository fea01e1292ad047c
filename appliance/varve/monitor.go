package main

import (
	"fmt"
	"os"
	"strconv"
)

// monitorSlack is how much later than it asks the Go runtime's monitor thread may be woken, in nanoseconds.
const monitorSlack = 200_000

// relaxMonitor lets the kernel wake the runtime's monitor thread (sysmon) with up to monitorSlack of delay instead of the usual
// 50 us.
//
// While any goroutine runs, the monitor sleeps for 20 us at a time, which with the usual slack makes some 7,000 wake-ups a
// second. In a virtual machine each of them costs two exits to the hypervisor and more: measured on a 2-core KVM guest under
// 4 KiB writes at queue depth 16, a fifth of all CPU time of this process went there. What the monitor has to do in time is to take
// the processor from a goroutine that is in a long system call; another 150 us before that cost less than was gained: 4 KiB
// synced writes one at a time became 10 to 20 % more, and CPU per write fell from 23 to 17 us.
//
// The monitor is the first thread that a Go program begins. Of another thread than one's own this may only be changed with
// CAP_SYS_NICE; without it everything stays as it is. The sandboxed unit of the gateway has no capabilities, so there it does.
func relaxMonitor(tasks, proc string) error {
	tid, err := firstThread(tasks, os.Getpid())
	if err != nil {
		return err
	}
	return os.WriteFile(fmt.Sprintf("%s/%d/timerslack_ns", proc, tid), []byte(strconv.Itoa(monitorSlack)), 0)
}

// firstThread finds the thread that a process with that id began first: thread numbers ascend, and may have wrapped since.
func firstThread(tasks string, pid int) (int, error) {
	entries, err := os.ReadDir(tasks)
	if err != nil {
		return 0, err
	}
	const wrap = 1 << 22 // PID_MAX_LIMIT
	first := 0
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == pid {
			continue
		}
		if first == 0 || (tid-pid+wrap)%wrap < (first-pid+wrap)%wrap {
			first = tid
		}
	}
	if first == 0 {
		return 0, fmt.Errorf("no thread but the first in %s", tasks)
	}
	return first, nil
}
