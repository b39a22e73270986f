package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/verify"
)

// configChecks are made on a device and on an image alike: all they look at is files.
var configChecks = []check{
	{ID: "config.valid", Look: (*patient).checkConfig},
	{ID: "config.files", Needs: (*patient).needConfig, Look: (*patient).checkConfigFiles},
	{ID: "trust.anchor", Needs: (*patient).needConfig, Look: (*patient).checkAnchor},
	{ID: "trust.keys", Needs: (*patient).needDoor, Look: (*patient).checkKeys},
	{ID: "trust.secrets", Needs: (*patient).needConfig, Look: (*patient).checkSecrets},
	{ID: "mesh.site_key", Needs: (*patient).needConfig, Look: (*patient).checkSiteKey},
	{ID: "users", Needs: (*patient).needConfig, Look: (*patient).checkUsers},
	{ID: "units.daemon", Needs: (*patient).needSystemd, Look: (*patient).checkDaemonUnit},
	{ID: "units.apply", Needs: (*patient).needSystemd, Look: (*patient).checkApplyUnit},
	{ID: "units.installer", Needs: (*patient).needSystemd, Look: (*patient).checkRivals},
	{ID: "udev.rule", Look: (*patient).checkUdev},
	{ID: "commands", Needs: (*patient).needConfig, Look: (*patient).checkCommands},
	{ID: "health.checks", Needs: (*patient).needConfig, Look: (*patient).checkHealthChecks},
	{ID: "net.firewall", Needs: (*patient).needConfig, Look: (*patient).checkFirewall},
}

func (p *patient) needConfig() string {
	if p.cfg == nil {
		return "the config cannot be used"
	}
	return ""
}

func (p *patient) needDoor() string {
	if p.door == nil {
		return "the trust cannot be used"
	}
	return ""
}

// systemd says whether the tree has it.
func (p *patient) systemd() bool {
	_, a := p.tree.Stat("/usr/lib/systemd/systemd")
	_, b := p.tree.Stat("/lib/systemd/systemd")
	return a == nil || b == nil
}

func (p *patient) needSystemd() string {
	if p.cfg == nil {
		return p.needConfig()
	}
	if !p.systemd() {
		return "there is no systemd: what starts `meshupd daemon` is not looked at"
	}
	return ""
}

func (p *patient) checkConfig(context.Context) doctor.Finding {
	if p.configErr != nil {
		if errors.Is(p.configErr, fs.ErrPermission) {
			return doctor.Skip("%v: ask again as root", p.configErr)
		}
		return failed(p.configErr, "the daemon does not start")
	}
	return doctor.OK("%s: product %s, channel %s, slots %s", strings.Join(filePaths(p.files), ", "), p.cfg.Product, p.cfg.Channel, p.cfg.Slots.place())
}

// checkConfigFiles looks whether others could change what decides what boots, and whether the daemon can read it.
func (p *patient) checkConfigFiles(context.Context) doctor.Finding {
	var loose, closed []string
	for _, name := range append(filePaths(p.files), p.cfg.Trust) {
		info, err := p.tree.Stat(name)
		if err != nil {
			continue // config.valid and trust.anchor tell of it
		}
		if info.Mode().Perm()&0o022 != 0 {
			loose = append(loose, fmt.Sprintf("%s (mode %o)", name, info.Mode().Perm()))
		}
		if info.Mode().Perm()&0o004 == 0 && p.cfg.Apply.Socket != "" {
			closed = append(closed, fmt.Sprintf("%s (mode %o)", name, info.Mode().Perm()))
		}
	}
	switch {
	case len(loose) > 0:
		return doctor.Fail("others than root may change "+strings.Join(loose, ", "),
			"who can change them decides what this device installs", "take the right away: chmod go-w")
	case len(closed) > 0:
		return doctor.Warn("not everybody can read "+strings.Join(closed, ", "),
			"the daemon runs as user "+p.cfg.Apply.User+" and has to read them", "chmod o+r, or give them to the group of that user")
	}
	return doctor.OK("only root may change the config and the trust folder")
}

func (p *patient) checkAnchor(context.Context) doctor.Finding {
	if p.doorErr != nil {
		if errors.Is(p.doorErr, fs.ErrPermission) {
			return doctor.Skip("%v: ask again as root", p.doorErr)
		}
		return failed(p.doorErr, "no release can be verified, and the daemon does not start")
	}
	info := p.door.Trust()
	if info.Damage != "" {
		return doctor.Warn("the kept trust chain is damaged: "+info.Damage, "the factory's keys are used until the next release brings the chain again",
			"import the newest release")
	}
	return doctor.OK("%s: product %s, document %d, line %d", p.cfg.Trust, info.Product, info.Epoch, info.Line)
}

// checkKeys keeps keys for trying things out away from devices that follow the stable channel.
func (p *patient) checkKeys(context.Context) doctor.Finding {
	info := p.door.Trust()
	var development []string
	for _, k := range info.Keys {
		if k.Development {
			development = append(development, k.Name)
		}
	}
	said := fmt.Sprintf("%s trusted, %d of them needed", count(len(info.Keys), "key"), info.Threshold)
	if len(development) == 0 {
		return doctor.OK("%s, no development key", said)
	}
	said += ", for development: " + strings.Join(development, ", ")
	if p.cfg.Channel != verify.StableChannel {
		return doctor.OK("%s; fine on the channel %s", said, p.cfg.Channel)
	}
	fix := "make the trust folder with keys made without --development, or set `channel`"
	if !p.live || len(info.Keys)-len(development) < info.Threshold {
		f := doctor.Fail(said, "a development key counts for nothing on the channel "+verify.StableChannel+", and its secret half is on somebody's desk", fix)
		f.Code = verify.CodeDevKey
		return f
	}
	return doctor.Warn(said, "a development key counts for nothing on the channel "+verify.StableChannel, fix)
}

const maxSecret = 256 << 10

// checkSecrets looks for the vendor's secret keys where only public ones belong.
func (p *patient) checkSecrets(context.Context) doctor.Finding {
	var found []string
	dirs := []string{p.cfg.Trust, path.Join(p.cfg.Trust, "certs"), "/usr/lib/meshupd", "/etc/meshupd", "/root"}
	slices.Sort(dirs)
	for _, dir := range slices.Compact(dirs) {
		list, err := p.tree.ReadDir(dir)
		if err != nil {
			continue // not there, or told of by trust.anchor
		}
		for _, e := range list {
			at := path.Join(dir, e.Name())
			data, err := p.tree.ReadFile(at, maxSecret)
			if err == nil && (bytes.Contains(data, []byte("PGP PRIVATE KEY BLOCK")) || secretPacket(data)) {
				found = append(found, at)
			}
		}
	}
	if len(found) > 0 {
		return doctor.Fail("a secret key lies in "+strings.Join(found, ", "),
			"whoever takes a device apart can sign releases for all of them", "remove it, make new keys, and replace these with `meshupd trust next`")
	}
	return doctor.OK("no secret key among the public ones")
}

// secretPacket says whether data begins as a binary secret key (RFC 9580, section 4.2: packet type 5).
func secretPacket(data []byte) bool {
	return len(data) > 0 && (data[0] == 0xc5 || data[0] >= 0x94 && data[0] <= 0x97)
}

func (p *patient) checkSiteKey(context.Context) doctor.Finding {
	name := p.cfg.Mesh.SiteKeyFile
	if name == "" {
		return doctor.OK("none: every device of this product may join")
	}
	info, err := p.tree.Stat(name)
	if errors.Is(err, fs.ErrNotExist) && !p.live {
		return doctor.Warn(name+" is not in the image", "the daemon does not start without it", "see to it that each device gets one when it is set up")
	}
	if err == nil && info.Mode().Perm()&0o007 != 0 {
		return doctor.Fail(fmt.Sprintf("everybody can read %s (mode %o)", name, info.Mode().Perm()), "any program here could join the site", "chmod o= "+name)
	}
	var raw []byte
	if err == nil {
		raw, err = p.tree.ReadFile(name, maxSiteKey)
	}
	if errors.Is(err, fs.ErrPermission) {
		return doctor.Skip("%v: ask again as root", err)
	}
	if err == nil {
		_, err = parseSiteKey(name, raw)
	}
	if err != nil {
		return failed(verify.Refuse(verify.CodeConfig, "read the site key: %w", err), "the daemon does not start")
	}
	if !p.live {
		return doctor.Warn(name+" is in the image", "all sites that run this image have one secret", "give each site its own when it is set up")
	}
	return doctor.OK("%s", name)
}

// checkUsers looks for the user of the daemon.
func (p *patient) checkUsers(context.Context) doctor.Finding {
	name := p.cfg.Apply.User
	u, _, err := p.tree.UnitFile("meshupd.service")
	switch {
	case p.cfg.Apply.Socket != "":
	case err == nil && u.Last("Service.User") != "":
		name = u.Last("Service.User")
	default:
		return doctor.OK("the daemon runs as root: it needs none")
	}
	passwd, err := p.tree.ReadFile("/etc/passwd", 1<<20)
	if err == nil && doctor.HasUser(passwd, name) {
		return doctor.OK("%s is in /etc/passwd", name)
	}
	for _, dir := range []string{"/etc/sysusers.d", "/usr/lib/sysusers.d"} {
		list, _ := p.tree.Glob(dir, ".conf")
		for _, at := range list {
			conf, err := p.tree.ReadFile(at, 256<<10)
			if err == nil && doctor.MakesUser(conf, name) {
				if p.live {
					return doctor.Warn("the user "+name+" is not there, though "+at+" makes it", "the daemon does not start", "systemd-sysusers "+at)
				}
				return doctor.OK("%s is made by %s", name, at)
			}
		}
	}
	if p.live {
		// It may be known to another source of users than the file.
		if _, err := userID(name); err == nil {
			return doctor.OK("%s is known to the system", name)
		}
	}
	return doctor.Fail("the user "+name+" is neither in /etc/passwd nor made by sysusers.d", "the daemon does not start",
		"install packaging/systemd/sysusers.conf as /usr/lib/sysusers.d/meshupd.conf, or make the user in the image")
}

// checkRivals looks for services that would confirm a trial before its health check did.
func (p *patient) checkRivals(context.Context) doctor.Finding {
	rival := map[string]string{"rauc": "rauc-mark-good.service"}[p.cfg.Slots.Kind]
	if p.cfg.Slots.Bootloader == "systemd-boot" {
		rival = "systemd-bless-boot.service"
	}
	if rival == "" {
		return doctor.OK("no other service confirms what is on trial")
	}
	_, at, err := p.tree.UnitFile(rival)
	by, _ := p.tree.Wanted(rival)
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case at == "" || at == "/dev/null":
		return doctor.OK("%s is off", rival)
	case rival == "rauc-mark-good.service" && by == "":
		return doctor.OK("%s is not enabled", rival)
	}
	return doctor.Fail(rival+" is on", "it calls a new version good before the health check was asked, so that there is no way back", "systemctl mask "+rival)
}

// checkUdev looks for the rule that lets sticks be imported by themselves.
func (p *patient) checkUdev(context.Context) doctor.Finding {
	for _, dir := range []string{"/etc/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"} {
		list, _ := p.tree.Glob(dir, ".rules")
		for _, at := range list {
			data, err := p.tree.ReadFile(at, 256<<10)
			if err != nil || !bytes.Contains(data, []byte("meshupd-import@")) {
				continue
			}
			if _, unit, _ := p.tree.UnitFile("meshupd-import@.service"); unit == "" || unit == "/dev/null" {
				return doctor.Warn(at+" is there, meshupd-import@.service is not", "a stick that is plugged in is not imported", "install packaging/systemd/meshupd-import@.service")
			}
			return doctor.OK("%s: sticks are imported when they are plugged in", at)
		}
	}
	return doctor.Warn("no rule starts meshupd-import@.service", "a stick is only imported when somebody types `meshupd import`",
		"install packaging/systemd/90-meshupd.rules and meshupd-import@.service, if sticks shall import themselves")
}

// program is a command of the config.
type program struct{ key, name string }

// programs are all commands that an update will run.
func (c *Config) programs() []program {
	var out []program
	add := func(key string, argv []string, usual string) {
		switch {
		case len(argv) > 0:
			out = append(out, program{key, argv[0]})
		case usual != "":
			out = append(out, program{key, usual})
		}
	}
	s := c.Slots
	usualRestart := ""
	if s.Kind == "block" || delegated(s.Kind) {
		usualRestart = "systemctl"
	}
	if s.Kind != "container" {
		add("slots.restart", s.Restart, usualRestart)
	}
	if s.Bootloader == "custom" && (s.Kind == "block" || delegated(s.Kind)) {
		add("slots.boot.command", s.Boot.Command, "")
	}
	if delegated(s.Kind) {
		add("slots.delegate.command", s.Delegate.Command, map[string]string{"rauc": "rauc", "swupdate": "swupdate", "mender": "mender"}[s.Kind])
	}
	if s.Kind == "container" {
		add("slots.container.command", s.Container.Command, map[string]string{"podman": "podman", "containerd": "ctr"}[s.Container.Engine])
		for _, name := range slices.Sorted(maps.Keys(s.Container.Services)) {
			add("slots.container.services."+name+".ready", s.Container.Services[name].Ready, "")
			add("slots.container.services."+name+".switch", s.Container.Services[name].Switch, "")
		}
	}
	add("health.command", c.Health.Command, "")
	if len(c.Health.Units) > 0 {
		add("health.units", nil, "systemctl")
	}
	return out
}

func (p *patient) checkCommands(context.Context) doctor.Finding {
	var bad, good []string
	for _, one := range p.cfg.programs() {
		if inSlots(p.cfg, one.name) {
			continue // it comes with the version that it is for
		}
		if _, err := p.tree.Program(one.name); err != nil {
			bad = append(bad, one.key+": "+err.Error())
		} else {
			good = append(good, one.key)
		}
	}
	switch {
	case len(bad) > 0:
		return doctor.Fail(strings.Join(bad, "; "), "an update would fail when it comes to that command", "install it, make it executable, or correct the config")
	case len(good) == 0:
		return doctor.OK("none are set")
	}
	return doctor.OK("there and executable: %s", strings.Join(good, ", "))
}

// inSlots says whether a path leads through the slots of kind files, whose content changes with the version.
func inSlots(cfg *Config, name string) bool {
	return cfg.Slots.Kind == "files" && path.IsAbs(name) && doctor.Below(name, cfg.Slots.Folder)
}

func (p *patient) checkHealthChecks(context.Context) doctor.Finding {
	h := p.cfg.Health
	n := len(h.HTTP) + len(h.Units) + len(h.Files)
	if len(h.Command) > 0 {
		n++
	}
	if n == 0 {
		return doctor.Warn("[health] has no check", "every version that starts is taken for healthy, and there is no way back from one that does nothing",
			"set health.command, http, units or files")
	}
	if p.systemd() {
		for _, unit := range h.Units {
			if _, at, err := p.tree.UnitFile(unit); err == nil && (at == "" || at == "/dev/null") {
				return doctor.Warn("health.units: "+unit+" is not there, or masked", "a version that does not bring it never counts as healthy", "correct the name, or install the unit")
			}
		}
	}
	return doctor.OK("%s, until %s", count(n, "check"), h.Deadline.text())
}

func (d Duration) text() string {
	raw, _ := d.MarshalText()
	return string(raw)
}

// checkFirewall gives a hint where something is known to filter: whether it lets the mesh through is only known to a neighbour.
func (p *patient) checkFirewall(context.Context) doctor.Finding {
	why := "neighbours cannot reach this device, or are not found"
	ports := fmt.Sprintf("%d/tcp", p.cfg.Mesh.Port)
	if p.cfg.Mesh.Port == 0 {
		ports = "the port that mesh.port fixes, tcp,"
	}
	if conf, err := p.tree.ReadFile("/etc/ufw/ufw.conf", 64<<10); err == nil && doctor.ParseOSRelease(conf)["ENABLED"] == "yes" {
		return doctor.Warn("ufw is on", why+", unless it lets "+ports+" and 5353/udp through", "ufw allow "+ports+" && ufw allow 5353/udp")
	}
	for unit, fix := range map[string]string{
		"firewalld.service": "firewall-cmd --permanent --add-port=" + ports + " --add-service=mdns",
		"nftables.service":  "look at /etc/nftables.conf",
	} {
		if by, _ := p.tree.Wanted(unit); by != "" {
			return doctor.Warn(unit+" is enabled", why+", unless it lets "+ports+" and 5353/udp through", fix)
		}
	}
	return doctor.OK("no firewall service is enabled")
}
