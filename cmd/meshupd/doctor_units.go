package main

import (
	"context"
	"fmt"
	"strings"

	"meshupd/cmd/meshupd/internal/doctor"
)

// checkDaemonUnit looks whether systemd starts the daemon, with the rights that it needs.
func (p *patient) checkDaemonUnit(context.Context) doctor.Finding {
	const name = "meshupd.service"
	u, at, err := p.tree.UnitFile(name)
	notStarted := "the daemon is not started, so the device takes no part"
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case at == "" && p.live:
		return doctor.Warn(name+" is not there", "nothing that is known here starts the daemon when the device starts", "install packaging/systemd/"+name+", or start it by other means")
	case at == "":
		return doctor.Fail(name+" is not there", notStarted, "install packaging/systemd/"+name+" in /usr/lib/systemd/system")
	case at == "/dev/null":
		return doctor.Fail(name+" is masked", notStarted, "systemctl unmask "+name)
	}
	how, f := p.enabled(name)
	if how == "" {
		return f
	}
	argv := strings.Fields(u.Last("Service.ExecStart"))
	if len(argv) == 0 {
		return doctor.Fail(at+" has no ExecStart", notStarted, "install packaging/systemd/"+name)
	}
	if _, err := p.tree.Program(strings.TrimLeft(argv[0], "@-:+!")); err != nil {
		return doctor.Fail("ExecStart of "+name+": "+err.Error(), notStarted, "install meshupd there, or correct the unit")
	}
	user := u.Last("Service.User")
	if p.cfg.Apply.Socket == "" && user != "" && user != "root" && p.cfg.Slots.Kind != "files" {
		return doctor.Fail(fmt.Sprintf("the daemon runs as %s, and [apply] socket is empty", user), "it has no right to write the slots",
			"set apply.socket and enable meshupd-apply.socket, or give the unit User=root in a drop-in")
	}
	if u.Last("Service.WatchdogSec") == "" {
		return doctor.Warn(name+" has no WatchdogSec", "a daemon that hangs is not started again", "set WatchdogSec=60 in the unit")
	}
	return doctor.OK("%s, %s, watchdog %s", at, how, u.Last("Service.WatchdogSec"))
}

// enabled says by what a unit is started; "" and a finding when by nothing.
func (p *patient) enabled(name string) (how string, f doctor.Finding) {
	by, err := p.tree.Wanted(name)
	if err != nil {
		return "", doctor.Skip("%v", err)
	}
	if by != "" {
		return "wanted by " + by, f
	}
	if preset, err := p.tree.Preset(name); err == nil && preset && !p.live && p.tree.FirstBoot() {
		return "enabled by a preset at the first start", f
	}
	fix := "systemctl enable " + name
	if !p.live {
		fix = "systemctl --root=" + p.tree.Dir() + " enable " + name + "; in Yocto SYSTEMD_AUTO_ENABLE"
	}
	return "", doctor.Fail(name+" is not enabled", "nothing starts it when the device starts", fix)
}

// checkApplyUnit looks whether systemd starts the half that writes slots, where the config says it is, and with the same config.
func (p *patient) checkApplyUnit(context.Context) doctor.Finding {
	want := p.cfg.Apply.Socket
	if want == "" {
		return doctor.OK("not used: [apply] socket is empty, the daemon writes the slots itself")
	}
	stuck := "no slot can be written"
	socket, at, err := p.tree.UnitFile("meshupd-apply.socket")
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case at == "" || at == "/dev/null":
		return doctor.Fail("meshupd-apply.socket is not there, or masked", stuck, "install packaging/systemd/meshupd-apply.socket and meshupd-apply.service")
	case socket.Last("Socket.ListenStream") != want:
		return doctor.Fail(fmt.Sprintf("meshupd-apply.socket listens on %q, apply.socket is %q", socket.Last("Socket.ListenStream"), want), stuck, "make both the same")
	}
	service, at, err := p.tree.UnitFile("meshupd-apply.service")
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case at == "" || at == "/dev/null":
		return doctor.Fail("meshupd-apply.service is not there, or masked", stuck, "install packaging/systemd/meshupd-apply.service")
	}
	daemon, _, err := p.tree.UnitFile("meshupd.service")
	if err != nil {
		return doctor.Skip("%v", err)
	}
	if a, b := configFlag(daemon), configFlag(service); a != b {
		return doctor.Fail(fmt.Sprintf("the daemon is started with config %s, meshupd apply with %s", orLayers(a), orLayers(b)),
			"the two halves work on different slots or trust different keys", "give both units the same --config")
	}
	if by, _ := p.tree.Wanted("meshupd-apply.socket"); by == "" && !strings.Contains(strings.Join(daemon["Unit.Wants"], " ")+" "+strings.Join(daemon["Unit.Requires"], " "), "meshupd-apply.socket") {
		return doctor.Fail("meshupd-apply.socket is not enabled, and meshupd.service does not want it", stuck, "systemctl enable meshupd-apply.socket")
	}
	return doctor.OK("meshupd-apply.socket on %s, the same config", want)
}

// configFlag is the --config of a unit's command, "" when it has none.
func configFlag(u doctor.Unit) string {
	argv := strings.Fields(u.Last("Service.ExecStart"))
	for i, arg := range argv {
		if value, ok := strings.CutPrefix(arg, "--config="); ok {
			return value
		}
		if arg == "--config" && i+1 < len(argv) {
			return argv[i+1]
		}
	}
	return ""
}

func orLayers(config string) string {
	if config == "" {
		return "layers of the system"
	}
	return config
}
