package lab

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Usage is what a daemon takes of the machine, as the kernel counts it (proc(5)).
type Usage struct {
	CPU  time.Duration // user and system, since the start
	RSS  int64         // bytes resident now
	Peak int64         // most bytes that were ever resident
}

// clockTick is the unit of CPU times in /proc: 100 a second on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// Usage asks the kernel about the running daemon.
func (d *Device) Usage() (Usage, error) {
	var u Usage
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.PID()))
	if err != nil {
		return u, fmt.Errorf("read the usage of %s: %w", d.Name, err)
	}
	// The name in parentheses may hold spaces: fields are counted from behind it.
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return u, fmt.Errorf("read the usage of %s: %d fields in stat", d.Name, len(fields))
	}
	for _, i := range []int{11, 12} { // utime, stime
		ticks, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return u, fmt.Errorf("read the usage of %s: %w", d.Name, err)
		}
		u.CPU += time.Duration(ticks) * clockTick
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", d.PID()))
	if err != nil {
		return u, fmt.Errorf("read the usage of %s: %w", d.Name, err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		key, value, _ := strings.Cut(sc.Text(), ":")
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			continue
		}
		switch key {
		case "VmRSS":
			u.RSS = kib << 10
		case "VmHWM":
			u.Peak = kib << 10
		}
	}
	return u, nil
}
