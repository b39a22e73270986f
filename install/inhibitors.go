package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	logindName     = "org.freedesktop.login1"
	logindTimeout  = 5 * time.Second
	maxInhibitors  = 8192 // systemd's own limit
	maxInhibitText = 100
)

// logindInhibitor is an element of ListInhibitors, see org.freedesktop.login1(5).
type logindInhibitor struct {
	What, Who, Why, Mode string
	UID, PID             uint32
}

// blocks says whether it forbids the end of the machine. One of mode "delay" only wants to be told, and one of
// "block-weak" gives way to who has the right to restart.
func (l logindInhibitor) blocks() bool {
	return l.Mode == "block" && slices.Contains(strings.Split(l.What, ":"), "shutdown")
}

// text is fit for a terminal: any program may have written it.
func (l logindInhibitor) text() string {
	who, why := printable(l.Who, maxInhibitText), printable(l.Why, maxInhibitText)
	if who == "" {
		who = fmt.Sprintf("process %d", l.PID)
	}
	if why == "" {
		return who
	}
	return who + ": " + why
}

// Inhibited asks systemd-logind for a lock by which a program forbids the end of the machine (systemd-inhibit --what=shutdown
// --mode=block), and says who holds it and why; "" when nobody does, or when there is no logind. bus is the address of the
// system bus, "" for the usual one. It takes 5 seconds at most; an error says that logind is there and does not answer.
func Inhibited(ctx context.Context, bus string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, logindTimeout)
	defer cancel()
	connect := dbus.ConnectSystemBus
	if bus != "" {
		connect = func(o ...dbus.ConnOption) (*dbus.Conn, error) { return dbus.Connect(bus, o...) }
	}
	conn, err := connect(dbus.WithContext(ctx))
	if err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("ask systemd-logind for inhibitors: %w", context.Cause(ctx))
		}
		return "", nil // no bus, no logind
	}
	defer conn.Close()
	var held []logindInhibitor
	// A logind that does not run must not be started for the question.
	err = conn.Object(logindName, "/org/freedesktop/login1").CallWithContext(ctx, logindName+".Manager.ListInhibitors", dbus.FlagNoAutoStart).Store(&held)
	var said dbus.Error
	switch {
	case errors.As(err, &said) && slices.Contains([]string{"org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner"}, said.Name):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("ask systemd-logind for inhibitors: %s", printable(err.Error(), maxReason))
	case len(held) > maxInhibitors:
		return "", fmt.Errorf("ask systemd-logind for inhibitors: it names %d", len(held))
	}
	for _, one := range held {
		if one.blocks() {
			return one.text(), nil
		}
	}
	return "", nil
}
