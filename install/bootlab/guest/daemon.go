package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/install/bootlab"
	"meshupd/verify/durable"
)

// daemonConfig is what an integrator would write for this machine.
const daemonConfig = `product = "` + bootlab.Product + `"
name = "lab"
trust = "/etc/trust"
state = "/data/meshupd"
run = "/run/meshupd"
[mesh]
mdns = false
listen = ["127.0.0.1"]
[slots]
kind = "block"
a = "%s"
b = "%s"
folder = "/data/slots"
factory = "` + bootlab.FactoryVersion + `"
bootloader = "%s"
restart = ["/sbin/init", "restart"]
[slots.boot]
env = "/boot/grub/grubenv"
[health]
command = ["/sbin/init", "healthy"]
deadline = "40s"
[store]
reserve = "0"
`

const (
	meshupd = "/data/bin/meshupd"
	socket  = "/run/meshupd/api.sock"
	// pluggedBefore says that the stick was taken in an earlier start.
	pluggedBefore = "/data/plugged"
)

// live is the user space of a machine on which the real daemon does everything: this process mounts, starts it, imports what is
// plugged in when the machine is new, and tells what its status says.
func live() error {
	daemon, err := startDaemon()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	_, err = os.Stat(pluggedBefore)
	imported, told := err == nil, ""
	for {
		select {
		case err := <-ended:
			return fmt.Errorf("the daemon ended: %w", err)
		case <-time.After(300 * time.Millisecond): // status has no other way to be followed without a terminal
		}
		line, d, err := status()
		if err != nil {
			continue // it is not up yet; the lab's own limit ends this
		}
		if now := d.State + d.Version + d.Target; now != told {
			told = now
			say(bootlab.MarkerStatus, "%s", line)
		}
		switch {
		case d.State == "rolled-back" && version() == bootlab.FactoryVersion, d.State == "confirmed" && version() != bootlab.FactoryVersion:
			// Nothing is left to do. The daemon is told to stop as a service manager would.
			if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
				return err
			}
			if err := <-ended; err != nil {
				return fmt.Errorf("the daemon was told to stop: %w", err)
			}
			return nil
		case !imported:
			if err := importStick(); err != nil {
				return err
			}
			imported = true
		}
	}
}

func startDaemon() (*exec.Cmd, error) {
	say(bootlab.MarkerBoot, "slot=%s version=%s loader=%s", word("meshupd.slot"), version(), word("lab.loader"))
	kind, err := bootlab.KindOf(word("lab.loader"))
	if err != nil {
		return nil, err
	}
	data, err := deviceOf(bootlab.SerialData)
	if err != nil {
		return nil, err
	}
	if err := unix.Mount(data, "/data", "ext4", 0, ""); err != nil {
		return nil, fmt.Errorf("mount the data: %w", err)
	}
	if _, err := mountBoot(kind); err != nil {
		return nil, err
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	config := "/run/meshupd.toml"
	if err := os.WriteFile(config, fmt.Appendf(nil, daemonConfig, device(bootlab.PartA), device(bootlab.PartB), kind.Name), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(meshupd, "daemon", "--config", config)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = []string{"PATH=/data/bin:/sbin", "HOME=/run"}
	return cmd, cmd.Start()
}

func importStick() error {
	device, err := deviceOf(bootlab.SerialStick)
	if err != nil {
		return err
	}
	out, err := exec.Command(meshupd, "import", device, "--progress", "none", "--socket", socket).CombinedOutput()
	if err != nil {
		return fmt.Errorf("import: %w: %.500s", err, out)
	}
	say(bootlab.MarkerImported, "%s", strings.Join(strings.Fields(string(out)), " "))
	return durable.WriteFile(pluggedBefore, nil, 0o644)
}

// deviceStatus is what this process has to understand of status --json.
type deviceStatus struct {
	State, Version, Target string
	Reason                 *struct{ Code, Detail string }
}

// status asks as a person does. line is all that it says.
func status() (line string, d deviceStatus, err error) {
	out, err := exec.Command(meshupd, "status", "--json", "--socket", socket).Output()
	if err != nil {
		return "", d, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, out); err != nil {
		return "", d, err
	}
	var site struct{ Devices []deviceStatus }
	if err := json.Unmarshal(out, &site); err != nil {
		return "", d, err
	}
	if len(site.Devices) != 1 {
		return "", d, fmt.Errorf("%d devices", len(site.Devices))
	}
	return compact.String(), site.Devices[0], nil
}

// healthy is the health command: the scenario decides.
func healthy() int {
	sc, err := scenario()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if sc.Trial == bootlab.TrialSick && version() != bootlab.FactoryVersion {
		fmt.Fprintln(os.Stderr, "the pump does not turn")
		return 1
	}
	return 0
}

// deviceOf finds a disk by its serial number: their names depend on which answered first.
func deviceOf(serial string) (string, error) {
	for range 1000 {
		found, err := filepath.Glob("/sys/class/nvme/*/serial")
		if err != nil {
			return "", err
		}
		for _, path := range found {
			text, _ := os.ReadFile(path)
			device := "/dev/" + filepath.Base(filepath.Dir(path)) + "n1"
			if _, err := os.Stat(device); err == nil && strings.TrimSpace(string(text)) == serial {
				return device, nil
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return "", errors.New("no disk has the serial number " + serial)
}

// loopbackUp gives the machine the one network interface that every system has.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
