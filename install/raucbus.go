package install

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"meshupd/verify"
)

const (
	raucName            = "de.pengutronix.rauc"
	raucPath            = dbus.ObjectPath("/")
	raucFace            = "de.pengutronix.rauc.Installer"
	raucCallTimeout     = 30 * time.Second // the bus may have to start the service first
	raucDescribeTimeout = 10 * time.Minute // it hashes a bundle of format plain
)

// raucBus is the RAUC service on a D-Bus. Each question has a connection of its own, so that a restart of the service or
// of the bus is nothing special.
type raucBus struct {
	address string
	command []string // the rauc program
	timeout time.Duration
}

// dial connects to the bus.
func (r *raucBus) dial(ctx context.Context) (*dbus.Conn, dbus.BusObject, error) {
	connect := dbus.ConnectSystemBus
	if r.address != "" {
		connect = func(o ...dbus.ConnOption) (*dbus.Conn, error) { return dbus.Connect(r.address, o...) }
	}
	conn, err := connect(dbus.WithContext(ctx))
	if err != nil {
		return nil, nil, err
	}
	return conn, conn.Object(raucName, raucPath), nil
}

// call asks the service one thing.
func (r *raucBus) call(ctx context.Context, method string, args []any, out ...any) error {
	ctx, cancel := context.WithTimeout(ctx, raucCallTimeout)
	defer cancel()
	conn, service, err := r.dial(ctx)
	if err != nil {
		return raucSaid(err)
	}
	defer conn.Close()
	call := service.CallWithContext(ctx, method, 0, args...)
	if len(out) == 0 {
		return raucSaid(call.Err)
	}
	return raucSaid(call.Store(out...))
}

// raucSaid makes what came over the bus fit to be shown, and knows its word for busy.
func raucSaid(err error) error {
	if err == nil {
		return nil
	}
	text := raucText(err.Error())
	if strings.Contains(text, "already processing") {
		return verify.Refuse(verify.CodeBusy, "RAUC is busy with an installation")
	}
	return errors.New(text)
}

func (r *raucBus) slots(ctx context.Context) ([]raucSlot, error) {
	var all []struct {
		Name   string
		Status map[string]dbus.Variant
	}
	if err := r.call(ctx, raucFace+".GetSlotStatus", nil, &all); err != nil {
		return nil, err
	}
	if len(all) > maxRaucSlots {
		return nil, errors.New("it has too many slots")
	}
	out := make([]raucSlot, 0, len(all))
	for _, s := range all {
		text := func(key string) string {
			v, _ := s.Status[key].Value().(string)
			return raucText(v)
		}
		out = append(out, raucSlot{Name: raucText(s.Name), Class: text("class"), Parent: text("parent"), Bootname: text("bootname"),
			State: text("state"), Status: text("status"), SHA256: text("sha256"), Version: text("bundle.version")})
	}
	return out, nil
}

// primary is "" when RAUC knows of none, and it then answers with an error of its own: a slot that was started and not
// marked good yet is none for GRUB.
func (r *raucBus) primary(ctx context.Context) (string, error) {
	var name string
	err := r.call(ctx, raucFace+".GetPrimary", nil, &name)
	if err != nil && verify.CodeOf(err) == "" && strings.Contains(strings.ToLower(err.Error()), "primary") {
		return "", nil
	}
	return raucText(name), err
}

func (r *raucBus) mark(ctx context.Context, state, slot string) error {
	var name, message string
	return r.call(ctx, raucFace+".Mark", []any{state, slot}, &name, &message)
}

// describe also checks RAUC's own signature, before anything is changed.
func (r *raucBus) describe(ctx context.Context, path string) (raucBundle, error) {
	out := &capped{limit: maxRaucInfo}
	argv := append(append([]string(nil), r.command...), "info", "--output-format=json", path)
	if err := (command{argv: argv, timeout: raucDescribeTimeout, stdout: out}).run(ctx); err != nil {
		return raucBundle{}, installerError(ctx, "RAUC looks at the bundle", err)
	}
	b, err := parseRaucInfo(out.data.Bytes())
	if err != nil {
		return raucBundle{}, verify.Refuse(verify.CodeInstaller, "RAUC looks at the bundle: %w", err)
	}
	return b, nil
}

func (r *raucBus) install(ctx context.Context, path string, tell func(int)) error {
	limited, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	conn, service, err := r.dial(limited)
	if err != nil {
		return verify.Refuse(verify.CodeSlot, "reach RAUC: %w", raucSaid(err))
	}
	defer conn.Close()
	heard := make(chan *dbus.Signal, 64)
	conn.Signal(heard)
	for _, match := range [][]dbus.MatchOption{
		{dbus.WithMatchSender(raucName), dbus.WithMatchObjectPath(raucPath)},
		{dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, raucName)},
	} {
		if err := conn.AddMatchSignalContext(limited, match...); err != nil {
			return verify.Refuse(verify.CodeSlot, "listen to RAUC: %w", raucSaid(err))
		}
	}
	if call := service.CallWithContext(limited, raucFace+".InstallBundle", 0, path, map[string]dbus.Variant{}); call.Err != nil {
		// The service answers as soon as it has begun, so this is not yet its word on the bundle.
		return coded(verify.CodeSlot, "hand the bundle to RAUC", raucSaid(call.Err))
	}
	result, err := raucCompleted(limited, heard, tell)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return verify.Refuse(verify.CodeSlot, "install the bundle with RAUC: %w", err)
	case result == 0:
		return nil
	}
	last, err := service.GetProperty(raucFace + ".LastError")
	text, _ := last.Value().(string)
	if err != nil || text == "" {
		text = "it did not say why"
	}
	return verify.Refuse(verify.CodeInstaller, "RAUC refused the bundle: %s", raucText(text))
}

// raucCompleted waits for the end of an installation.
func raucCompleted(ctx context.Context, heard <-chan *dbus.Signal, tell func(int)) (int32, error) {
	for {
		select {
		case <-ctx.Done():
			return 0, errors.New("it did not end in time")
		case s, ok := <-heard:
			if !ok {
				return 0, errors.New("the connection to the bus ended")
			}
			switch s.Name {
			case raucFace + ".Completed":
				if len(s.Body) == 1 {
					if result, ok := s.Body[0].(int32); ok {
						return result, nil
					}
				}
			case "org.freedesktop.DBus.NameOwnerChanged":
				return 0, errors.New("its service ended in the middle")
			case "org.freedesktop.DBus.Properties.PropertiesChanged":
				if n, ok := raucPercent(s.Body); ok {
					tell(n)
				}
			}
		}
	}
}

// raucPercent reads the property Progress, a percentage, a message and a depth, from a change of properties.
func raucPercent(body []any) (int, bool) {
	if len(body) < 2 {
		return 0, false
	}
	changed, _ := body[1].(map[string]dbus.Variant)
	progress, _ := changed["Progress"].Value().([]any)
	if len(progress) == 0 {
		return 0, false
	}
	n, ok := progress[0].(int32)
	return int(n), ok && n >= 0 && n <= 100
}
