package install

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
)

// maxBody is how much of an answer is read: a service that sends without end is not the health check's to drink up.
const maxBody = 64 << 10

// probeHTTP wants an answer of 2xx. Only this machine is asked, whatever the name resolves to: a device that judged
// itself by another one would roll back because that one is away. No redirect is followed and no proxy is used. The
// certificate of an https address is not checked, because the connection does not leave the machine.
func probeHTTP(ctx context.Context, url string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dialer := net.Dialer{ControlContext: onlyHere}
	transport := &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, MaxResponseHeaderBytes: maxBody,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer after %s", timeout.Round(time.Millisecond))
	}
	if err != nil {
		return plainCause(err)
	}
	defer res.Body.Close()
	var said tail
	_, err = io.Copy(&said, io.LimitReader(res.Body, maxBody))
	if res.StatusCode < 200 || res.StatusCode > 299 {
		text := fmt.Sprintf("%d %s", res.StatusCode, http.StatusText(res.StatusCode))
		if line := said.lastLine(); line != "" && strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain") {
			text += ": " + line
		}
		return errors.New(text)
	}
	if err != nil {
		return fmt.Errorf("the answer does not end: %w", plainCause(err))
	}
	return nil
}

// plainCause drops what Go puts around the cause: the reason names the address already.
func plainCause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// onlyHere refuses a connection to any address but those of this machine.
func onlyHere(_ context.Context, _, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := to.Addr().Unmap().WithZone("")
	if ip.IsLoopback() {
		return nil
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range own {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == ip {
			return nil
		}
	}
	return fmt.Errorf("%s is not an address of this machine", ip)
}

// probeUnit wants a unit that is active; else its state is the error.
func probeUnit(ctx context.Context, unit string, timeout time.Duration) error {
	var said tail
	err := command{argv: []string{"systemctl", "is-active", "--", unit}, timeout: timeout, stdout: &said}.run(ctx)
	if state := said.lastLine(); err != nil && state != "" && ctx.Err() == nil {
		return errors.New(state)
	}
	return err
}

// probeFile wants a regular file; with a fresh, one that changed no longer ago. A time ahead of the clock counts as far
// from now as one behind it: the clock of a device may have jumped.
func probeFile(path string, fresh time.Duration, now time.Time) error {
	info, err := os.Stat(path)
	var at *os.PathError
	switch {
	case errors.As(err, &at):
		return at.Err
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	}
	if age := now.Sub(info.ModTime()).Abs(); fresh > 0 && age > fresh {
		return fmt.Errorf("not changed for %s", age.Round(time.Second))
	}
	return nil
}
